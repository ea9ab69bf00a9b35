"""Paddle's operators in half precision, which it has on GPUs only: widened, computed and rounded.

Like the kernels of a GPU they take tensors of one type, and give that type back. They show which
types meet, and roughly the numbers; not what a GPU's own kernels round.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import paddle
import pytest
from paddle import Tensor
from paddle.nn import functional as F

HALF = (paddle.bfloat16, paddle.float16)
# Those without a kernel for these types on a CPU, of the ones that our references call.
OPERATORS = ((paddle, ("matmul", "scatter", "gather")), (F, ("softmax",)))


def _alike(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        floating = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
        types = {tensor.dtype for tensor in floating}
        assert len(types) < 2, f"{name} of {[str(tensor.dtype) for tensor in floating]}"
        if not types & set(HALF):
            return operator(*arguments, **options)
        wide = [
            a.astype("float32") if isinstance(a, Tensor) and a.is_floating_point() else a
            for a in arguments
        ]
        return operator(*wide, **options).astype(types.pop())

    return call


@contextmanager
def half_kernels() -> Iterator[None]:
    """Let a CPU run forward passes in float16 and bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in OPERATORS:
            for name in names:
                patch.setattr(owner, name, _alike(name, getattr(owner, name)))
        yield
