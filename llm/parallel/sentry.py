"""The process beside each rank that notices when the rank dies, fails or hangs (see ``faults``).

It is a process and not a thread because a rank that waits inside NCCL may hold Python's lock, and
one that was killed has no threads. Standard library only: it starts in 0.1 s and takes 10 MB.

The sentry of rank 0 coordinates: the others connect to it over TCP, report, and obey. It decides
what went wrong, asks all ranks for their stacks if they hang, says it once, and ends the job.
Messages are JSON objects, one per line:

* rank to sentry (standard input): ``{"beat": step}``, ``{"bye": true}``, and ``{"error": text}``
  with ``"echo"`` if it follows from another rank's, ``"told"`` if the rank tells its user;
* sentry to rank (standard output): ``{"port": n}`` of a coordinator, ``{"ready": true}``,
  ``{"exit": true}``;
* sentry to coordinator: what the rank says, ``{"alive": true}``, ``{"died": cause}``,
  ``{"stacks": text}``; back: ``{"dump": true}``, ``{"exit": true}``, ``{"bye": true}``.
"""

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TICK_S = 0.25
HEARTBEAT_S = 3.0
LOST_S = 30.0  # without a heartbeat a rank's machine counts as lost
SETTLE_S = 0.5  # for other ranks to report the same failure
TOLD_S = 10.0  # for all ranks to end with the same message to the user
ECHO_S = 5.0  # for the cause of a failed collective to turn up
DUMP_S = 10.0  # for all ranks to send their stacks
EXIT_S = 3.0  # for a rank to end by itself before it is killed
STACK_SIGNAL = signal.SIGUSR1
FAILURE_FILE = "failure.txt"


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def stacks_file(directory: Path, rank: int) -> Path:
    """Where a rank's ``faulthandler`` writes."""
    return directory / f"stacks.{rank}.txt"


def _out_of_memory_kills() -> int:
    """How many processes of this container the kernel has killed for memory."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/sys/fs/cgroup/memory.events").read_text(encoding="utf-8").splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


class Lines:
    """Complete lines from a descriptor that is readable now and then."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.open = True
        self._rest = b""

    def read(self) -> list[dict[str, Any]]:
        """What arrived; clears ``open`` at the end of the stream."""
        try:
            data = os.read(self.descriptor, 1 << 16)
        except OSError:
            data = b""
        self.open = bool(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines if line]


class Sentry:
    """Watches the rank that started this process."""

    def __init__(self, rank: int, pid: int, address: tuple[str, int], directory: Path) -> None:
        self.rank, self.pid, self.directory = rank, pid, directory
        self._kills = _out_of_memory_kills()
        self._link = socket.create_connection(address, timeout=60)
        self._link.settimeout(None)
        self._orders, self._reports = Lines(self._link.fileno()), Lines(sys.stdin.fileno())
        self._died = False

    def run(self) -> None:
        """Return when the rank has ended, and whatever follows from it is done."""
        self._tell({"rank": self.rank, "host": socket.gethostname()})
        os.write(sys.stdout.fileno(), _line({"ready": True}))
        beat = time.monotonic()
        while True:
            watched = [lines.descriptor for lines in (self._orders, self._reports) if lines.open]
            ready = select.select(watched, [], [], TICK_S)[0]
            if self._reports.descriptor in ready:
                for report in self._reports.read():
                    self._tell(report)
                    if "bye" in report:
                        return
            if self._orders.descriptor in ready:
                for order in self._orders.read():
                    if "dump" in order:
                        self._tell({"stacks": self._stacks()})
                    if "exit" in order:
                        self._end_rank()
                    if "exit" in order or "bye" in order:
                        return
                if not self._orders.open:
                    self._end_rank()  # the coordinator's machine is gone
                    return
            if not self._alive() and not self._died:
                self._died = True
                self._tell({"died": self._cause()})
            if time.monotonic() - beat > HEARTBEAT_S:
                beat = time.monotonic()
                self._tell({"alive": True})

    def _alive(self) -> bool:
        return os.getppid() == self.pid

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # then the orders end too, which run() sees
            self._link.sendall(_line(message))

    def _cause(self) -> str:
        """Why a rank may have ended without a word: nobody but its launcher is told."""
        file = stacks_file(self.directory, self.rank)
        said = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        for line in said.splitlines():
            if line.startswith("Fatal Python error: "):
                return f"crashed ({line.removeprefix('Fatal Python error: ')}; stack in {file})"
        if _out_of_memory_kills() > self._kills:
            return "was killed by the kernel: out of memory"
        return "was killed (SIGKILL: by hand, by a scheduler or for memory) or left with os._exit"

    def _stacks(self) -> str:
        file = stacks_file(self.directory, self.rank)
        before = file.stat().st_size
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, STACK_SIGNAL)
        time.sleep(1.0)
        said = file.read_bytes()[before:].decode(errors="replace")
        # The main thread comes last; its title is an address, which differs between ranks.
        return said.rstrip().split("\n\n")[-1].partition("\n")[2]

    def _end_rank(self) -> None:
        with contextlib.suppress(OSError):
            os.write(sys.stdout.fileno(), _line({"exit": True}))
        end = time.monotonic() + EXIT_S
        while self._alive() and time.monotonic() < end:
            time.sleep(0.05)
        if self._alive():
            os.kill(self.pid, signal.SIGKILL)


