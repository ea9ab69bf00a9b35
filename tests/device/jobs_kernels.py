"""Operators on the rehearsal device: what they give for numbers that a test sends, and refusals."""

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.incubate.nn import functional as incubate
from paddle.nn import functional as F
from paddle.nn.functional import flash_attention as flash

from external_ops import weight_only
from external_ops.backend import FORMS

Numbers = list[Any]


def _leaf(numbers: Numbers, dtype: str) -> Tensor:
    tensor = paddle.to_tensor(numbers, dtype="float32").astype(dtype).detach()
    tensor.stop_gradient = False
    return tensor


def _numbers(tensor: Tensor) -> Numbers:
    assert tensor.place.is_custom_place(), tensor.place
    return tensor.astype("float32").numpy().tolist()


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], grad: Numbers) -> Numbers:
    """Return the result and the gradients of all inputs, for a gradient of the result."""
    result = function(*inputs)
    result.backward(paddle.to_tensor(grad, dtype="float32").astype(result.dtype))
    return [_numbers(result), *(_numbers(one.grad) for one in inputs)]


def attention(
    q: Numbers, k: Numbers, v: Numbers, grad: Numbers, bounds: Numbers | None, dtype: str
) -> Numbers:
    """FlashAttention with its gradients, or FlashMask where there are bounds; always causal."""
    inputs = [_leaf(numbers, dtype) for numbers in (q, k, v)]
    if bounds is None:
        return with_gradients(
            lambda *each: flash.flash_attention(*each, causal=True)[0], inputs, grad
        )
    rows = paddle.to_tensor(bounds, dtype="int32")
    return with_gradients(
        lambda *each: flash.flashmask_attention(*each, rows, causal=True), inputs, grad
    )


def rms_norm(x: Numbers, weight: Numbers, grad: Numbers, dtype: str) -> Numbers:
    """Paddle's fused norm over the last axis, with its gradients."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return incubate.fused_rms_norm(x, weight, None, 1e-5, begin_norm_axis=x.ndim - 1)[0]

    return with_gradients(norm, [_leaf(x, dtype), _leaf(weight, dtype)], grad)


def rotary(x: Numbers, cos: Numbers, sin: Numbers, grad: Numbers, form: str, dtype: str) -> Numbers:
    """A form of the op ``rotary`` with its gradient."""
    tables = [paddle.to_tensor(table, dtype="float32").astype(dtype) for table in (cos, sin)]
    kernel = {"reference": FORMS["rotary"].reference, **FORMS["rotary"].paddle}[form]
    return with_gradients(lambda x: kernel(x, *tables), [_leaf(x, dtype)], grad)


def swiglu(gate: Numbers, up: Numbers, grad: Numbers, dtype: str) -> Numbers:
    """Paddle's SwiGLU with its gradients."""
    return with_gradients(
        FORMS["swiglu"].paddle["gpu"], [_leaf(gate, dtype), _leaf(up, dtype)], grad
    )


def norm_of_sum(x: Numbers, residual: Numbers, weight: Numbers, dtype: str) -> Numbers:
    """Paddle's fused norm of a sum: the norm, and the sum."""
    inputs = [paddle.to_tensor(one, dtype="float32").astype(dtype) for one in (x, weight, residual)]
    found = incubate.fused_rms_norm(
        inputs[0], inputs[1], None, 1e-5, begin_norm_axis=1, residual=inputs[2]
    )
    return [_numbers(found[0]), _numbers(found[1])]


def integer_product(
    x: Numbers, integers: Numbers, scale: Numbers, bits: int, dtype: str
) -> Numbers:
    """A product with integer weights by Paddle's operator."""
    stored = np.asarray(integers, np.int8), np.asarray(scale, np.float32)
    weight = weight_only.pack(*stored, bits=bits, dtype=dtype, architecture=90)
    found = weight_only.multiply(paddle.to_tensor(x, dtype="float32").astype(dtype), weight)
    return [_numbers(found)]


def adamw(weights: Numbers, grads: list[Numbers], dtype: str) -> list[Numbers]:
    """Two updates of a weight in half precision: it, and its master weight in float32."""
    linear = paddle.nn.Linear(len(weights), len(weights[0]), bias_attr=False)
    linear.weight.set_value(paddle.to_tensor(weights, dtype="float32"))
    optimizer = paddle.optimizer.AdamW(0.01, parameters=linear.parameters(), weight_decay=0.1)
    linear, optimizer = paddle.amp.decorate(linear, optimizer, level="O2", dtype=dtype)
    for grad in grads:
        linear.weight.grad = paddle.to_tensor(grad, dtype="float32").astype(dtype)
        optimizer.step()
    (master,) = optimizer._master_weights.values()
    return [_numbers(linear.weight), _numbers(master)]


