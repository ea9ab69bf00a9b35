"""A server that runs functions on N ranks, for tests: paddle is imported once, a rank is a fork.

Starting N interpreters costs seconds of imports for each test; a fork costs 0.1 s. The server
itself never runs an operator (threads do not survive a fork), and a job's module is imported in
the ranks, after the fork.

From the command line, for debugging:

    python -m tests.distributed.rank_server 4 jobs_collectives:every_collective '["world"]'
"""

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from llm import runtime
from tests.distributed import forked_scripts

HOST = "127.0.0.1"
# Below the range that the kernel hands out, which connections of other jobs use up.
PORTS = range(15000, 32000)
GRACE_S = 5.0  # from the first rank that failed to the end of the others
STACKS_S = 1.0  # for ranks to write their stacks before they are killed
TAIL_LINES = 60
# What paddle prints in every process.
NOISE = ("Modified FLAGS", "FLAGS(name=", "=====", "is not in group", "  warnings.warn(")
STACK_SIGNAL = signal.SIGUSR1
# Imported once for all ranks: what most jobs and scripts use, which takes 0.4 s.
PRELOADED = (
    "paddle.distributed",
    "paddle.distributed.fleet",
    "paddle.distributed.fleet.utils.mix_precision_utils",
    "data.tokenizer",
    "llm.train.processes",
    "llm.engine.engine",
    "llm.llama.adapters.opening",
    "llm.engine.runners",
    "llm.train.objectives",
    "llm.serving.terminal",
)


class RankError(AssertionError):
    """A rank failed or did not end in time; the message holds the tail of each rank's output."""


class Job(NamedTuple):
    """A request: ``function`` of ``module`` with JSON arguments, on ``ranks`` processes."""

    ranks: int
    target: str
    arguments: list[Any]
    timeout: float = 60.0
    environment: dict[str, str] = {}  # noqa: RUF012  (read only)


def free_port() -> int:
    """A port that nobody listens on, drawn at random so that servers side by side do not race."""
    draw = random.Random(os.urandom(8))
    while True:
        port = draw.choice(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port


def resolve(target: str) -> Callable[..., Any]:
    """The function that ``module:function`` names; the module may lie in tests/distributed."""
    module, _, function = target.partition(":")
    if not function:
        raise ValueError(f"target {target!r} is not module:function")
    return getattr(importlib.import_module(module), function)


def rank_environment(rank: int, ports: list[int]) -> dict[str, str]:
    """What ``paddle.distributed.launch`` sets; ``ports`` is one per rank, then the store's."""
    ranks = len(ports) - 1
    endpoints = [f"{HOST}:{port}" for port in ports[:ranks]]
    return {
        "PADDLE_MASTER": f"{HOST}:{ports[-1]}",
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": str(ranks),
        "PADDLE_GLOBAL_SIZE": str(ranks),
        "PADDLE_LOCAL_SIZE": str(ranks),
        "PADDLE_GLOBAL_RANK": str(rank),
        "PADDLE_LOCAL_RANK": str(rank),
        "PADDLE_RANK_IN_NODE": str(rank),
        "PADDLE_NNODES": "1",
        "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_DISTRI_BACKEND": "gloo",
    }


def _flush_messages() -> None:
    """Wait for what the rank sent, as a script does at its end."""
    gloo = sys.modules.get("llm.parallel.gloo")
    if gloo is not None:
        gloo.flush()


def _run_rank(rank: int, job: Job, ports: list[int], directory: Path) -> None:
    """The life of a rank, from fork to exit."""
    os.setpgid(0, 0)
    forked_scripts.die_with_parent()
    log = os.open(directory / f"{rank}.log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.environ.update(rank_environment(rank, ports) | job.environment)
    # A preloaded module may have asked paddle for the number of processes, which it remembers.
    sys.modules["paddle.distributed.parallel"]._global_parallel_env = None
    faulthandler.enable()
    faulthandler.register(STACK_SIGNAL)
    status = 0
    try:
        function = resolve(job.target)
        result = json.dumps(function(*job.arguments))
        _flush_messages()
        (directory / f"{rank}.json").write_text(result, encoding="utf-8")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001  (the log is the report)
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.killpg(pid, number)
        except ProcessLookupError:
            continue


def _wait_all(pids: list[int], timeout: float) -> tuple[list[int], bool]:
    """Exit codes of all ranks, and whether time ran out; leaves no process behind."""
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout
    late = False
    failed = False
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) and not failed:
            failed = True
            end = min(end, time.monotonic() + GRACE_S)
        alive = [pid for pid in pids if pid not in codes]
        if alive and time.monotonic() > end:
            late = not failed
            _signal_ranks_for_stacks(alive)
            _signal_all(alive, signal.SIGKILL)
            for pid in alive:
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.005)
    _signal_all(pids, signal.SIGKILL)  # what the ranks themselves started
    return [codes[pid] for pid in pids], late


def _signal_ranks_for_stacks(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, STACK_SIGNAL)
    time.sleep(STACKS_S)


def _tail(log: Path) -> str:
    if not log.exists():
        return "(no output)"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if not any(noise in line for noise in NOISE)]
    return "\n".join(said[-TAIL_LINES:])


