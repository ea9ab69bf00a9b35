"""Benchmarks start as the Makefile calls them: no PYTHONPATH says where the suite lies."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
CALLED = sorted(
    set(re.findall(r"BIN\)/python (benchmarks/\w+\.py)", (REPO / "Makefile").read_text("utf-8")))
)


def test_the_makefile_calls_benchmarks():
    assert "benchmarks/real.py" in CALLED and "benchmarks/quant_table.py" in CALLED


@pytest.mark.parametrize("script", CALLED)
def test_it_starts(script):
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, script, "--help"],
        cwd=REPO,
        env=alone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
