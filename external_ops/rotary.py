"""Rotary position embedding applied to queries and keys (Su et al. 2021).

The two halves of a head are the real and imaginary parts, as in ``transformers`` and in the weights
it saves, not even and odd entries as in the paper.
"""

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.incubate.nn import functional as incubate

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


def _twice(table: Tensor) -> Tensor:
    """Return ``[..., D]`` of a table ``[..., D/2]``, made by the first of those that share it."""
    if not paddle.in_dynamic_mode():
        return paddle.concat([table, table], axis=-1)
    known = getattr(table, "twice", None)
    if known is None:
        known = paddle.concat([table, table], axis=-1)
        table.twice = known  # goes when the table goes
    return known


def rotary_gpu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute :func:`rotary` and its gradient with Paddle's CUDA kernel.

    The kernel takes one table for all rows of a batch; rows with tables of their own, as packed
    documents have, become one long row.
    """
    cos, sin = _twice(cos), _twice(sin)
    shape = x.shape
    if x.ndim == 3 or cos.shape[0] != 1:
        x = x.reshape([1, -1, *shape[-2:]])
        cos, sin = (table.reshape([1, -1, 1, shape[-1]]) for table in (cos, sin))
    # Mixed precision multiplies in half precision and rotates in float32.
    x = x.astype(cos.dtype)
    turned = incubate.fused_rotary_position_embedding(
        x, sin=sin, cos=cos, use_neox_rotary_style=False
    )[0]
    return turned.reshape(shape) if paddle.in_dynamic_mode() else turned.reshape([-1, *shape[1:]])


def rotary_native(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute :func:`rotary` and its gradient with the kernel of csrc/cpu/rotary.cc.

    Before ``1, D/2`` the tables have the axes of ``x`` or, leading or trailing, axes of 1.
    """
    return native.run("rotary", x, cos, sin)[0]
