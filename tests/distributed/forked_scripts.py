"""Scripts run as forks of the rank server, which has imported paddle already.

To a script it looks as if the shell had started it: command line, directory, standard streams, a
process group of its own, what runs at exit. It skips the imports, 3 s of them for inference and 9 s
for training.
"""

import atexit
import ctypes
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import TYPE_CHECKING, Any

from common.ending import end_at_once
from llm import runtime

if TYPE_CHECKING:
    from tests.distributed.rank_server import RankServer


_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def fork(words: list[str], cwd: str, streams: list[str]) -> int:
    """Fork the calling process, which becomes ``python WORDS``; return its id.

    Args:
        words: a script and its arguments, or ``-m``, a module and its arguments.
        cwd: the directory to start in.
        streams: files that standard output and standard error go to.
    """
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    child = os.fork()
    if child:
        os.setpgid(child, child)
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        return child
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # A script's first import does that, which this process has had before.
        signal.signal(signal.SIGINT, end_at_once)
    os.setpgid(0, 0)
    die_with_parent()
    status = 1
    try:
        _open_streams(streams)
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        status = _run(words, cwd)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _open_streams(files: list[str]) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)


def _run(words: list[str], cwd: str) -> int:
    """Run ``python WORDS`` in a directory to its end; return the exit status."""
    # What prepare() sets has to be set before paddle is imported; the rank server did that.
    runtime.prepare = lambda *_, **__: 1
    try:
        os.chdir(cwd)
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            sys.stderr.write(f"{stop.code}\n")
    except BaseException:  # noqa: BLE001  (as the interpreter does)
        traceback.print_exc()
        status = 1
    # As the interpreter does when its main thread ends.
    threading._shutdown()
    atexit._run_exitfuncs()
    return status


class ForkedScript:
    """A script that was started, with the face of :class:`subprocess.Popen`."""

    def __init__(self, server: "RankServer", words: list[Any], cwd: Path) -> None:
        self._server = server
        self._directory = tempfile.TemporaryDirectory(prefix="script-")
        self._files = [Path(self._directory.name) / name for name in ("stdout", "stderr")]
        self.args = [str(word) for word in words]
        files = [str(file) for file in self._files]
        self.pid = server.ask({"script": [self.args, str(cwd), files]}, timeout=30)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid}, timeout=30)
        return self.returncode

    def wait(self, timeout: float = 280) -> int:
        """Wait for the end; return the exit status.

        Raises:
            TimeoutExpired: it did not end; it is killed.
        """
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                raise TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal to the script, not to what it started."""
        os.kill(self.pid, number)

    def read(self) -> CompletedProcess[str]:
        """Wait; return exit status and output."""
        status = self.wait()
        said = [file.read_text(encoding="utf-8", errors="replace") for file in self._files]
        self._directory.cleanup()
        return CompletedProcess(self.args, status, *said)
