"""The one thread that owns the engine, and the requests that it answers together.

Loading and every step run on the same thread: OpenMP keeps a pool of workers per calling thread,
and generating from many HTTP threads would multiply them. HTTP threads hand requests over with
:meth:`EngineWorker.open` and read the tokens that steps give them; meanwhile they look whether
their client is still there.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from common.errors import UserError
from llm.engine.opening import OpenedModel
from llm.engine.request import BrokenLogitsError, Request, Token
from llm.serving.errors import ApiError, ClientGoneError

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1  # how soon a vanished client or a shutdown is noticed

Gone = Callable[[], bool]


class Handle(Protocol):
    """A request that an engine has taken; see :class:`llm.engine.sequence.Sequence`."""

    produced: deque[Token]
    error: Exception | None
    num_cached: int

    @property
    def is_running(self) -> bool: ...


class EngineLike(Protocol):
    """The part of :class:`llm.engine.engine.Engine` that serving uses."""

    max_model_len: int
    max_sequences: int

    @property
    def num_preempted(self) -> int: ...

    @property
    def num_drafted(self) -> int: ...

    @property
    def num_accepted(self) -> int: ...

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> Handle: ...

    def abort(self, sequence: Any) -> None: ...

    def step(self) -> None: ...


class Served(NamedTuple):
    """A loaded model and the one engine over it."""

    model: OpenedModel
    engine: EngineLike

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may call a model: the model itself, then its adapters."""
        return self.model.name, *self.model.adapter_names

    def adapter(self, model_id: str | None) -> str | None:
        """Return the adapter that a request for a model of that name runs with, if any."""
        return None if model_id in (None, self.model.name) else model_id


class _Answers:
    """The answers to one HTTP request on their way: shared by its thread and the engine's."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.results: queue.SimpleQueue[tuple[int, Token] | Exception | None] = queue.SimpleQueue()
        self.dropped: queue.SimpleQueue[int] = queue.SimpleQueue()  # answers nobody reads on
        self.closed = threading.Event()
        self.started = False
        self.handles: dict[int, Handle] = {}  # those in the engine, by number; its thread's alone
        self.cached: dict[int, int] = {}  # prompt tokens that were there, of those that have begun


class EngineWorker:
    """Loads the model in the background, then answers requests together, step by step.

    Args:
        load: opens the model; runs on the engine's thread.
        max_queue: requests that may wait beside those that the engine runs together.
        max_queue_delay: seconds for which an engine without work waits for further requests once
            the first is there, while it has room for them.
    """

    def __init__(
        self, load: Callable[[], Served], max_queue: int, *, max_queue_delay: float = 0.0
    ) -> None:
        self._max_queue_delay = max_queue_delay
        self._load = load
        self._max_queue = max_queue
        self._inbox: queue.SimpleQueue[_Answers | None] = queue.SimpleQueue()
        self._open: set[_Answers] = set()
        self._lock = threading.Lock()  # of the set
        self._loaded = threading.Event()
        self._stopping = threading.Event()
        self._served: Served | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.load_error: Exception | None = None

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._thread.start()

    def wait_loaded(self, timeout: float | None = None) -> bool:
        """Wait for the model; False when ``timeout`` seconds passed before.

        Raises:
            Exception: whatever loading raised.
        """
        finished = self._loaded.wait(timeout)
        if self.load_error is not None:
            raise self.load_error
        return finished

    def close(self, timeout: float = 5.0) -> None:
        """End all answers after the step that is being computed, and the thread."""
        self._stopping.set()
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def status(self) -> str:
        """``loading``, ``ok``, ``failed`` or ``stopping``."""
        if self._stopping.is_set():
            return "stopping"
        if self.load_error is not None:
            return "failed"
        return "ok" if self._served is not None else "loading"

    @property
    def served(self) -> Served:
        """The loaded model and its engine.

        Raises:
            ApiError: 503 while loading or stopping.
        """
        status = self.status
        if status != "ok" or self._served is None:
            raise ApiError(
                f"the model cannot answer now: the server is {status}; try again in a few seconds",
                status=503,
                code=status,
                retry_after=2,
            )
        return self._served

    @property
    def num_running(self) -> int:
        """Requests of which an answer has begun."""
        with self._lock:
            return sum(one.started for one in self._open)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their first step."""
        with self._lock:
            return sum(not one.started for one in self._open)

    def open(self, requests: Sequence[Request], gone: Gone) -> "AnswerStream":
        """Hand over requests that belong together; their answers come as one stream.

        Args:
            requests: prompts and how to answer them.
            gone: tells whether the client has closed its connection.

        Raises:
            ApiError: 503 when too many wait, or while loading or stopping.
        """
        engine = self.served.engine
        answers = _Answers(requests)
        with self._lock:
            if len(self._open) >= engine.max_sequences + self._max_queue:
                waiting = len(self._open) - engine.max_sequences
                raise ApiError(
                    f"{engine.max_sequences} requests run together (--max_num_seqs), {waiting} "
                    f"wait already and the limit is {self._max_queue} (--max_queue); try again "
                    "later",
                    status=503,
                    code="overloaded",
                    retry_after=1,
                )
            self._open.add(answers)
        self._inbox.put(answers)
        return AnswerStream(self, answers, gone)

    def forget(self, answers: _Answers) -> None:
        """Take a request out of the count; the engine drops what it has of it after its step."""
        with self._lock:
            self._open.discard(answers)
        answers.closed.set()

    def check(self, gone: Gone) -> None:
        """Raise if nobody waits for an answer any more, or none will come.

        Raises:
            ApiError: 503, the server stops.
            ClientGoneError: the client left.
        """
        if self._stopping.is_set():
            raise ApiError(
                "the server is stopping; try again later",
                status=503,
                code="stopping",
                retry_after=5,
            )
        if gone():
            raise ClientGoneError

    def _run(self) -> None:
        try:
            self._served = self._load()
        except Exception as error:  # noqa: BLE001 - handed to the main thread, which reports it
            self.load_error = error
            return
        finally:
            self._loaded.set()
        engine = self._served.engine
        active: list[_Answers] = []
        while not self._stopping.is_set():
            self._take(engine, active)
            for answers in active:
                _drop(engine, answers)
            try:
                engine.step()
            except Exception as error:  # noqa: BLE001 - the requests of the step tell of it
                _end_all(engine, active, error)
            for answers in active:
                _hand_out(answers)
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
                    answers = self._inbox.get()
                    until = time.monotonic() + self._max_queue_delay
                else:
                    full = sum(len(one.handles) for one in active) >= engine.max_sequences
                    left = until - time.monotonic() if idle and not full else 0.0
                    answers = self._inbox.get(left > 0, max(left, 0.0))
            except queue.Empty:
                return
            if answers is None:
                return
            try:
                for number, request in enumerate(answers.requests):
                    answers.handles[number] = engine.add(request)
            except Exception as error:  # one request's fault ends one request
                if not isinstance(error, UserError):
                    logger.error("a request could not be queued", exc_info=error)
                answers.closed.set()
                _drop(engine, answers)
                answers.results.put(error)
                continue
            active.append(answers)


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


