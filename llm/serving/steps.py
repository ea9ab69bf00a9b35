"""The engine's side: one thread owns the engine, and answers requests together, step by step.

Loading and every step run on the same thread: OpenMP keeps a pool of workers per calling thread.
Another one reads what the HTTP process asks for (:mod:`llm.serving.link`); what a step has made
goes back in one message. The other side is :class:`llm.serving.loop.EngineWorker`.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from common.errors import UserError
from llm.engine.opening import OpenedModel
from llm.engine.request import GrammarSpec, Request, Token
from llm.engine.stats import EngineStats
from llm.serving.link import Event, Failure, Link
from llm.serving.served import CONTEXT, EngineLimits, ModelFacts

logger = logging.getLogger(__name__)


class Handle(Protocol):
    """A request that an engine has taken; see :class:`llm.engine.sequence.Sequence`."""

    produced: deque[Token]
    error: Exception | None
    num_cached: int
    started: float | None


class EngineLike(Protocol):
    """The part of :class:`llm.engine.engine.Engine` that serving uses."""

    max_model_len: int
    max_sequences: int

    @property
    def stats(self) -> EngineStats: ...

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> Handle: ...

    def abort(self, sequence: Any) -> None: ...

    def step(self) -> None: ...


class Loaded(NamedTuple):
    """A loaded model, the one engine over it, and what sets the engine's longest request."""

    model: OpenedModel
    engine: EngineLike
    limited_by: str = CONTEXT


class _Answers:
    """The answers to one HTTP request on their way: shared by the reading and the engine's thread.

    ``dropped``: answers nobody reads on. ``closed``: nobody reads any.
    """

    def __init__(self, number: int, requests: Sequence[Request]) -> None:
        self.id, self.requests = number, requests
        self.dropped: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.closed = threading.Event()
        self.handles: dict[int, Handle] = {}  # those in the engine, by number; its thread's alone


class _Change(NamedTuple):
    """An adapter that comes, or goes where it has no directory; done between two steps."""

    id: int
    name: str
    directory: str | None
    replace: bool


