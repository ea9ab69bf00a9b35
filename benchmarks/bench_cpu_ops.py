"""What Paddle's CPU ops cost in the forms that the suite avoids and in those that it takes.

    python benchmarks/bench_cpu_ops.py [--threads N] [--repeats N] [--only NAME ...]

The reasons behind choices in external_ops, llm/llama and llm/runtime.py; docs/log.md quotes the
output. Each form runs in a process of its own, because flags and MKL's code path are read when
paddle is loaded; the forms of one case take turns, so that both meet the same neighbours.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from record import ROOT, environment, median, write_row

_TOKENS, _HIDDEN, _HEADS, _KV_HEADS, _HEAD = 2048, 512, 8, 4, 64
_BATCH, _LENGTH = 4, 512


def _normal(*shape: int) -> Any:
    import paddle

    return paddle.randn(shape)


def _transpose() -> Callable[[], Any]:
    x = _normal(_BATCH, _LENGTH, _HEADS, _HEAD)
    return lambda: x.transpose([0, 2, 1, 3]).contiguous()


def _rotate(expand: bool) -> Callable[[], Any]:
    x = _normal(_BATCH, _LENGTH, _HEADS, _HEAD // 2)
    cos = _normal(1, _LENGTH, 1, _HEAD // 2)
    return lambda: x * (cos.expand_as(x) if expand else cos)


def _gated(fused: bool) -> Callable[[], Any]:
    from paddle.nn import functional as F

    gate, up = _normal(_TOKENS, 1280), _normal(_TOKENS, 1280)
    return lambda: F.swiglu(gate, up) if fused else F.silu(gate) * up


def _attention(mode: str) -> Callable[[], Any]:
    from external_ops.backend import select_ops

    kernel = select_ops({"causal_attention": mode}, device="cpu").causal_attention
    shapes = [(_BATCH, _LENGTH, heads, _HEAD) for heads in (_HEADS, _KV_HEADS, _KV_HEADS)]
    return _with_gradient(kernel, [_normal(*shape) for shape in shapes])


def _rms_norm(mode: str, gradient: bool) -> Callable[[], Any]:
    from external_ops.backend import select_ops

    kernel = select_ops({"rms_norm": mode}, device="cpu").rms_norm
    inputs = [_normal(_TOKENS, _HIDDEN), _normal(_HIDDEN)]
    if gradient:
        return _with_gradient(lambda x, weight: kernel(x, weight, 1e-5), inputs)
    return lambda: kernel(*inputs, 1e-5)


def _row_sums(product: bool) -> Callable[[], Any]:
    import paddle

    x = _normal(_TOKENS, _HIDDEN)
    ones = paddle.ones([1, _TOKENS])
    return lambda: paddle.matmul(ones, x) if product else x.sum(axis=0)


def _with_gradient(kernel: Callable[..., Any], inputs: list[Any]) -> Callable[[], Any]:
    for tensor in inputs:
        tensor.stop_gradient = False

    def run() -> None:
        kernel(*inputs).sum().backward()
        for tensor in inputs:
            tensor.clear_gradient()

    return run


def _product() -> Callable[[], Any]:
    import paddle

    x, weight = _normal(512, 2048), _normal(2048, 5632)
    return lambda: paddle.matmul(x, weight)


@dataclass(frozen=True)
class Form:
    """One way of computing the same thing."""

    name: str
    prepare: Callable[[], Callable[[], Any]]
    environment: dict[str, str] = field(default_factory=dict)


CASES: dict[str, tuple[Form, Form]] = {
    "transpose 4x512x8x64": (
        Form(
            "FLAGS_use_stride_kernel=1, as it comes", _transpose, {"FLAGS_use_stride_kernel": "1"}
        ),
        Form("FLAGS_use_stride_kernel=0", _transpose, {"FLAGS_use_stride_kernel": "0"}),
    ),
    "matmul 512x2048x5632": (
        Form("MKL as it comes", _product, {"MKL_DEBUG_CPU_TYPE": ""}),
        Form("MKL_DEBUG_CPU_TYPE as runtime.py sets it", _product),
    ),
    "rotary product 4x512x8x32": (
        Form("broadcast the middle axis", lambda: _rotate(False)),
        Form("expand, then multiply", lambda: _rotate(True)),
    ),
    "column sums 2048x512": (
        Form("sum(axis=0)", lambda: _row_sums(False)),
        Form("product with ones", lambda: _row_sums(True)),
    ),
    "SwiGLU 2048x1280": (
        Form("nn.functional.swiglu", lambda: _gated(True)),
        Form("silu(gate) * up", lambda: _gated(False)),
    ),
    "RMSNorm 2048x512 forward": (
        Form("reference", lambda: _rms_norm("reference", False)),
        Form("fused", lambda: _rms_norm("fused", False)),
    ),
    "RMSNorm 2048x512 with gradient": (
        Form("reference", lambda: _rms_norm("reference", True)),
        Form("fused, own gradient", lambda: _rms_norm("fused", True)),
    ),
    "attention 4x512, 8/4 heads, with gradient": (
        Form("reference", lambda: _attention("reference")),
        Form("tiled", lambda: _attention("fused")),
    ),
}


def _work(case: str, form: int, threads: int) -> None:
    """Time the form once per line on standard input."""
    sys.path.insert(0, str(ROOT))
    from llm import runtime

    runtime.prepare(threads)
    runtime.load_paddle()
    run = CASES[case][form].prepare()
    for _ in range(3):
        run()
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            run()
        print((time.perf_counter() - start) / int(line), flush=True)


@contextmanager
def _worker(case: str, form: int, threads: int) -> Iterator[Callable[[int], float]]:
    """Yield a function that returns seconds per call, averaged over so many calls."""
    command = [sys.executable, __file__, "--threads", str(threads), "--work", case, str(form)]
    settings = CASES[case][form].environment
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings},
    )
    assert process.stdin is not None and process.stdout is not None

    def seconds(calls: int) -> float:
        process.stdin.write(f"{calls}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker of {case!r} ended with status {process.wait()}")
        return float(answer)

    try:
        yield seconds
    finally:
        process.stdin.close()
        process.wait()


def measure(case: str, threads: int, repeats: int) -> tuple[float, float]:
    """Return the median milliseconds per call of both forms, taken in turns."""
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(case, form, threads)) for form in (0, 1)]
        # About 20 ms a turn, so that the clock and the pipe do not count.
        calls = [max(1, round(0.02 / worker(1))) for worker in workers]
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            for taken, worker, count in zip(times, workers, calls, strict=True):
                taken.append(worker(count))
    return 1e3 * median(times[0]), 1e3 * median(times[1])


def main() -> None:
    """Measure every case, print a table, and append a row to the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=15, help="turns; the median counts")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        _work(options.work[0], int(options.work[1]), options.threads)
        return
    load = os.getloadavg()[0]
    measured = {}
    print("| case | slower form | ms | form that the suite takes | ms | times |")
    print("|---|---|---|---|---|---|")
    for case in options.only:
        first, second = measure(case, options.threads, options.repeats)
        names = [form.name for form in CASES[case]]
        measured[case] = {names[0]: round(first, 4), names[1]: round(second, 4)}
        ratio = first / second
        print(
            f"| {case} | {names[0]} | {first:.3g} | {names[1]} | {second:.3g} | {ratio:.1f} |",
            flush=True,
        )
    row = {
        **environment(),
        "threads": options.threads,
        "load_before": round(load, 2),
        "milliseconds": measured,
    }
    print(f"{json.dumps({k: v for k, v in row.items() if k != 'milliseconds'})}")
    print(f"written to {write_row('cpu_ops', row).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