def _hand_out(answers: _Answers) -> None:
    """Pass on what the last step made."""
    for number, handle in list(answers.handles.items()):
        answers.started = answers.started or handle.is_running or bool(handle.produced)
        if handle.produced:
            answers.cached[number] = handle.num_cached
        while handle.produced:
            token = handle.produced.popleft()
            answers.results.put((number, token))
            if token.finish_reason is not None:
                answers.handles.pop(number, None)
        if handle.error is not None:
            if not isinstance(handle.error, UserError):
                length = len(answers.requests[number].prompt_ids)
                logger.error("failed on a prompt of %d", length, exc_info=handle.error)
            answers.results.put(handle.error)
            answers.handles.pop(number, None)


class AnswerStream:
    """Tokens of the answers to one HTTP request, as steps make them; close it in any case."""

    def __init__(self, worker: EngineWorker, answers: _Answers, gone: Gone) -> None:
        self._worker, self._answers, self._gone = worker, answers, gone

    def __iter__(self) -> Iterator[tuple[int, Token]]:
        """Yield each token with the number of its request, for ever: the caller knows the end.

        Raises:
            ApiError: 400 when the engine refuses a request, 500 when it fails, 503 when the server
                stops.
            ClientGoneError: the client left.
        """
        while True:
            self._worker.check(self._gone)
            try:
                item = self._answers.results.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(item, Exception):
                raise _as_api_error(item) from item
            yield item

    def num_cached(self, number: int) -> int:
        """Return how many tokens of an answer's prompt the cache had; it has begun."""
        return self._answers.cached[number]

    def drop(self, number: int) -> None:
        """End one answer: a stop string has come."""
        self._answers.dropped.put(number)

    def close(self) -> None:
        """Leave; what still runs ends with the step that is being computed."""
        self._worker.forget(self._answers)


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, UserError) and not isinstance(error, BrokenLogitsError):
        return ApiError(str(error), code="refused_by_engine")
    said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return ApiError(f"the engine failed ({said})", status=500, code="engine_error")
