"""The CUDA kernels of this suite on one GPU, in ten minutes at most: ``make gpu-kernels``.

Needs PyTorch and nvcc, not Paddle. Checks every kernel against float64, once more under
compute-sanitizer (memory, then races), and measures beside PyTorch's own (attention by SDPA,
cuBLAS) and a copy; rows go to ``benchmarks/results/cuda_ops.jsonl``. What ran out of its time is
said, and what fails does not stop the rest.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_ASK = "import torch; print(*torch.cuda.get_device_capability(), torch.cuda.get_device_name())"
_HARNESS = ("-m", "tests.native.torch_harness")
# Seconds of each step: together below ten minutes.
LIMITS = {"checks": 180, "memcheck": 120, "racecheck": 120, "benchmark": 170}


def commands(arch: str, python: str, sanitizer: str | None) -> dict[str, list[str]]:
    """Return what is run for a GPU, by step.

    Args:
        arch: compute capability without its point.
        python: an interpreter that has PyTorch.
        sanitizer: compute-sanitizer, where there is one.
    """
    check = [python, *_HARNESS, "--archs", arch]
    found = {"checks": check}
    if sanitizer is not None:
        for tool in ("memcheck", "racecheck"):
            found[tool] = [sanitizer, "--tool", tool, "--error-exitcode", "9", *check]
    bench = [python, "benchmarks/bench_cuda_ops.py", "--archs", arch, "--seconds", "0.1", "--write"]
    return found | {"benchmark": bench}


def run(step: str, command: Sequence[str]) -> str:
    """Run a step with its output on the terminal; return what went wrong, or an empty string."""
    try:
        status = subprocess.run(command, cwd=ROOT, timeout=LIMITS[step], check=False).returncode
    except subprocess.TimeoutExpired:
        return f"did not end within {LIMITS[step]} s"
    return f"ended with status {status}" if status else ""


def main() -> None:
    """Run all steps; the status is 1 where one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="an interpreter with PyTorch")
    python = parser.parse_args().python
    if shutil.which("nvcc") is None:
        sys.exit("error: no nvcc on the PATH; it comes with CUDA's toolkit (/usr/local/cuda/bin)")
    asked = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, check=False)
    if asked.returncode:
        last = (asked.stderr.strip().splitlines() or ["nothing"])[-1]
        sys.exit(f"error: {python} has no PyTorch that sees a GPU: {last}")
    major, minor, *name = asked.stdout.split()
    sanitizer = shutil.which("compute-sanitizer")
    print(f"{' '.join(name)}, sm_{major}{minor}; compute-sanitizer: {sanitizer or 'not there'}")
    wrong = []
    for step, command in commands(f"{major}{minor}", python, sanitizer).items():
        print(f"== {step}: {' '.join(command)}", flush=True)
        start = time.monotonic()
        why = run(step, command)
        print(f"== {step}: {why or 'ok'} ({time.monotonic() - start:.0f} s)", flush=True)
        wrong += [f"{step} {why}"] if why else []
    if wrong:
        sys.exit(f"failed: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
