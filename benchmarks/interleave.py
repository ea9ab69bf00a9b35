"""Worker processes that take turns, so that what is compared meets the same neighbours.

A worker is this program again with ``--role``: it makes a case when it is first asked for it and
answers each request, a line of JSON, with a line of JSON. Cases are functions without arguments.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Run = Callable[[], Any]
# A turn lasts at least so long, so that the clock and the pipe do not count.
TURN_S = 0.03
_PATIENCE_S = 5.0


def resident() -> dict[str, int]:
    """Return this process's memory now and at its highest, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {name: int(found[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def serve(make: Callable[[str], Run]) -> None:
    """Answer requests until standard input ends.

    Args:
        make: returns what a case runs; the previous case's is freed before.
    """
    current: str | None = None
    run: Run = lambda: None  # noqa: E731
    print(json.dumps("ready"), file=_answers(), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["case"] != current:
            run = lambda: None  # noqa: E731
            gc.collect()
            current, run = request["case"], make(request["case"])
        if request["want"] == "peak":
            _forget_peak()
            before = resident()["VmRSS"]
            run()
            answer: Any = resident()["VmHWM"] - before
        elif request["want"] == "value":
            answer = run()
        else:
            start = time.perf_counter()
            for _ in range(request["calls"]):
                run()
            answer = (time.perf_counter() - start) / request["calls"]
        print(json.dumps(answer), file=_answers(), flush=True)


_STREAM: list[Any] = []


def _answers() -> Any:
    """Return a stream that nothing else writes to: libraries print to standard output."""
    if not _STREAM:
        _STREAM.append(os.fdopen(os.dup(1), "w"))
        os.dup2(2, 1)
    return _STREAM[0]


class Worker:
    """The parent's side of a worker, which Ctrl-C does not reach: the parent ends it.

    Args:
        name: what messages call it.
        command: of the process.
        environment: variables beside the parent's.
        errors: file that gets what it writes to standard error; the parent's when not given.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        environment: dict[str, str],
        errors: Path | None = None,
    ) -> None:
        self.name, self._errors = name, errors
        with (Path(os.devnull) if errors is None else errors).open("wb") as stream:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if errors is None else stream,
                text=True,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self._calls: dict[str, int] = {}
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            message = f"the worker {self.name} ended with {self._process.wait()}"
            if self._errors is not None:
                last = self._errors.read_text("utf-8", "replace").strip().splitlines()[-1:]
                message = "; ".join([message, *last, f"all it said is in {self._errors}"])
            raise SystemExit(message)
        return json.loads(line)

    def _ask(self, case: str, want: str, calls: int = 1) -> Any:
        assert self._process.stdin is not None
        request = {"case": case, "want": want, "calls": calls}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def seconds(self, case: str, calls: int | None = None) -> float:
        """Return seconds per call.

        Args:
            case: what to run.
            calls: how many; when not given, the first time for a case warms up and finds out.
        """
        if calls is not None:
            self._calls[case] = calls
        elif case not in self._calls:
            once = self._ask(case, "seconds")
            if once < 1:
                once = self._ask(case, "seconds")
            self._calls[case] = max(1, round(TURN_S / once))
        return self._ask(case, "seconds", self._calls[case])

    def value(self, case: str) -> Any:
        """Return what a case returns."""
        return self._ask(case, "value")

    def peak(self, case: str) -> int:
        """Return the bytes that one call adds at its highest to what it starts with."""
        return self._ask(case, "peak")

    def close(self) -> None:
        """End the process; one that is in the middle of something is not waited for."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@contextmanager
def workers(commands: dict[str, list[str]], threads: int) -> Iterator[dict[str, Worker]]:
    """Start workers, all with the same number of threads, and end them."""
    own = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = dict.fromkeys(own, str(threads)) | {"HF_HUB_OFFLINE": "1"}
    started: dict[str, Worker] = {}
    try:
        for name, command in commands.items():
            started[name] = Worker(name, command, environment)
        yield started
    finally:
        for worker in started.values():
            worker.close()
