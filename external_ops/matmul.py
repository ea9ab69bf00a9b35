"""Float32 matrix products of training: forward, and both of the backward pass.

Paddle's MKL is the faster one where it was measured (docs/ops.md), so networks take that; this one
is for processors and builds on which it is not.
"""

from paddle import Tensor

from external_ops import native


def matmul_native(
    x: Tensor, y: Tensor, *, transpose_x: bool = False, transpose_y: bool = False
) -> Tensor:
    """Multiply two matrices, or their transposes, with the kernel of csrc/cpu/matmul.cc.

    Args:
        x: float32 ``[M, K]``; with ``transpose_x`` ``[K, M]``.
        y: float32 ``[K, N]``; with ``transpose_y`` ``[N, K]``.
        transpose_x, transpose_y: whether the product is of the transpose.

    Returns:
        float32 ``[M, N]``, whose sums have the same order whatever the number of threads.

    Raises:
        ValueError: other types, or shapes that do not fit.
    """
    return native.run("matmul", x, y, transpose_x, transpose_y)[0]
