"""``make device`` where there is no compiler."""

import os
import subprocess
import sys


def test_without_a_compiler_one_line_says_so(repo):
    command = [sys.executable, str(repo / "tests" / "device" / "build.py")]
    environment = os.environ | {"CXX": "no-such-compiler"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert "no-such-compiler" in done.stdout
