"""Processes that share one model: a leader that schedules and samples, followers that execute.

Rank 0 leads: requests, random numbers and answers exist there alone, so that nothing has to be
agreed upon. The others are told what to do over a connection of their own: to take memory, to clear
blocks, to execute a ``Batch``. They wait for it in the kernel, for days if need be, and enter a
collective only when all do. ``llm.parallel.faults`` watches over all of them: when one dies, all
end with one message.
"""

import atexit
import contextlib
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from common import ending
from llm.engine.batch import Batch
from llm.engine.runners import DygraphRunner
from llm.llama.modeling import LlamaForCausalLM
from llm.parallel.faults import Guard, guard
from llm.parallel.gloo import CollectiveError, PeerLostError, links
from llm.parallel.tensor import gathered_by_first
from llm.parallel.topology import Topology

_PURPOSE = "steps"
_CONNECT_S = 60.0
# For a step to be through at the end; the launcher kills what has not ended after 30.
_STEP_S = 20.0
_HEARD = ("SIGTERM", "SIGHUP", "SIGINT")


class Team:
    """This process among those that share a model; a collective call.

    Signals that ask to end are the leader's business, where its main thread is asked: they wait for
    the step that is being computed. Before the model is open they end each process at once.

    Args:
        topology: of the running job.

    Raises:
        UserError: hosts of the job cannot connect to each other.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.leads = topology.rank == 0
        self._open = False
        self._asked: int | None = None
        self._step = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._watch: Guard = self._stack.enter_context(
            guard(topology, self._directory(), timeout_s=math.inf)
        )
        self._hear_signals()
        self._links = self._connect()
        atexit.register(self.close)

    def _directory(self) -> Path:
        """Return where the watch writes: beside the launcher's logs."""
        found = os.environ.get("PADDLE_LOG_DIR")
        if found:
            return Path(found)
        made = tempfile.mkdtemp()
        self._stack.callback(shutil.rmtree, made, ignore_errors=True)
        return Path(made)

    def _connect(self) -> list[socket.socket]:
        """Connect the leader with each follower; return the links of this process."""
        rank, own = self.topology.rank, None
        if self.leads:
            own = links.own_host(), links.listener().port
        host, port = self.topology.gather_objects(own)[0]
        if not self.leads:
            return [links.connect((host, port), (_PURPOSE, _PURPOSE, rank))]
        followers = range(1, self.topology.layout.world_size)
        return [links.listener().take((_PURPOSE, _PURPOSE, n), _CONNECT_S) for n in followers]

    def _hear_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # the server's main thread hears them
        for name in _HEARD:
            number = getattr(signal, name)
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants
                signal.signal(number, self._hear)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if not self._open:
            self._watch.leave()
            ending.end_at_once(number)
        if not self.leads or self._asked is not None:
            return  # the leader says when; the launcher sends its signal three times
        self._asked = number
        if not self._step.locked():
            raise ending.exception(number)

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """Within this a process opens its part, and follows; what fails there ends all of them."""
        try:
            yield
        except BaseException:
            self._stack.__exit__(*sys.exc_info())
            raise
        self._open = True

    @contextlib.contextmanager
    def step(self, do: str, what: Any) -> Iterator[None]:
        """Within this the leader does what its followers are told to; a failure ends the job.

        Args:
            do: a method of the followers' runners.
            what: its argument, a ``Batch`` or something that JSON has.
        """
        with self._step:
            try:
                self._tell(do, what)
                yield
            except Exception as error:  # noqa: BLE001  (the others wait in a collective)
                self._watch.fail(error)
        if self._asked is not None:
            raise ending.exception(self._asked)

    def _tell(self, do: str, what: Any = None) -> None:
        arrays: list[Any] = []
        if isinstance(what, Batch):
            arrays = [getattr(what, field.name) for field in fields(Batch)]
            what = [None if one is None else [one.dtype.str, one.shape] for one in arrays]
        sent = [links.as_bytes(np.ascontiguousarray(one)) for one in arrays if one is not None]
        for link in self._links:
            links.send(link, [do, what], b"".join(sent))

    def _heard(self) -> tuple[str, Any]:
        """Wait for the leader's word.

        Raises:
            PeerLostError: the leader ended without one.
        """
        (link,) = self._links
        try:
            do, what = links.receive(link)
            if do == "run":
                what = Batch(*[_received(link, one) for one in what])
        except (EOFError, OSError) as error:
            raise PeerLostError("rank 0 ended without a word; its log has the cause") from error
        return do, what

    def follow(self, runner: DygraphRunner) -> None:
        """Do what the leader says until it says that all is done.

        Args:
            runner: of this process's part of the network.

        Raises:
            CollectiveError: another process is gone.
        """
        self._open = True
        calls: dict[str, Callable[[Any], object]] = {
            "extend": runner.extend,
            "allocate": runner.allocate,
            "clear": runner.clear,
            "run": runner.run,
        }
        while True:
            do, what = self._heard()
            if do == "end":
                return
            try:
                calls[do](what)
            except CollectiveError:
                if self._heard()[0] == "end":  # the leader left in the middle of a step
                    return
                raise

    def dismiss(self) -> None:
        """End what followers are in; they may follow again, with another network."""
        self._tell("end")

    def close(self) -> None:
        """Tell the followers that all is done; a follower only leaves."""
        atexit.unregister(self.close)
        if self._watch.over:
            return
        if self.leads:
            self._step.acquire(timeout=_STEP_S)  # of a thread that nobody waited for
            with contextlib.suppress(OSError):
                self.dismiss()
        self._stack.close()


def _received(link: socket.socket, described: list[Any] | None) -> Any:
    if described is None:
        return None
    array = np.empty(described[1], described[0])
    links.receive_into(link, links.as_bytes(array))
    return array


class LeadingRunner(DygraphRunner):
    """The leader's part of a network; what it does, the followers' runners do too.

    Args:
        model: this process's part.
        team: the processes.
        options: those of ``DygraphRunner``.
    """

    def __init__(self, model: LlamaForCausalLM, team: Team, **options: Any) -> None:
        super().__init__(model, **options)
        self._team = team

    def extend(self, tokens: int) -> None:
        """See ``DygraphRunner``."""
        with self._team.step("extend", tokens):
            super().extend(tokens)

    def allocate(self, num_blocks: int) -> None:
        """See ``DygraphRunner``."""
        with self._team.step("allocate", num_blocks):
            super().allocate(num_blocks)

    def clear(self, blocks: Sequence[int]) -> None:
        """See ``DygraphRunner``."""
        with self._team.step("clear", list(blocks)):
            super().clear(blocks)

    def _logits(self, batch: Batch) -> Any:
        with self._team.step("run", batch):
            return super()._logits(batch)


def share(team: Team, model: LlamaForCausalLM, **options: Any) -> LeadingRunner | None:
    """Lead with a part of a network; or follow, and return None when the leader is done.

    Args:
        team: the processes.
        model: this process's part; logits come together on the leader alone from here on.
        options: those of ``DygraphRunner``, the same in all processes.

    Raises:
        CollectiveError: another process is gone.
    """
    shard = model.seams.shard
    assert shard is not None
    model.seams.shard = replace(shard, gather=gathered_by_first(team.topology))
    if team.leads:
        return LeadingRunner(model, team, **options)
    team.follow(DygraphRunner(model, **options))
    return None
