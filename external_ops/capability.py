"""What each op computes in on the devices of this machine: tried out, not looked up.

An op's form runs once in each floating type, forward and backward, on small numbers, and is
compared with the reference in float32 on the same device. Half-precision results may differ by
their rounding. What a form refuses, it says why.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from external_ops import devices
from external_ops.backend import FORMS, Choice, in_columns, select_ops
from external_ops.low_rank import LowRank, LowRankStep, Piece
from external_ops.sampling import Settings

DTYPES = ("float32", "bfloat16", "float16")
# Of the largest number of a result; the sums are over some ten products.
TOLERANCES = {"float32": 1e-5, "bfloat16": 4e-2, "float16": 5e-3}
Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Capability:
    """What one op does on one kind of device.

    Args:
        choice: the form that ``auto`` takes, and why.
        dtypes: types in which it gave the reference's numbers.
        refused: what was said of the others, by type.
    """

    choice: Choice
    dtypes: tuple[str, ...]
    refused: dict[str, str]


class _Numbers:
    """Random tensors of a type, the same in every type but for rounding."""

    def __init__(self, dtype: str) -> None:
        self.dtype, self._random = dtype, np.random.default_rng(3)
        self.made: list[Tensor] = []

    def __call__(self, *shape: int, trained: bool = True) -> Tensor:
        numbers = self._random.uniform(-1, 1, shape).astype(np.float32)
        tensor = paddle.to_tensor(numbers).astype(self.dtype)
        tensor.stop_gradient = not trained
        if trained:
            self.made.append(tensor)
        return tensor

    def with_gradients(self, *results: Tensor) -> list[Tensor]:
        """Return results and the gradients of their sum by everything that is trained."""
        total = sum(result.astype("float32").square().sum() for result in results)
        gradients = paddle.grad([total], self.made)
        return [*results, *gradients]


def _rms_norm(kernel: Kernel, numbers: _Numbers) -> list[Tensor]:
    return numbers.with_gradients(kernel(numbers(2, 5, 32), numbers(32), 1e-5))


def _add_rms_norm(kernel: Kernel, numbers: _Numbers) -> list[Tensor]:
    found = kernel(numbers(2, 5, 32), numbers(2, 5, 32), numbers(32), 1e-5)
    return numbers.with_gradients(*found)


def _rotary(kernel: Kernel, numbers: _Numbers) -> list[Tensor]:
    x, angles = numbers(1, 5, 4, 16), numbers(1, 5, 1, 8, trained=False).astype("float32")
    tables = [table.astype(x.dtype) for table in (paddle.cos(angles), paddle.sin(angles))]
    return numbers.with_gradients(kernel(x, *tables))


def _swiglu(kernel: Kernel, numbers: _Numbers) -> list[Tensor]:
    return numbers.with_gradients(kernel(numbers(2, 5, 32), numbers(2, 5, 32)))


def _causal_attention(kernel: Kernel, numbers: _Numbers) -> list[Tensor]:
    q, k, v = numbers(1, 7, 4, 16), numbers(1, 7, 2, 16), numbers(1, 7, 2, 16)
    return numbers.with_gradients(kernel(q, k, v))


def _paged_attention(kernel: Kernel, numbers: _Numbers) -> list[Tensor]:
    q, k, v = (numbers(5, heads, 16, trained=False) for heads in (4, 2, 2))
    caches = [paddle.zeros([4, 4, 2, 16], numbers.dtype) for _ in "kv"]
    table = paddle.to_tensor([[2, 0], [1, 3]], "int32")
    owner, place = ([0, 0, 0, 0, 0], [0, 1, 2, 3, 4])
    with paddle.no_grad():
        found = kernel(
            q, k, v, *caches, table[:1], *(paddle.to_tensor(one, "int32") for one in (owner, place))
        )
    return [found, *caches]


def _cross_entropy(kernel: Kernel, numbers: _Numbers) -> list[Tensor]:
    labels = paddle.to_tensor([1, -100, 3], "int64")
    losses, _ = kernel(numbers(3, 16), numbers(16, 8), labels)
    return numbers.with_gradients(losses)


def _adamw(kernel: Kernel, numbers: _Numbers) -> list[Tensor]:
    weight = paddle.create_parameter(
        [4, 8], numbers.dtype, default_initializer=paddle.nn.initializer.Constant(0.0)
    )
    weight.set_value(numbers(4, 8, trained=False))
    half = numbers.dtype != "float32"
    made = kernel(learning_rate=0.1, weight_decay=0.1, parameters=[weight], multi_precision=half)
    weight.grad = numbers(4, 8, trained=False)
    made.step()
    return [weight]


def _frozen_matmul(kernel: Kernel, numbers: _Numbers) -> list[Tensor]:
    matrix = numbers(16, 8, trained=False).astype("bfloat16")
    return numbers.with_gradients(kernel(numbers(3, 16), matrix))


def _sample(kernel: Kernel, numbers: _Numbers) -> list[Tensor]:
    logits = numbers(3, 16, trained=False).astype("float32")
    how = [Settings(0.0), Settings(0.7, top_k=4, place=0.4), Settings(top_p=0.8, place=0.9)]
    return [paddle.to_tensor(one) for one in kernel(logits, [None] * 3, how)]


def _low_rank(kernel: Kernel, numbers: _Numbers) -> list[Tensor]:
    # Its own types are those of the adapter's numbers.
    x, out = (numbers(3, size, trained=False).astype("float32") for size in (16, 8))
    a, b = (numbers(2, size, trained=False).astype("float32").numpy() for size in (16, 8))
    adapter = LowRank([Piece(0, 0, a, b, 2.0)], numbers.dtype)
    return [kernel(x, out, LowRankStep([adapter], np.array([0, -1, 0], np.int32)), linear=0)]


CASES: dict[str, Callable[[Kernel, _Numbers], list[Tensor]]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rotary": _rotary,
    "swiglu": _swiglu,
    "causal_attention": _causal_attention,
    "paged_attention": _paged_attention,
    "cross_entropy": _cross_entropy,
    "adamw": _adamw,
    "sample": _sample,
    "frozen_matmul": _frozen_matmul,
    "low_rank": _low_rank,
}


def _results(op: str, kernel: Kernel, dtype: str) -> list[np.ndarray]:
    found = CASES[op](kernel, _Numbers(dtype))
    return [one.astype("float32").numpy() for one in found]


def _why_not(op: str, kernel: Kernel, dtype: str, expected: list[np.ndarray]) -> str:
    """Return why a form does not compute in a type, or an empty string."""
    try:
        found = _results(op, kernel, dtype)
    except (RuntimeError, OSError, ValueError, TypeError, NotImplementedError) as error:
        return devices.summary(error)
    for one, wanted in zip(found, expected, strict=True):
        far = float(np.abs(one - wanted).max() / max(1.0, float(np.abs(wanted).max())))
        if not far <= TOLERANCES[dtype]:
            return f"differs by {far:.1e} from the reference in float32"
    return ""


def capabilities(kind: str) -> Iterator[Capability]:
    """Yield what each op does on the current device, which is of this kind.

    Args:
        kind: as :func:`external_ops.devices.current` says it.
    """
    assert kind == devices.current(), kind
    ops = select_ops(device=kind)
    for choice in ops.choices:
        kernel: Kernel | None = getattr(ops, choice.op)
        if kernel is None or choice.op not in CASES:
            yield Capability(choice, (), {})
            continue
        reference = FORMS[choice.op].reference
        assert reference is not None, choice.op
        expected = _results(choice.op, reference, "float32")
        said = {dtype: _why_not(choice.op, kernel, dtype, expected) for dtype in DTYPES}
        fit = tuple(dtype for dtype, why in said.items() if not why)
        yield Capability(choice, fit, {dtype: why for dtype, why in said.items() if why})


def table(kind: str) -> str:
    """Return rows of op, form, level, types and reason for the current device, in columns.

    Below them, what refused types said.
    """
    found = list(capabilities(kind))
    rows = [("op", "form", "level", "types", "why")]
    for one in found:
        took = one.choice
        rows.append((took.op, took.form, took.level, " ".join(one.dtypes) or "-", took.why))
    notes = [
        f"{one.choice.op} not in {dtype}: {why}"
        for one in found
        for dtype, why in one.refused.items()
    ]
    return "\n".join([in_columns(rows), *notes])
