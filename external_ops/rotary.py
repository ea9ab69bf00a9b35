"""Rotary position embedding applied to queries and keys (Su et al. 2021).

The two halves of a head are the real and imaginary parts, as in ``transformers`` and in the weights
it saves, not even and odd entries as in the paper.
"""

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from external_ops import native


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    real, imaginary = x[..., :half], x[..., half:]
    # Broadcasting a middle axis inside a product is several times slower on CPU (docs/log.md).
    cos, sin = cos.expand_as(real), sin.expand_as(real)
    return paddle.concat([real * cos - imaginary * sin, imaginary * cos + real * sin], axis=-1)


class _Rotary(PyLayer):
    """A rotation's gradient is the opposite rotation; slices and concat would cost more."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensor()
        return _rotate(grad, cos, -sin)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head by its position's angles.

    Args:
        x: ``[..., H, D]``.
        cos: ``[..., 1, D/2]``, no gradient.
        sin: ``[..., 1, D/2]``, no gradient.

    Returns:
        ``[..., H, D]``.
    """
    if paddle.in_dynamic_mode() and paddle.is_grad_enabled() and not x.stop_gradient:
        return _Rotary.apply(x, cos, sin)
    return _rotate(x, cos, sin)


def rotary_native(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute :func:`rotary` and its gradient with the kernel of csrc/cpu/rotary.cc.

    Before ``1, D/2`` the tables have the axes of ``x`` or, leading or trailing, axes of 1.
    """
    return native.run("rotary", x, cos, sin)[0]