def embedding(table: Numbers, rows: list[int], grad: Numbers, dtype: str) -> Numbers:
    """Rows of a table with the table's gradient."""
    found = paddle.to_tensor(rows)
    return with_gradients(lambda table: F.embedding(found, table), [_leaf(table, dtype)], grad)


def product(x: Numbers, y: Numbers, grad: Numbers, dtype: str) -> Numbers:
    """A matrix product with its gradients."""
    return with_gradients(paddle.matmul, [_leaf(x, dtype), _leaf(y, dtype)], grad)


def overflow() -> list[list[float]]:
    """Three updates in float16, whose second overflows: loss, scale and a sum of weights."""
    paddle.seed(0)
    layers = paddle.nn.Linear(8, 16), paddle.nn.Silu(), paddle.nn.Linear(16, 4)
    network = paddle.nn.Sequential(*layers)
    optimizer = paddle.optimizer.AdamW(0.01, parameters=network.parameters())
    network, optimizer = paddle.amp.decorate(network, optimizer, level="O2", dtype="float16")
    scaler = paddle.amp.GradScaler(init_loss_scaling=1024.0, decr_every_n_nan_or_inf=1)
    rows, seen = paddle.randn([5, 8]), []
    for factor in (1.0, 1e6, 1.0):
        with paddle.amp.auto_cast(level="O2", dtype="float16"):
            loss = (network(rows) ** 2).mean() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.clear_grad()
        weights = float(network[0].weight.astype("float32").abs().sum())
        seen.append([float(loss), float(scaler._scale), weights])
    return seen


def _attend(dtypes: str, shape: tuple[int, ...], keys: tuple[int, ...]) -> None:
    q_dtype, k_dtype = dtypes.split()
    q, k = paddle.ones(shape, q_dtype), paddle.ones(keys, k_dtype)
    paddle._C_ops.flash_attn(q, k, k, None, None, 0.0, True, False, False, "")


def _mask(bounds: Tensor) -> None:
    q = paddle.ones([1, 4, 2, 8], "bfloat16")
    paddle._C_ops.flashmask_attention(q, q, q, bounds, None, 0.0, True, False, False, "")


def _norm(x_dtype: str, weight_dtype: str, *, trained: bool = True) -> None:
    x, weight = _leaf([[1.0, 2.0]], x_dtype), _leaf([1.0, 2.0], weight_dtype)
    weight.stop_gradient = not trained
    incubate.fused_rms_norm(x, weight, None, 1e-5, begin_norm_axis=1)[0].sum().backward()


def _update(grad_dtype: str) -> None:
    half, full = paddle.ones([2], "bfloat16"), paddle.ones([1], "float32")
    moments = [paddle.zeros([2], "float32") for _ in range(2)]
    grad = paddle.ones([2], grad_dtype)
    powers, options = [full, full.clone()], [0.9, 0.999, 1e-8, 1.0, 0.1, True, False, 1000]
    paddle._C_ops.adamw_(
        half, grad, full, *moments, None, *powers, None, None, *options, True, False, False
    )


def _rotate(table: tuple[int, ...], dtype: str = "bfloat16") -> None:
    q, angles = paddle.ones([2, 4, 2, 8], "bfloat16"), paddle.ones(table, dtype)
    incubate.fused_rotary_position_embedding(q, sin=angles, cos=angles, use_neox_rotary_style=False)


def _integers(rows: int, columns: int, scale: tuple[str, int], group: int, arch: int) -> None:
    x, weight = paddle.ones([2, columns], "bfloat16"), paddle.ones([rows, columns], "int8")
    scales = paddle.ones([scale[1]], scale[0])
    paddle._C_ops.weight_only_linear(x, weight, None, scales, "int8", arch, group)


def _blocks(
    head: int = 32,
    block: int = 64,
    before: int = 3,
    most: int | None = None,
    lengths: str = "int32",
    angles: tuple[int, ...] | None = None,
    caches: str = "bfloat16",
    width: int = 1,
) -> None:
    def number(value: int, dtype: str = lengths, shape: tuple[int, ...] = (1,)) -> Tensor:
        return paddle.full(list(shape), value, dtype)

    def on_host(value: int) -> Tensor:
        return paddle.to_tensor([value], dtype="int32", place=paddle.CPUPlace())

    cache = [paddle.zeros([2, 1, block, head], caches) for _ in range(2)]
    starts = paddle.to_tensor([0, 1], dtype="int32")
    incubate.block_multihead_attention(
        paddle.ones([1, 4 * head], "bfloat16"),
        *cache,
        *(number(0, shape=(1, 1)), number(before, shape=(1, 1)), number(1, shape=(1, 1))),
        *(number(0), number(0), starts, starts, number(0, shape=(1, width))),
        max_enc_len_this_time=on_host(0),
        max_dec_len_this_time=on_host(before if most is None else most),
        rope_emb=None if angles is None else paddle.ones(angles),
        max_seq_len=16,
        block_size=block,
        use_neox_style=True,
    )