class EngineSteps:
    """Loads the model in the background, then does what comes over a link.

    Args:
        load: opens the model; runs on the engine's thread.
        link: to the HTTP process.
        max_queue_delay: seconds for which an engine without work waits for further requests once
            the first is there, while it has room for them.
        on_broken: is called when the thread ends by an error, which no request should cause.
    """

    def __init__(
        self,
        load: Callable[[], Loaded],
        link: Link,
        *,
        max_queue_delay: float = 0.0,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        self._load, self._link, self._max_queue_delay = load, link, max_queue_delay
        self._on_broken = on_broken
        self._inbox: queue.SimpleQueue[_Answers | _Change | None] = queue.SimpleQueue()
        self._open: dict[int, _Answers] = {}  # the reading thread's
        self._finished = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._reader = threading.Thread(target=self._read, name="requests", daemon=True)
        self.broken = False
        self.loaded: Loaded | None = None
        self.load_error: Exception | None = None

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._thread.start()
        self._reader.start()

    def wait_loaded(self, timeout: float | None = None) -> bool:
        """Wait for the model; False when ``timeout`` seconds passed before.

        Raises:
            Exception: whatever loading raised.
        """
        finished = self._finished.wait(timeout)
        if self.load_error is not None:
            raise self.load_error
        return finished

    def close(self, timeout: float = 5.0) -> None:
        """End all answers after the step that is being computed, and the thread."""
        self._stopping.set()
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _read(self) -> None:
        """Take what the HTTP process sends, until it ends."""
        while True:
            try:
                message = self._link.receive()
            except EOFError:
                break
            assert message is not None
            name, *args = message
            if name == "open":
                self._take_in(*args)
            elif name == "change":
                self._inbox.put(_Change(*args))
            elif (answers := self._open.get(args[0])) is None:
                continue  # it could not be taken in
            elif name == "drop":
                answers.dropped.put(args[1])
            else:
                answers.closed.set()
                del self._open[answers.id]
        for answers in self._open.values():
            answers.closed.set()

    def _take_in(self, number: int, requests: Sequence[Request]) -> None:
        """Queue requests; their grammars are compiled here, where no step waits for it."""
        try:
            assert self.loaded is not None
            for spec in {one.grammar for one in requests if isinstance(one.grammar, GrammarSpec)}:
                self.loaded.model.grammars.compile(*spec)  # and keeps it
        except Exception as error:  # noqa: BLE001 - one request's fault ends one request
            self._send_failure(number, error)
            return
        answers = self._open[number] = _Answers(number, requests)
        self._inbox.put(answers)

    def _send_failure(self, number: int, error: Exception) -> None:
        if not isinstance(error, UserError):
            logger.error("a request could not be queued", exc_info=error)
        self._send_step([Event(number, 0, 0, 0.0, Failure.of(error))])

    def _send_step(self, events: list[Event]) -> None:
        assert self.loaded is not None
        self._link.send("step", events, self.loaded.engine.stats)

    def _run(self) -> None:
        try:
            model, engine, limited_by = self.loaded = self._load()
            self._facts = ModelFacts.of(model)
            limits = EngineLimits(engine.max_model_len, engine.max_sequences, limited_by)
        except Exception as error:  # noqa: BLE001 - handed to the main thread, which reports it
            self.load_error = error
            return
        finally:
            self._finished.set()
        self._link.send("loaded", self._facts, limits, engine.stats)
        try:
            self._answer(engine)
        except Exception:
            logger.exception("the engine's thread broke")
            self.broken = True
            self._on_broken()

    def _answer(self, engine: EngineLike) -> None:
        """Do what comes, until the end."""
        active: list[_Answers] = []
        while not self._stopping.is_set():
            self._take(engine, active)
            for answers in active:
                _drop(engine, answers)
            try:
                engine.step()
            except Exception as error:  # noqa: BLE001 - the requests of the step tell of it
                _end_all(engine, active, error)
            self._hand_out(active)
            active = [answers for answers in active if answers.handles]
        for answers in active:
            for handle in answers.handles.values():
                engine.abort(handle)

    def _take(self, engine: EngineLike, active: list[_Answers]) -> None:
        """Give the engine what has come; wait for something, and company, where it has no work."""
        idle, until = not engine.has_work, 0.0
        while not self._stopping.is_set():
            try:
                if not engine.has_work:
                    given = self._inbox.get()
                    until = time.monotonic() + self._max_queue_delay
                else:
                    full = sum(len(one.handles) for one in active) >= engine.max_sequences
                    left = until - time.monotonic() if idle and not full else 0.0
                    given = self._inbox.get(left > 0, max(left, 0.0))
            except queue.Empty:
                return
            if given is None:
                return
            if isinstance(given, _Change):
                self._change(given)
            elif self._add(engine, given):
                active.append(given)

    def _add(self, engine: EngineLike, answers: _Answers) -> bool:
        try:
            for number, request in enumerate(answers.requests):
                answers.handles[number] = engine.add(request)
        except Exception as error:  # noqa: BLE001 - one request's fault ends one request
            answers.closed.set()
            _drop(engine, answers)
            self._send_failure(answers.id, error)
            return False
        return True

    def _change(self, change: _Change) -> None:
        """Load or unload an adapter; answer with what is wrong with it, and who is there now."""
        assert self.loaded is not None
        model, failure = self.loaded.model, None
        try:
            if change.directory is None:
                model.adapters.unload(change.name)
            else:
                model.adapters.load(change.name, change.directory, replace=change.replace)
        except Exception as error:  # noqa: BLE001 - whoever asked for it is told
            failure = Failure.of(error)
        self._facts = replace(self._facts, adapter_names=model.adapter_names)
        self._link.send("changed", change.id, failure, self._facts)

    def _hand_out(self, active: Sequence[_Answers]) -> None:
        """Send what the last step made, and the engine's counters."""
        events: list[Event] = []
        for answers in active:
            _collect(answers, events)
        self._send_step(events)


def _drop(engine: EngineLike, answers: _Answers) -> None:
    """Take out of the engine what nobody reads any more."""
    gone = list(answers.handles) if answers.closed.is_set() else []
    while not answers.dropped.empty():
        gone.append(answers.dropped.get())
    for number in gone:
        if (handle := answers.handles.pop(number, None)) is not None:
            engine.abort(handle)


def _end_all(engine: EngineLike, active: Sequence[_Answers], error: Exception) -> None:
    """See that a step that failed ends what took part in it; all, where that is not known."""
    handles = [handle for answers in active for handle in answers.handles.values()]
    if any(handle.error is error for handle in handles):
        return
    for handle in handles:
        handle.error = error
        engine.abort(handle)


def _collect(answers: _Answers, events: list[Event]) -> None:
    """Add what the last step made of one request."""
    for number, handle in list(answers.handles.items()):
        while handle.produced:
            token, since = handle.produced.popleft(), handle.started or 0.0
            events.append(Event(answers.id, number, handle.num_cached, since, token))
            if token.finish_reason is not None:
                answers.handles.pop(number, None)
        if handle.error is not None:
            if not isinstance(handle.error, UserError):
                length = len(answers.requests[number].prompt_ids)
                logger.error("failed on a prompt of %d", length, exc_info=handle.error)
            events.append(Event(answers.id, number, 0, 0.0, Failure.of(handle.error)))
            answers.handles.pop(number, None)
