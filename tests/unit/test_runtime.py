"""Process settings before paddle is imported."""

import os
import subprocess
import sys

import pytest

NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
SCRIPT = f"""
import os
from llm import runtime
runtime.prepare(3)
print([os.environ.get(name) for name in {NAMES}])
"""


@pytest.mark.parametrize(
    ("exported", "expected"),
    [
        ({}, ["3", "3", "PASSIVE", "1"]),
        ({"KMP_BLOCKTIME": "7"}, ["3", "3", "PASSIVE", "7"]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ["3", "3", "ACTIVE", None]),
    ],
    ids=str,
)
def test_how_idle_threads_wait_unless_exported(repo, exported, expected):
    environment = {k: v for k, v in os.environ.items() if k not in NAMES} | exported
    command = [sys.executable, "-c", SCRIPT]
    found = subprocess.run(
        command, cwd=repo, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    assert found.stdout.strip() == str(expected)