def run_job(job: Job) -> dict[str, Any]:
    """Fork the ranks of ``job`` and wait: exit codes, returned values, output tails, seconds."""
    start = time.monotonic()
    ports = [free_port() for _ in range(job.ranks + 1)]
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        directory = Path(name)
        pids = []
        for rank in range(job.ranks):
            pid = os.fork()
            if pid == 0:
                _run_rank(rank, job, ports, directory)
            pids.append(pid)
        codes, late = _wait_all(pids, job.timeout)
        values = [
            json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
            for file in (directory / f"{rank}.json" for rank in range(job.ranks))
        ]
        tails = [_tail(directory / f"{rank}.log") for rank in range(job.ranks)]
    seconds = time.monotonic() - start
    return {"codes": codes, "late": late, "values": values, "tails": tails, "seconds": seconds}


def values_of(job: Job, answer: dict[str, Any]) -> list[Any]:
    """Each rank's returned value.

    Raises:
        RankError: a rank ended with an error, was killed, or time ran out.
    """
    if not any(answer["codes"]):
        return answer["values"]
    why = f"did not end within {job.timeout:g} s" if answer["late"] else "failed"
    message = [f"{job.target} on {job.ranks} ranks {why} (exit codes {answer['codes']})"]
    for rank, (code, tail) in enumerate(zip(answer["codes"], answer["tails"], strict=True)):
        message.append(f"--- rank {rank}, exit code {code}\n{tail}")
    raise RankError("\n".join(message))


class RankServer:
    """The client's side: a server process, and jobs that are run there one after another.

    Args:
        environment: variables of the server on top of this process's.
    """

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        read, write = os.pipe()
        command = [sys.executable, "-m", "tests.distributed.rank_server", "--serve", str(write)]
        self._process = subprocess.Popen(
            command,
            cwd=REPO,
            env=os.environ | (environment or {}),
            stdin=subprocess.PIPE,
            text=True,
            pass_fds=(write,),
        )
        os.close(write)
        self._replies = os.fdopen(read)
        self._one_at_a_time = threading.Lock()
        self._answer(timeout=120)

    def _answer(self, timeout: float) -> Any:
        if not select.select([self._replies], [], [], timeout)[0]:
            self.close()
            raise RankError(f"the rank server did not answer within {timeout:g} s")
        line = self._replies.readline()
        if not line:
            raise RankError(f"the rank server ended with code {self._process.wait()}")
        return json.loads(line)

    def preload(self, *modules: str) -> None:
        """Import slow modules in the server, so that ranks have them already."""
        self.ask({"preload": modules}, timeout=120)

    def ask(self, request: dict[str, Any], timeout: float) -> Any:
        """Send a request of :func:`serve`; return its answer. Threads take turns."""
        with self._one_at_a_time:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._answer(timeout)

    def run(self, job: Job) -> dict[str, Any]:
        """The answer of :func:`run_job`, whether or not ranks failed."""
        return self.ask({"job": job}, timeout=job.timeout + 30)

    def __call__(
        self,
        ranks: int,
        target: str,
        *arguments: Any,
        timeout: float = 60.0,
        environment: dict[str, str] | None = None,
    ) -> list[Any]:
        """Run ``target`` ("module:function") on ``ranks`` processes; each rank's returned value.

        Args:
            ranks: number of processes.
            target: the module may be a file of tests/distributed, by its bare name.
            arguments: JSON-able arguments, the same for every rank.
            timeout: seconds until the ranks are asked for their stacks and killed.
            environment: variables of the ranks on top of the server's.

        Raises:
            RankError: a rank failed or was late; with each rank's last lines of output.
        """
        job = Job(ranks, target, list(arguments), timeout, environment or {})
        return values_of(job, self.run(job))

    def close(self) -> None:
        """End the server and with it any rank that is left."""
        # Closing is not enough: what this process has forked since holds the pipe too, such as
        # paddle's loader workers, which stay until it ends.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("null\n")
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._replies.close()


def _prepare() -> None:
    sys.path.insert(0, str(HERE))
    runtime.prepare(threads=1)
    runtime.load_paddle()
    for module in PRELOADED:
        importlib.import_module(module)


def _answer(request: dict[str, Any]) -> Any:
    if "job" in request:
        return run_job(Job(*request["job"]))
    if "script" in request:
        return forked_scripts.fork(*request["script"])
    if "poll" in request:
        done, status = os.waitpid(request["poll"], os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if done else None
    for module in request["preload"]:
        importlib.import_module(module)
    gc.freeze()  # so that collections in forks do not write to, and thereby copy, all of this
    return "ready"


def serve(reply: int) -> None:
    """Answer requests on the descriptor ``reply``: JSON lines on standard input, null ends."""
    os.set_inheritable(reply, False)
    forked_scripts.die_with_parent()
    _prepare()
    gc.freeze()
    with os.fdopen(reply, "w") as out:
        print(json.dumps("ready"), file=out, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            if request is None:
                break
            print(json.dumps(_answer(request)), file=out, flush=True)


def main(arguments: list[str]) -> int:
    """Run one job as the command line says: N module:function '[json, arguments]'."""
    if arguments[:1] == ["--serve"]:
        serve(int(arguments[1]))
        return 0
    if len(arguments) not in {2, 3}:
        print(__doc__, file=sys.stderr)
        return 2
    _prepare()
    timeout = float(os.environ.get("RANKS_TIMEOUT", "60"))
    job = Job(int(arguments[0]), arguments[1], json.loads([*arguments, "[]"][2]), timeout)
    answer = run_job(job)
    for rank, (code, tail) in enumerate(zip(answer["codes"], answer["tails"], strict=True)):
        print(f"--- rank {rank}, exit code {code}\n{tail}\n=> {json.dumps(answer['values'][rank])}")
    print(f"{job.ranks} ranks in {answer['seconds']:.2f} s")
    return int(any(answer["codes"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
