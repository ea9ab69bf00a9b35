"""The cases of bench_ops.py on PyTorch."""

import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from interleave import Run, serve
from ops_cases import CASES, Case, weights_for
from torch.nn import functional as F


def _with_gradient(function: Callable[..., Any], inputs: list[Any], backward: bool) -> Run:
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                function(*inputs)

        return forward
    for tensor in inputs:
        tensor.requires_grad_()
    out = function(*inputs)
    gradient = torch.randn_like(out)

    class Given(torch.autograd.Function):
        """Hands the gradient on, as a layer behind would; as in ops_ours.py."""

        @staticmethod
        def forward(ctx: Any, out: torch.Tensor) -> torch.Tensor:
            return torch.zeros(1)

        @staticmethod
        def backward(ctx: Any, one: torch.Tensor) -> torch.Tensor:
            return gradient

    end = Given.apply(out)
    return lambda: torch.autograd.grad(end, inputs, retain_graph=True)


def _rms_norm(case: Case, dtype: torch.dtype) -> Run:
    rows, size = case.sizes
    inputs = [torch.randn(rows, size, dtype=dtype), torch.randn(size, dtype=dtype)]
    return _with_gradient(lambda x, w: F.rms_norm(x, [size], w, 1e-5), inputs, case.backward)


def _attention(case: Case, dtype: torch.dtype) -> Run:
    length, heads, size = case.sizes
    inputs = [torch.randn(1, heads, length, size, dtype=dtype) for _ in range(3)]
    attend = F.scaled_dot_product_attention
    return _with_gradient(lambda *qkv: attend(*qkv, is_causal=True), inputs, case.backward)


def _paged(case: Case, dtype: torch.dtype) -> Run:
    """Attention over a whole prompt; PyTorch has no paged cache on CPUs."""
    length, heads, groups, size = case.sizes
    q, k, v = (torch.randn(1, n, length, size, dtype=dtype) for n in (heads, groups, groups))
    attend = F.scaled_dot_product_attention
    return lambda: attend(q, k, v, is_causal=True, enable_gqa=True)


def _prompt(case: Case, dtype: torch.dtype) -> Run:
    """A layer over a whole prompt, without rotary angles."""
    length, hidden, ffn, heads, groups, size = case.sizes
    rows = [(heads + 2 * groups) * size, hidden, 2 * ffn, hidden]
    columns = [hidden, heads * size, hidden, ffn]
    qkv, o, gate_up, down = (
        torch.randn(*shape, dtype=dtype) * 0.02 for shape in zip(rows, columns, strict=True)
    )
    x, norm = torch.randn(length, hidden, dtype=dtype), torch.ones(hidden, dtype=dtype)

    @torch.no_grad()
    def run() -> None:
        made = F.linear(F.rms_norm(x, [hidden], norm, 1e-5), qkv).view(1, length, -1, size)
        parts = made.transpose(1, 2).split([heads, groups, groups], 1)
        found = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        total = x + F.linear(found.transpose(1, 2).reshape(length, -1), o)
        gate, up = F.linear(F.rms_norm(total, [hidden], norm, 1e-5), gate_up).chunk(2, -1)
        total + F.linear(F.silu(gate) * up, down)

    return run


def _linear(case: Case, dtype: torch.dtype) -> Run:
    rows, inputs, outputs = case.sizes
    size = inputs * outputs * dtype.itemsize
    weights = [torch.randn(outputs, inputs, dtype=dtype) for _ in range(weights_for(size))]
    x, turn = torch.randn(rows, inputs, dtype=dtype), itertools.cycle(weights)
    return lambda: F.linear(x, next(turn))


def _swiglu(case: Case, dtype: torch.dtype) -> Run:
    inputs = [torch.randn(case.sizes, dtype=dtype) for _ in range(2)]
    return _with_gradient(lambda gate, up: F.silu(gate) * up, inputs, case.backward)


def _rotary(case: Case, dtype: torch.dtype) -> Run:
    """As transformers writes it, in its layout."""
    length, heads, size = case.sizes
    angles = torch.randn(1, 1, length, size // 2).repeat(1, 1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    x = torch.randn(1, heads, length, size, dtype=dtype)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x[..., : size // 2], x[..., size // 2 :]
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return _with_gradient(rotate, [x], case.backward)


def _cross_entropy(case: Case, dtype: torch.dtype) -> Run:
    rows, hidden, vocabulary = case.sizes
    x = (torch.randn(rows, hidden) * 0.1).requires_grad_()
    weight = (torch.randn(vocabulary, hidden) * 0.1).requires_grad_()
    labels = torch.randint(0, vocabulary, [rows])

    def run() -> None:
        loss = F.cross_entropy(F.linear(x, weight), labels, reduction="sum")
        torch.autograd.grad(loss, [x, weight])

    return run


def _adamw(case: Case, dtype: torch.dtype) -> Run:
    (size,) = case.sizes
    parameters = [torch.rand(1 << 20, requires_grad=True) for _ in range(size // (1 << 20))]
    for parameter in parameters:
        parameter.grad = torch.rand(1 << 20)
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    return optimizer.step


FAMILIES = {
    "rms_norm": _rms_norm,
    "attention": _attention,
    "paged": _paged,
    "prompt": _prompt,
    "linear": _linear,
    "frozen": _linear,
    "linear_kernel": _linear,
    "swiglu": _swiglu,
    "rotary": _rotary,
    "cross_entropy": _cross_entropy,
    "adamw": _adamw,
}


def main(threads: int, dtype: str) -> None:
    """Serve the cases in one type."""
    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    serve(lambda name: FAMILIES[CASES[name].family](CASES[name], kind))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