def _round(shape: tuple[int, int], **options: Any) -> None:
    incubate.fp8_quant_blockwise(paddle.ones(shape, "bfloat16"), **options)


def _multiply(left: bool, right: bool, columns: int = 256, padded: int = 4) -> None:
    """Multiply 128 x 256 with 128 x columns; true is scaled by rows, false by blocks."""

    def operand(by_rows: bool, columns: int) -> tuple[Tensor, Tensor]:
        numbers = paddle.ones([128, columns], "bfloat16")
        if by_rows:
            return incubate.fp8_quant_blockwise(numbers)
        options = {"quant_method": "128x128", "output_scale_transpose": False}
        rounded, scale = incubate.fp8_quant_blockwise(numbers, **options)
        return rounded, paddle.ones([1, padded]) if padded else scale

    sides = {"is_a_1d_scaled": left, "is_b_1d_scaled": right}
    both = operand(left, 256), operand(right, columns)
    incubate.fp8_gemm_blockwise(*both[0], *both[1], paddle.bfloat16, **sides)


SQUARE = (1, 4, 2, 8)
REFUSALS: dict[str, Callable[[], None]] = {
    "attention in float32": lambda: _attend("float32 float32", SQUARE, SQUARE),
    "keys of another type": lambda: _attend("bfloat16 float16", SQUARE, SQUARE),
    "heads of 12": lambda: _attend("bfloat16 bfloat16", (1, 4, 2, 12), (1, 4, 2, 12)),
    "heads of 264": lambda: _attend("bfloat16 bfloat16", (1, 4, 2, 264), (1, 4, 2, 264)),
    "3 heads for 2": lambda: _attend("bfloat16 bfloat16", (1, 4, 3, 8), SQUARE),
    "bounds in int64": lambda: _mask(paddle.ones([1, 1, 4, 1], "int64")),
    "three bounds": lambda: _mask(paddle.ones([1, 1, 4, 3], "int32")),
    "a weight of another type": lambda: _norm("bfloat16", "float32"),
    "a frozen weight": lambda: _norm("bfloat16", "bfloat16", trained=False),
    "no master weight": lambda: _update("bfloat16"),
    "tables of half a head": lambda: _rotate((1, 4, 1, 4)),
    "tables of each row": lambda: _rotate((2, 4, 1, 8)),
    "tables in float32": lambda: _rotate((1, 4, 1, 8), "float32"),
    "scales in float32": lambda: _integers(64, 64, ("float32", 64), -1, 90),
    "groups of 32": lambda: _integers(64, 64, ("bfloat16", 128), 32, 90),
    "an unknown GPU": lambda: _integers(64, 64, ("bfloat16", 64), -1, 120),
    "80 outputs": lambda: _integers(80, 64, ("bfloat16", 80), -1, 90),
    "blocks of 16": lambda: _blocks(block=16),
    "single tokens with heads of 8": lambda: _blocks(head=8),
    "lengths in int64": lambda: _blocks(lengths="int64"),
    "caches of another type": lambda: _blocks(caches="float16"),
    "angles of half a head": lambda: _blocks(angles=(2, 1, 16, 1, 16)),
    "a length past the longest": lambda: _blocks(before=5, most=4),
    "more scores than shared memory": lambda: _blocks(most=60000),
    "float8 of 100 columns": lambda: _round((128, 100)),
    "float8 of 100 rows, transposed": lambda: _round((100, 128), input_transpose=True),
    "float8 of 100 rows in blocks": lambda: _round((100, 128), quant_method="128x128"),
    "float8 blocks on both sides": lambda: _multiply(False, False),
    "float8 scales without padding": lambda: _multiply(True, False, padded=0),
    "float8 of other lengths": lambda: _multiply(True, True, columns=384),
}


def refusals() -> dict[str, str]:
    """Return what each case of :data:`REFUSALS` is refused with, or an empty string."""
    said = {}
    for name, case in REFUSALS.items():
        try:
            case()
            said[name] = ""
        except (RuntimeError, ValueError, OSError) as error:
            said[name] = str(error)
    return said


def several(name: str, calls: list[list[Any]]) -> list[Any]:
    """Return what a function of this module returns for several lists of arguments."""
    return [globals()[name](*arguments) for arguments in calls]
