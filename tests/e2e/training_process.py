"""Training runs as processes: started as a user would, and killed in the middle."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def environment():
    """Return this process's environment without the thread counts that pytest may run under.

    Beside other workers of pytest-xdist they stay: one thread each.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        return dict(os.environ)
    return {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def run(words, cwd, expect=0):
    """Run a command to its end."""
    done = subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, env=environment(), timeout=280, check=False
    )
    assert done.returncode == expect, done.stderr[-3000:] + done.stdout[-1000:]
    return done


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Call all at once; each should take one core. Return their results."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def kill_after(words, cwd, checkpoint):
    """Start a run and SIGKILL it as soon as a checkpoint is there."""
    process = subprocess.Popen(
        words, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    deadline = time.monotonic() + 200
    while not checkpoint.is_dir():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, f"no {checkpoint} within 200 s"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while left := _processes_with(str(checkpoint.parent)):
        assert time.monotonic() < deadline, f"worker processes {left} outlive the run"
        time.sleep(0.1)


def _processes_with(word):
    """Return the processes whose command line holds a word; forked workers have their parent's."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().decode().split("\0")
        except OSError:  # it has just ended
            continue
        if word in words:
            found.append(place.name)
    return found
