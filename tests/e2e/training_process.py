"""Training runs as processes: started as a user would, and killed in the middle."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.distributed.forked_scripts import ForkedScript


def environment():
    """Return this process's environment without the thread counts that pytest may run under.

    Beside other workers of pytest-xdist they stay: one thread each.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        return dict(os.environ)
    return {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def run(words, cwd, expect=0, ranks=None):
    """Run a command to its end, as a fork of the rank server where one is given."""
    if ranks is not None:
        done = ForkedScript(ranks, words[1:], cwd).read()
    else:
        done = subprocess.run(
            [str(word) for word in words],
            cwd=cwd,
            capture_output=True,
            text=True,
            env=environment(),
            timeout=280,
            check=False,
        )
    assert done.returncode == expect, done.stderr[-3000:] + done.stdout[-1000:]
    return done


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Call all at once; each should take one core. Return their results."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def kill_after(words, cwd, checkpoint, ranks=None):
    """Start a run as :func:`run` does and SIGKILL it as soon as a checkpoint is there."""
    if ranks is not None:
        process = ForkedScript(ranks, words[1:], cwd)
    else:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(
            words, cwd=cwd, env=environment(), start_new_session=True, **quiet
        )
    deadline = time.monotonic() + 200
    while not checkpoint.is_dir():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, f"no {checkpoint} within 200 s"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while left := _processes_of(process.pid):
        assert time.monotonic() < deadline, f"worker processes {left} outlive the run"
        time.sleep(0.1)


def _processes_of(group):
    """Return the processes of a group, which those that a run starts belong to."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            # The name, in brackets, may hold spaces: state, parent and group follow it.
            figures = (place / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(figures[2]) == group and figures[0] != "Z":
            found.append(place.name)
    return found
