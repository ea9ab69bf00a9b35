"""What a job does when one of its processes dies, fails, hangs or is told to stop.

Collectives wait for ever, or for half an hour, for a rank that is gone, and then every rank prints
a failure of its own. With :func:`guard` the job ends within seconds of the first failure, and says
once which rank on which host failed, and why; a job that does not finish a step in time says where
each rank is. SIGTERM, which schedulers send before they take a machine away, only sets a flag that
all ranks see at the same step.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

from common.errors import UserError
from llm.parallel import sentry
from llm.parallel.gloo.links import CollectiveError
from llm.parallel.topology import Topology

EXIT_CODE = 75  # of ranks that end because another one failed; EX_TEMPFAIL of sysexits.h
_SECONDARY_S = 30.0  # for the sentry to end a rank whose collective failed
_ONE_LINE = 500

__all__ = ["EXIT_CODE", "Guard", "guard"]


class Guard:
    """What a training loop asks, once a step."""

    def __init__(self, topology: Topology, messages: IO[bytes] | None) -> None:
        self._topology = topology
        self._messages = messages
        self._told_to_stop = False
        self._step = 0
        self.over = False  # whether this rank has said why it ends

    def request_stop(self, *_: int | FrameType | None) -> None:
        """Ask all ranks to stop at the next step; the handler of SIGTERM."""
        self._told_to_stop = True

    def stop_requested(self) -> bool:
        """Whether any rank was told to stop. Call it on every rank after every step.

        Collective, so that all ranks stop at the same step, and a sign of life: the limit of
        :func:`guard` runs anew from here.
        """
        self._step += 1
        self.beat()
        if self._topology.layout.world_size == 1:
            return self._told_to_stop
        import paddle
        import paddle.distributed as dist

        flag = paddle.to_tensor([int(self._told_to_stop)], dtype="int32")
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def beat(self) -> None:
        """Give a sign of life, in phases between steps that take long, such as an evaluation."""
        self._tell({"beat": self._step})

    def _tell(self, message: dict[str, Any]) -> None:
        if self._messages is not None:
            # Without its sentry a rank still trains.
            with contextlib.suppress(OSError, ValueError):
                self._messages.write(json.dumps(message).encode() + b"\n")
                self._messages.flush()

    def report(self, error: BaseException) -> None:
        """Tell the job why this rank ends."""
        self.over = True
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:_ONE_LINE]
        echo, told = isinstance(error, CollectiveError), isinstance(error, UserError)
        self._tell({"error": text, "echo": echo, "told": told})

    def fail(self, error: Exception) -> NoReturn:
        """Tell the job why this rank cannot go on, and end with all of it."""
        self.report(error)
        time.sleep(_SECONDARY_S)  # the sentry ends this process, after it has said why
        os._exit(EXIT_CODE)

    def leave(self) -> None:
        """Tell the job that this rank ends as it should."""
        self.over = True
        self._tell({"bye": True})


@contextlib.contextmanager
def guard(topology: Topology, directory: Path | str, timeout_s: float = 1800.0) -> Iterator[Guard]:
    """Watch over a training loop on all ranks; a collective call.

    Within it SIGTERM sets a flag, SIGUSR1 writes the rank's stacks to ``stacks.N.txt``, and the
    failure of a rank ends the others with :data:`EXIT_CODE`, after one message on standard error
    of rank 0 and in ``failure.txt``.

    Args:
        topology: the running job.
        directory: for those files; the output directory.
        timeout_s: the longest time between two steps (:meth:`Guard.stop_requested`, which a
            trainer polls, or :meth:`Guard.beat`), seconds.

    Raises:
        ValueError: ``timeout_s`` is not positive.
        UserError: hosts of the job cannot connect to each other.
    """
    if timeout_s <= 0:
        raise ValueError(f"timeout_s {timeout_s:g}: a time limit has to be positive seconds")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stacks = stack.enter_context(
            sentry.stacks_file(directory, topology.rank).open("w", encoding="utf-8")
        )
        _handle_crashes(stacks, stack)
        process = _start_sentry(topology, directory, timeout_s)
        watched = Guard(topology, None if process is None else process.stdin)
        if process is not None:
            threading.Thread(target=_obey, args=(process, watched), daemon=True).start()
        stack.enter_context(_on_sigterm(watched))
        try:
            yield watched
        except BaseException as error:
            if isinstance(error, SystemExit) and not error.code:
                watched.leave()
            else:
                watched.report(error)
                if isinstance(error, CollectiveError) and process is not None:
                    # The cause lies on another rank: its message is enough.
                    process.wait(_SECONDARY_S)
            raise
        watched.leave()
    _remove_stacks(directory, topology.rank)


def _handle_crashes(stacks: IO[str], stack: contextlib.ExitStack) -> None:
    faulthandler.enable(stacks)
    faulthandler.register(sentry.STACK_SIGNAL, stacks)
    stack.callback(faulthandler.unregister, sentry.STACK_SIGNAL)
    stack.callback(faulthandler.enable, sys.__stderr__)


@contextlib.contextmanager
def _on_sigterm(watched: Guard) -> Iterator[None]:
    """Let SIGTERM ask for a stop, where this is possible: Python hears signals in one thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, watched.request_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _start_sentry(
    topology: Topology, directory: Path, timeout_s: float
) -> subprocess.Popen[bytes] | None:
    """Start this rank's sentry, rank 0's first; None in a job of one process."""
    if topology.layout.world_size == 1:
        return None
    process = None
    address = (_own_host(), 0)
    if topology.rank == 0:
        process = _spawn(topology, directory, timeout_s, address)
        address = (address[0], json.loads(process.stdout.readline())["port"])
        (directory / sentry.FAILURE_FILE).unlink(missing_ok=True)
    address = tuple(topology.gather_objects(address)[0])
    if process is None:
        process = _spawn(topology, directory, timeout_s, address)
    if not process.stdout.readline():
        raise UserError(
            f"the process that watches rank {topology.rank} could not reach that of rank 0 at "
            f"{address[0]}, port {address[1]}; its message is above; let the hosts of this job "
            "connect to each other"
        )
    return process


def _own_host() -> str:
    """The address at which the launcher knows this machine."""
    endpoint = os.environ.get("PADDLE_CURRENT_ENDPOINT", "")
    return endpoint.rpartition(":")[0] or socket.gethostname()


def _spawn(
    topology: Topology, directory: Path, timeout_s: float, address: tuple[str, int]
) -> subprocess.Popen[bytes]:
    arguments = {
        "rank": topology.rank,
        "pid": os.getpid(),
        "ranks": topology.layout.world_size,
        "timeout_s": timeout_s,
        "directory": directory.absolute(),
        "host": address[0],
        "port": address[1],
    }
    options = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    # A session of its own: launchers kill a rank's whole process group. `-S -E`: nothing to import.
    return subprocess.Popen(
        [sys.executable, "-S", "-E", sentry.__file__, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def _obey(process: subprocess.Popen[bytes], watched: Guard) -> None:
    """End this process when its sentry says so, whatever the main thread waits for."""
    for line in process.stdout:
        if "exit" in json.loads(line):
            os._exit(EXIT_CODE)
    if not watched.over:  # the sentry was killed, and the job ends for that
        os._exit(EXIT_CODE)


def _remove_stacks(directory: Path, rank: int) -> None:
    sentry.stacks_file(directory, rank).unlink(missing_ok=True)
