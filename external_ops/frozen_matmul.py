"""Products with matrices that do not train, in the form that files hold them; gradients reach x.

A matrix is ``[height, width]`` in bfloat16, int8, or uint8 with two 4-bit integers a byte (the even
column in the lower half, both offset by 8); integers have scales ``[height, N]``, one for each of N
groups of neighbouring columns. Forward and gradient multiply with the same matrix, once as it lies
and once transposed, so that LoRA (Hu et al. 2021) over a base of few bits (Dettmers et al. 2023)
never holds it in the type of its inputs: the reference widens it for each product, the native form
a block at a time.
"""

from collections.abc import Callable

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from external_ops import native


def integers_of(matrix: Tensor) -> Tensor:
    """Return float32 integers ``[height, width]`` of int8, or of uint8 with two in a byte."""
    wide = matrix.astype("float32")
    if matrix.dtype == paddle.int8:
        return wide
    # In float because exported programs have no shifts of bytes on every device.
    upper = paddle.floor(wide / 16)
    both = paddle.stack([wide - 16 * upper, upper], axis=-1) - 8
    return both.reshape([matrix.shape[0], -1])


def widen(integers: Tensor, scale: Tensor) -> Tensor:
    """Return a float32 matrix of integers in any type and their scales."""
    height, width = integers.shape
    rows = integers.astype("float32").reshape([height, scale.shape[1], -1])
    return (rows * scale.unsqueeze(-1)).reshape([height, width])


def widened(matrix: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return a matrix in float32; every number is exact where scales have bfloat16's digits."""
    return matrix.astype("float32") if scale is None else widen(integers_of(matrix), scale)


class _Frozen(PyLayer):
    """A product by one function and its gradient by another; nothing of it is kept."""

    @staticmethod
    def forward(ctx, x, product, gradient):
        ctx.gradient = gradient
        return product(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.gradient(grad)


def _trained(
    x: Tensor, product: Callable[[Tensor], Tensor], gradient: Callable[[Tensor], Tensor]
) -> Tensor:
    if paddle.in_dynamic_mode() and paddle.is_grad_enabled() and not x.stop_gradient:
        return _Frozen.apply(x, product, gradient)
    return product(x)


def frozen_matmul_ref(
    x: Tensor, matrix: Tensor, scale: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """Multiply with a matrix that does not train, widened to the type of its input each time.

    Args:
        x: ``[..., height]``, or ``[..., width]`` where ``transposed``, in any floating type.
        matrix: bfloat16, int8, or uint8 with two integers a byte.
        scale: float32 ``[height, N]`` of integers; None of bfloat16.
        transposed: multiply with the transposed matrix.

    Returns:
        ``[..., width]``, or ``[..., height]`` where ``transposed``, in the type of x.
    """

    def product(x: Tensor, turned: bool) -> Tensor:
        return paddle.matmul(x, widened(matrix, scale).astype(x.dtype), transpose_y=turned)

    return _trained(x, lambda x: product(x, transposed), lambda g: product(g, not transposed))


def frozen_matmul_native(
    x: Tensor, matrix: Tensor, scale: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """Compute :func:`frozen_matmul_ref` in one kernel, in float32 whatever the type of x.

    Programs that are traced get the reference: they run where the native ops are not.
    """
    if not paddle.in_dynamic_mode():
        return frozen_matmul_ref(x, matrix, scale, transposed=transposed)

    def product(x: Tensor, turned: bool) -> Tensor:
        return multiplied(x.astype("float32"), matrix, scale, turned).astype(x.dtype)

    return _trained(x, lambda x: product(x, transposed), lambda g: product(g, not transposed))


def multiplied(x: Tensor, matrix: Tensor, scale: Tensor | None, transposed: bool) -> Tensor:
    """Run the native kernel, which knows no gradient; arguments are the reference's.

    Raises:
        ValueError: x that is not float32, or shapes and types that do not fit.
    """
    height, width = matrix.shape
    columns = height if transposed else width * (2 if matrix.dtype == paddle.uint8 else 1)
    return native.run("frozen_matmul", x, matrix, scale, transposed, columns)[0]
