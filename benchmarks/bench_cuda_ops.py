"""The CUDA kernels beside PyTorch's, on one GPU; needs PyTorch and nvcc, not Paddle.

    python benchmarks/bench_cuda_ops.py [--archs 90] [--seconds 0.2] [--write]

Checks every kernel first. Forms of one case take turns; figures are medians of CUDA events around
batches of calls. Bandwidth is beside a copy of a tensor of the same size on the same device.
``--write`` appends the rows to ``benchmarks/results/cuda_ops.jsonl``.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import ROOT, environment, median, write_row

sys.path.insert(0, str(ROOT))
from tests.native.cuda_interface import CudaOps
from tests.native.torch_harness import build, check_probes, run_checks

Call = Callable[[], Any]


def interleave(forms: dict[str, Call], seconds: float) -> dict[str, float]:
    """Return each form's median seconds a call; forms take turns."""
    import torch

    def batch(call: Call, count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    counts = {}
    for name, call in forms.items():
        batch(call, 3)
        counts[name] = max(1, int(seconds / 10 / max(batch(call, 3), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(10):
        for name, call in forms.items():
            times[name].append(batch(call, counts[name]))
    return {name: median(values) for name, values in times.items()}


def bench_rms_norm(ops: CudaOps, seconds: float) -> list[dict[str, Any]]:
    """Measure gigabytes a second, forward and backward, beside a copy."""
    import torch

    rows = []
    for count, size in ((8192, 1024), (8192, 4096), (16384, 8192)):
        x, residual, grad = (
            torch.randn(count, size, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        )
        weight, other = torch.randn(size, device="cuda", dtype=torch.bfloat16), torch.empty_like(x)
        total, _, rstd = ops.rms_norm(x, residual, weight, 1e-5, "bfloat16")
        forms = {
            "copy": lambda a=x, b=other: b.copy_(a),
            "forward": lambda a=x, w=weight: ops.rms_norm(a, None, w, 1e-5, "bfloat16"),
            "forward_residual": lambda a=x, r=residual, w=weight: ops.rms_norm(
                a, r, w, 1e-5, "bfloat16"
            ),
            "backward": lambda a=total, w=weight, s=rstd, g=grad: ops.rms_norm_backward(
                a, w, s, g, None, "bfloat16"
            ),
        }
        tensors = {"copy": 2, "forward": 2, "forward_residual": 4, "backward": 4}
        took = interleave(forms, seconds)
        speed = {name: tensors[name] * x.nbytes / took[name] / 1e9 for name in forms}
        rows.append({"op": "rms_norm", "rows": count, "size": size, "gigabytes_per_second": speed})
    return rows


def _attention_rows(ops: CudaOps, length: int, size: int, seconds: float) -> list[dict[str, Any]]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    shape = max(1, 16384 // length), length, 2048 // size, size
    q, k, v, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    called = ops.attention(q, k, v, None, None, 0, "bfloat16")[2]
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    up = grad.transpose(1, 2)

    def peer(kind: SDPBackend) -> tuple[Call, Call]:
        def forward() -> None:
            with torch.no_grad(), sdpa_kernel(kind):
                sdpa(*leaves, is_causal=True)

        with sdpa_kernel(kind):
            out = sdpa(*leaves, is_causal=True)
        return forward, lambda: torch.autograd.grad(out, leaves, up, retain_graph=True)

    forms: dict[str, tuple[Call, Call]] = {
        "ours": (
            lambda: ops.attention(q, k, v, None, None, 0, "bfloat16"),
            lambda: ops.attention_backward(q, k, called, grad, "bfloat16"),
        )
    }
    for name, kind in (
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("flash2", SDPBackend.FLASH_ATTENTION),
    ):
        try:
            forms[name] = peer(kind)
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
    rows = []
    # Causal: half of the square, two products forward and five backward.
    flops = 2 * shape[0] * shape[2] * length * length * size / 2
    for index, (direction, products) in enumerate((("forward", 2), ("backward", 5))):
        took = interleave({name: pair[index] for name, pair in forms.items()}, seconds)
        speed = {name: products * flops / one / 1e12 for name, one in took.items()}
        rows.append({"op": f"attention_{direction}", "shape": list(shape), "tflops": speed})
    return rows


def bench_attention(ops: CudaOps, seconds: float) -> list[dict[str, Any]]:
    """Measure TFLOP/s, causal, beside PyTorch's attention by cuDNN and by FlashAttention 2."""
    rows = []
    for size in (64, 128):
        for length in (1024, 2048, 4096, 8192, 16384):
            rows += _attention_rows(ops, length, size, seconds)
    return rows


def bench_linear(ops: CudaOps, seconds: float) -> list[dict[str, Any]]:
    """Measure gigabytes of weights a second beside PyTorch's bf16 product."""
    import torch

    rows = []
    outputs, inputs = 11264, 4096
    dense = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
    for tokens in (1, 8, 16, 64, 512):
        x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
        forms: dict[str, Call] = {"torch_bf16": lambda x=x: x @ dense.T}
        for bits, groups in ((8, 1), (4, inputs // 128)):
            packed = torch.randint(0, 127, (outputs, inputs * bits // 8), device="cuda").to(
                torch.int8
            )
            scale = torch.rand(outputs, groups, device="cuda") / 100
            forms[f"int{bits}"] = lambda x=x, w=packed, s=scale, b=bits: ops.linear(
                x, w, s, None, b, "bfloat16"
            )
        took = interleave(forms, seconds)
        width = {"torch_bf16": 16, "int8": 8, "int4": 4}
        speed = {n: outputs * inputs * width[n] / 8 / took[n] / 1e9 for n in forms}
        tflops = {n: 2 * tokens * outputs * inputs / took[n] / 1e12 for n in forms}
        rows.append({"op": "linear", "tokens": tokens, "outputs": outputs, "inputs": inputs,
                     "weight_gigabytes_per_second": speed, "tflops": tflops})  # fmt: skip
    return rows


def main() -> None:
    """Check, measure, print and keep the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--archs", nargs="+", default=["90"], help="architectures to build for")
    parser.add_argument("--seconds", type=float, default=0.2, help="per form and case")
    parser.add_argument("--write", action="store_true", help="append to benchmarks/results")
    options = parser.parse_args()
    import torch

    with tempfile.TemporaryDirectory() as directory:
        ops = build(options.archs, Path(directory) / "cuda.so")
        check_probes(ops)
        checked = run_checks(ops)
        ops.arrays.fill = False
        machine = {"device": torch.cuda.get_device_name(), "checked": checked}
        machine |= environment(("torch",))
        for measure in (bench_rms_norm, bench_attention, bench_linear):
            for row in measure(ops, options.seconds):
                print(row)
                if options.write:
                    write_row("cuda_ops", machine | row)


if __name__ == "__main__":
    main()
