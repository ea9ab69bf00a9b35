"""Linears that multiply in float8 (e4m3), by Paddle's CUDA kernels, forward and both gradients.

Every product is of two float8 matrices whose blocks are scaled as they are now ("current scaling",
DeepSeek-V3's report, section 3.3, with e4m3 for gradients too): 1 x 128 numbers along the products'
sums share a scale in inputs and gradients, 128 x 128 in weights. Scales are powers of two, so that
scaling itself rounds nothing. Sums and results are float32 or bfloat16; nothing is kept in float8,
so that memory is that of bfloat16: inputs and weights are rounded again in the backward pass.

What Paddle 3.3.1 lacks, and what stands here for it: ``fp8_quant_blockwise`` gives the scales of
128 x 128 blocks without the padding with which cuBLAS reads them, and transposes full tiles only.

I inputs, O outputs, M rows.
"""

from typing import Any

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.incubate.nn.functional import fp8_gemm_blockwise, fp8_quant_blockwise

from common.devices import GPU
from external_ops import devices

BLOCK = 128
_CAPABILITY = (9, 0)
_CUDA = (12, 9)
# cuBLAS reads the scales of 128 x 128 blocks in rows of a multiple of this.
_SCALES = 4

Rounded = tuple[Tensor, Tensor]  # float8 numbers, and the scales that widen them


def why_not() -> str:
    """Return why the current device has no such products, or an empty string."""
    kind = devices.current()
    if kind != GPU:
        return f"Paddle has float8 products by block for NVIDIA GPUs, this device is {kind}"
    capability = paddle.device.cuda.get_device_capability()
    if capability != _CAPABILITY:
        found = ".".join(map(str, capability))
        return (
            f"cuBLAS has float8 products by block for compute capability 9.0, this GPU has {found}"
        )
    built = paddle.version.cuda()
    if tuple(map(int, built.split(".")[:2])) < _CUDA:
        return (
            f"cuBLAS has float8 products by block since CUDA 12.9, this Paddle is for {built}; "
            "`make setup DEVICE=gpu CUDA=129`"
        )
    return ""


def round_rows(x_MI: Tensor) -> Rounded:
    """Round a matrix for a sum over its columns, a scale for 128 numbers of a row."""
    found: Rounded = fp8_quant_blockwise(x_MI)
    return found


def round_columns(x_MI: Tensor) -> Rounded:
    """Round and transpose a matrix for a sum over its rows, a scale for 128 of a column."""
    found: Rounded = fp8_quant_blockwise(x_MI, input_transpose=True, return_transpose_only=True)
    return found


def _padded(rounded: Rounded) -> Rounded:
    """Give scales ``[rows / 128, columns / 128]`` rows as cuBLAS reads them."""
    numbers, scale = rounded
    missing = -scale.shape[1] % _SCALES
    if missing:
        scale = paddle.concat([scale, paddle.zeros([scale.shape[0], missing])], axis=1)
    return numbers, scale


def round_blocks(weight_IO: Tensor, *, transposed: bool) -> Rounded:
    """Round a weight by blocks of 128 x 128, as it lies or transposed; the numbers are the same."""
    found = fp8_quant_blockwise(
        weight_IO,
        quant_method="128x128",
        input_transpose=transposed,
        return_transpose_only=transposed,
        output_scale_transpose=False,
    )
    return _padded(found)


def product(left: Rounded, right: Rounded, dtype: Any, *, blocks: bool) -> Tensor:
    """Multiply ``[M, I]`` with a transposed ``[O, I]``, which is rounded by ``blocks`` or rows."""
    kinds = {"is_a_1d_scaled": True, "is_b_1d_scaled": not blocks}
    out: Tensor = fp8_gemm_blockwise(*left, *right, dtype, **kinds)
    return out


class _Linear(PyLayer):
    @staticmethod
    def forward(ctx, x_MI, weight_IO):
        ctx.save_for_backward(x_MI, weight_IO)
        ctx.wanted = [not one.stop_gradient for one in (x_MI, weight_IO)]
        rounded = round_blocks(_bfloat16(weight_IO), transposed=True)
        return product(round_rows(_bfloat16(x_MI)), rounded, paddle.bfloat16, blocks=True)

    @staticmethod
    def backward(ctx, grad_MO):
        x_MI, weight_IO = ctx.saved_tensor()
        grad_MO = _bfloat16(grad_MO).contiguous()
        to_x = to_weight = None
        if ctx.wanted[0]:
            rounded = round_blocks(_bfloat16(weight_IO), transposed=False)
            to_x = product(round_rows(grad_MO), rounded, paddle.bfloat16, blocks=True)
            to_x = to_x.astype(x_MI.dtype)
        if ctx.wanted[1]:
            sides = round_columns(_bfloat16(x_MI)), round_columns(grad_MO)
            to_weight = product(*sides, weight_IO.dtype, blocks=False)
        return to_x, to_weight


def _bfloat16(x: Tensor) -> Tensor:
    return x if x.dtype == paddle.bfloat16 else x.astype(paddle.bfloat16)


def fp8_linear(x: Tensor, weight_IO: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map ``[..., I]`` to ``[..., O]`` in bfloat16, multiplying in float8.

    Rows are padded with zeros to whole blocks. A number that is not finite shows in every result
    that it takes part in.

    Args:
        x: bfloat16 or float32, which is rounded to bfloat16 first; its gradient has its type.
        weight_IO: bfloat16 or float32, likewise; I and O are multiples of 128.
        bias: ``[O]``, added to the result.
    """
    rows = x.reshape([-1, x.shape[-1]]).contiguous()
    count = rows.shape[0]
    if not count:  # for which Paddle's operators have no blocks
        return paddle.matmul(_bfloat16(x), _bfloat16(weight_IO))
    if missing := -count % BLOCK:
        rows = paddle.concat([rows, paddle.zeros([missing, rows.shape[1]], rows.dtype)])
    out = _Linear.apply(rows, weight_IO)
    out = (out[:count] if missing else out).reshape([*x.shape[:-1], -1])
    result: Tensor = out if bias is None else out + bias.astype(out.dtype)
    return result
