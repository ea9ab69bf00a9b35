"""What Paddle's shape inference says of the operators of GPUs at the sizes of real models."""

from typing import Any

import paddle
from paddle import Tensor
from paddle.incubate.nn import functional as incubate
from paddle.nn.functional.flash_attention import flash_attn_unpadded

from external_ops import rotary, swiglu
from external_ops.block_decoder import StepPlan, attend_blocks

# Hidden, query heads, key heads, feed-forward: Llama 3 8B and 70B.
SIZES = {"8B": (4096, 32, 8, 14336), "70B": (8192, 64, 8, 28672)}
_D, _T, _N, _BLOCK = 128, 24, 4, 64


def _data(name: str, shape: list[int], dtype: str = "bfloat16") -> Tensor:
    tensor: Tensor = paddle.static.data(name, shape, dtype)
    return tensor


def _attention(heads: int, groups: int) -> Tensor:
    numbers = {"fresh": [_N, 1], "before": [_N, 1], "now": [_N, 1], "padding": [_T]}
    numbers |= {"offsets": [_N], "starts": [_N + 1], "starts_k": [_N + 1], "table": [_N, 16]}
    kernel = tuple(_data(name, shape, "int32") for name, shape in numbers.items())
    longest = (_data("most_fresh", [1], "int32"), _data("most_before", [1], "int32"))
    caches = (_data(f"cache_{kind}", [64, groups, _BLOCK, _D]) for kind in "kv")
    qkv = _data("qkv", [_T, (heads + 2 * groups) * _D])
    rope = _data("rope", [2, 1, 1024, 1, _D], "float32")
    return attend_blocks(qkv, *caches, StepPlan(kernel, longest, (), 1024), rope)


def _unpadded(heads: int, groups: int) -> Tensor:
    q, k = _data("q", [_T, heads, _D]), _data("k", [_T, groups, _D])
    starts = _data("starts_q", [_N + 1], "int32")
    return flash_attn_unpadded(q, k, k, starts, starts, _T, _T, _D**-0.5, causal=True)[0]


def _integers(inputs: int, outputs: int, kind: str, group: int) -> Tensor:
    rows = outputs if kind == "int8" else outputs // 2
    scale = [outputs] if group < 0 else [inputs // group, outputs]
    x, weight = (
        _data(f"x{kind}{group}", [_T, inputs]),
        _data(f"w{kind}{group}", [rows, inputs], "int8"),
    )
    scales = _data(f"s{kind}{group}", scale)
    return paddle._C_ops.weight_only_linear(x, weight, None, scales, kind, 90, group)


def inferred(size: str) -> dict[str, Any]:
    """Return shape and type of each operator's result, by operator."""
    hidden, heads, groups, ffn = SIZES[size]
    paddle.enable_static()
    with paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
        x, residual, weight = (
            _data(n, s) for n, s in (("x", [_T, hidden]), ("r", [_T, hidden]), ("w", [hidden]))
        )
        table = [_data(name, [1, 512, 1, _D // 2]) for name in ("cos", "sin")]
        found = {
            "block_multihead_attention": _attention(heads, groups),
            "flash_attn_unpadded": _unpadded(heads, groups),
            "rotary": rotary.rotary_gpu(_data("rows", [2, 512, heads, _D]), *table),
            "swiglu": swiglu.swiglu_gpu(_data("gate", [_T, ffn]), _data("up", [_T, ffn])),
            "swiglu joined": paddle.nn.functional.swiglu(_data("gate_up", [_T, 2 * ffn])),
            "norm of a sum": incubate.fused_rms_norm(
                x, weight, None, 1e-5, begin_norm_axis=1, residual=residual
            )[0],
            "int8": _integers(hidden, 2 * ffn, "int8", -1),
            "int4": _integers(ffn, hidden, "int4", -1),
            "int4 in groups": _integers(hidden, (heads + 2 * groups) * _D, "int4", 128),
        }
        seen = {name: [list(one.shape), str(one.dtype)] for name, one in found.items()}
    paddle.disable_static()
    return seen