@dataclass
class Watched:
    """What the coordinator knows about a rank."""

    rank: int
    host: str
    link: socket.socket
    alive: float
    beat: float
    step: int | None = None
    stacks: str | None = None
    left: bool = False
    error: str | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Coordinator:
    """Decides what went wrong with the job; runs beside rank 0's sentry."""

    def __init__(self, ranks: int, timeout_s: float, directory: Path, host: str) -> None:
        self.ranks, self.timeout_s, self.directory = ranks, timeout_s, directory
        self._listener = socket.create_server((host, 0), backlog=ranks)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._watched: dict[int, Watched] = {}
        self._causes: list[tuple[float, str]] = []
        self._echoes: list[tuple[float, str]] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        for _ in range(self.ranks):
            link, _ = self._listener.accept()
            threading.Thread(target=self._hear, args=(link,), daemon=True).start()

    def _hear(self, link: socket.socket) -> None:
        lines = Lines(link.fileno())
        rank: Watched | None = None
        while lines.open:
            for message in lines.read():
                now = time.monotonic()
                with self._lock:
                    if rank is None:
                        rank = Watched(message["rank"], message["host"], link, now, now)
                        self._watched[rank.rank] = rank
                    else:
                        self._note(rank, message, now)
        with self._lock:
            if rank is not None and not rank.left:
                rank.left = True
                cause = f"{rank}: the process that watches it ended, or the machine did"
                self._causes.append((time.monotonic(), cause))

    def _note(self, rank: Watched, message: dict[str, Any], now: float) -> None:
        rank.alive = now
        if "beat" in message:
            rank.beat, rank.step = now, message["beat"]
        elif "bye" in message:
            rank.left = True
        elif "stacks" in message:
            rank.stacks = message["stacks"]
        elif "died" in message:
            if not rank.left:
                self._causes.append((now, f"{rank} {message['died']}"))
            rank.left = True
        elif "error" in message:
            kind = self._echoes if message["echo"] else self._causes
            # Ranks that refuse the same thing do not need anybody to say it again.
            when = now + TOLD_S if message["told"] else now
            kind.append((when, f"{rank} failed: {message['error']}"))
            rank.left, rank.error = True, message["error"]

    def run(self) -> None:
        """Return when all ranks have left, or the job was ended."""
        while True:
            time.sleep(TICK_S)
            with self._lock:
                failure = self._failure()
                done = self._all_left_alike()
            if done:
                self._send({"bye": True})
                return
            if failure is not None:
                self._end_job(failure)
                return

    def _all_left_alike(self) -> bool:
        """Whether all ranks ended as they should, or with the same words to the user."""
        ends = {rank.error for rank in self._watched.values() if rank.left}
        everyone = len(self._watched) == self.ranks and all(r.left for r in self._watched.values())
        told = all(when > time.monotonic() for when, _ in self._causes)
        return everyone and len(ends) == 1 and told and not self._echoes

    def _failure(self) -> str | None:
        now = time.monotonic()
        if self._causes:
            if now - min(when for when, _ in self._causes) > SETTLE_S:
                return "; ".join(dict.fromkeys(cause for _, cause in self._causes))
            return None
        if self._echoes:
            return self._echoes[0][1] if now - self._echoes[0][0] > ECHO_S else None
        present = [rank for rank in self._watched.values() if not rank.left]
        for rank in present:
            if now - rank.alive > LOST_S:
                return f"{rank}: its machine does not answer for {LOST_S:g} s"
        late = [rank for rank in present if now - rank.beat > self.timeout_s]
        return self._hang(late) if late else None

    def _hang(self, late: list[Watched]) -> str:
        """Ask for stacks; called with the lock held, which replies need."""
        self._send({"dump": True})
        end = time.monotonic() + DUMP_S
        while time.monotonic() < end and any(r.stacks is None for r in self._watched.values()):
            self._lock.release()
            time.sleep(TICK_S)
            self._lock.acquire()
        steps = sorted({"none" if rank.step is None else str(rank.step) for rank in late})
        text = [
            f"no rank finished a step within {self.timeout_s:g} s (last step: {', '.join(steps)}); "
            "a collective hangs, or a step takes longer than the limit. The ranks are here:"
        ]
        same: dict[str, list[str]] = {}
        for rank in sorted(self._watched.values(), key=lambda r: r.rank):
            stacks = rank.stacks if rank.stacks is not None else "  (did not answer)"
            same.setdefault(stacks.rstrip(), []).append(str(rank))
        return "\n".join([*text, *(f"{', '.join(who)}:\n{stack}" for stack, who in same.items())])

    def _send(self, message: dict[str, Any]) -> None:
        for rank in self._watched.values():
            with contextlib.suppress(OSError):
                rank.link.sendall(_line(message))

    def _end_job(self, failure: str) -> None:
        message = f"job ended: {failure}"
        print(message, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # a full disk must not keep the job alive
            file = self.directory / FAILURE_FILE
            temporary = file.with_suffix(".tmp")
            temporary.write_text(message + "\n", encoding="utf-8")
            temporary.replace(file)
        self._send({"exit": True})


def main() -> None:
    """Run as ``faults.guard`` started it; the coordinator prints its address first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--timeout_s", type=float, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    # A launcher that ends the ranks, or control-C, is for them: this process reports it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    address = (options.host, options.port)
    watch: threading.Thread | None = None
    if options.rank == 0:
        job = Coordinator(options.ranks, options.timeout_s, options.directory, options.host)
        address = job.address
        os.write(sys.stdout.fileno(), _line({"port": address[1]}))
        watch = threading.Thread(target=job.run)
        watch.start()
    Sentry(options.rank, options.pid, address, options.directory).run()
    if watch is not None:
        watch.join()


if __name__ == "__main__":
    main()
