"""What `make gpu-kernels` runs, rehearsed with programs that write down what they are asked."""

import os
import subprocess
import sys

import pytest

from benchmarks import gpu_kernels

RECORD = """#!{python}
import sys
words = sys.argv[1:]
if words[0] == "-c":
    print("9 0 Some GPU")
else:
    with open({log!r}, "a") as log:
        print(*words, file=log)
sys.exit(9 if {fails!r} and {fails!r} in words else 0)
"""


@pytest.fixture
def machine(tmp_path, repo):
    """``machine(fails)``: run everything with stand-ins; status, output, what was asked."""

    def run(*tools, fails=""):
        log = tmp_path / "log"
        for name in ("python", *tools):
            program = tmp_path / name
            text = RECORD.format(python=sys.executable, log=str(log), fails=fails)
            program.write_text(text, encoding="utf-8")
            program.chmod(0o755)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu_kernels", "--python", str(tmp_path / "python")],
            cwd=repo,
            env=os.environ | {"PATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        asked = log.read_text("utf-8").splitlines() if log.exists() else []
        return done.returncode, done.stdout + done.stderr, asked

    return run


CHECK = "-m tests.native.torch_harness --archs 90"
BENCH = "benchmarks/bench_cuda_ops.py --archs 90 --seconds 0.1 --write"


def test_all_steps_in_their_order(machine):
    status, said, asked = machine("nvcc", "compute-sanitizer")
    assert status == 0 and "Some GPU, sm_90" in said
    tools = [f"--tool {tool} --error-exitcode 9" for tool in ("memcheck", "racecheck")]
    first, *sanitized, last = asked
    assert (first, last) == (CHECK, BENCH)
    assert [line.partition(" /")[0] for line in sanitized] == tools
    assert all(line.endswith(CHECK) for line in sanitized)


def test_what_fails_stops_nothing(machine):
    status, said, asked = machine("nvcc", "compute-sanitizer", fails="racecheck")
    assert status == 1 and len(asked) == 4
    assert said.splitlines()[-1] == "failed: racecheck ended with status 9"


def test_what_is_missing_is_said(machine):
    assert machine() == (
        1,
        "error: no nvcc on the PATH; it comes with CUDA's toolkit (/usr/local/cuda/bin)\n",
        [],
    )
    status, said, asked = machine("nvcc")
    assert status == 0 and asked == [CHECK, BENCH] and "compute-sanitizer: not there" in said
    status, said, _ = machine("nvcc", fails="-c")
    assert status == 1 and "has no PyTorch that sees a GPU: nothing" in said


def test_ten_minutes_at_most(monkeypatch):
    assert sum(gpu_kernels.LIMITS.values()) <= 600
    monkeypatch.setitem(gpu_kernels.LIMITS, "checks", 0.2)
    sleep = [sys.executable, "-c", "import time; time.sleep(5)"]
    assert gpu_kernels.run("checks", sleep) == "did not end within 0.2 s"
