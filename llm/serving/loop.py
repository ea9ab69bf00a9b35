"""The one thread that owns the engine, and the line of requests in front of it.

Loading and every step run on the same thread: OpenMP keeps a pool of workers per calling thread,
and generating from many HTTP threads would multiply them. HTTP threads wait for their turn with
:meth:`EngineWorker.turn`, then read tokens with :meth:`EngineWorker.stream`; while they wait they
look whether their client is still there.
"""

import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from common.errors import UserError
from llm.engine.opening import OpenedModel
from llm.engine.request import BrokenLogitsError, Request, Token
from llm.serving.errors import ApiError, ClientGoneError

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1  # how soon a vanished client or a shutdown is noticed
_END = object()

Gone = Callable[[], bool]


class EngineLike(Protocol):
    """The part of :class:`llm.engine.engine.Engine` that serving uses."""

    max_model_len: int

    def stream(self, request: Request) -> Iterator[Token]: ...


class Served(NamedTuple):
    """A loaded model and the one engine over it."""

    model: OpenedModel
    engine: EngineLike


class _Generation:
    """One prompt on its way through the engine thread."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.cancelled = threading.Event()
        self.results: queue.SimpleQueue[Any] = queue.SimpleQueue()


class EngineWorker:
    """Loads the model in the background, then serves one generation at a time in order.

    Args:
        load: opens the model; runs on the engine's thread.
        max_queue: requests that may wait behind the running one.
    """

    def __init__(self, load: Callable[[], Served], max_queue: int) -> None:
        self._load = load
        self._max_queue = max_queue
        self._inbox: queue.SimpleQueue[_Generation | None] = queue.SimpleQueue()
        self._line: deque[object] = deque()  # tickets; the first one has its turn
        self._line_moved = threading.Condition()
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
        """Stop the running generation, turn away those who wait, end the thread."""
        self._stopping.set()
        with self._line_moved:
            self._line_moved.notify_all()
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
        """Requests that have their turn: 0 or 1."""
        return min(len(self._line), 1)

    @property
    def num_waiting(self) -> int:
        """Requests in line behind the running one."""
        return max(len(self._line) - 1, 0)

    @contextlib.contextmanager
    def turn(self, gone: Gone) -> Iterator[None]:
        """Wait in line; inside the ``with`` block the engine is the caller's.

        Args:
            gone: tells whether the client has closed its connection.

        Raises:
            ApiError: 503 when the line is full or the server stops.
            ClientGoneError: the client left while waiting.
        """
        ticket = object()
        with self._line_moved:
            if len(self._line) > self._max_queue:
                raise ApiError(
                    f"{self.num_waiting} requests wait already and the limit is {self._max_queue} "
                    "(--max_queue); try again later",
                    status=503,
                    code="overloaded",
                    retry_after=1,
                )
            self._line.append(ticket)
        try:
            with self._line_moved:
                while self._line[0] is not ticket:
                    self._line_moved.wait(POLL_SECONDS)
                    self._check(gone)
            yield
        finally:
            with self._line_moved:
                self._line.remove(ticket)
                self._line_moved.notify_all()

    def stream(self, request: Request, gone: Gone) -> Iterator[Token]:
        """Yield the engine's tokens for one request; closing the iterator stops the generation.

        Args:
            request: a prompt and how to answer it.
            gone: tells whether the client has closed its connection.

        Raises:
            ApiError: 400 when the engine refuses the request, 500 when it fails, 503 when the
                server stops.
            ClientGoneError: the client left.
        """
        generation = _Generation(request)
        self._inbox.put(generation)
        try:
            while True:
                self._check(gone)
                try:
                    item = generation.results.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                if item is _END:
                    self._check(gone)  # the engine also ends early when the server stops
                    return
                if isinstance(item, BrokenLogitsError):
                    raise ApiError(str(item), status=500, code="engine_error") from item
                if isinstance(item, UserError):
                    raise ApiError(str(item), code="refused_by_engine") from item
                if isinstance(item, Exception):
                    raise ApiError(
                        f"the engine failed ({type(item).__name__}: {item}); the server's log has "
                        "the details",
                        status=500,
                        code="engine_error",
                    ) from item
                yield item
        finally:
            generation.cancelled.set()

    def _check(self, gone: Gone) -> None:
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
        while (generation := self._inbox.get()) is not None:
            self._generate(self._served.engine, generation)

    def _generate(self, engine: EngineLike, generation: _Generation) -> None:
        stopped = generation.cancelled.is_set
        if stopped() or self._stopping.is_set():
            generation.results.put(_END)
            return
        try:
            tokens = engine.stream(generation.request)
            with contextlib.closing(tokens):
                for token in tokens:
                    generation.results.put(token)
                    if stopped() or self._stopping.is_set():
                        break
        except UserError as error:
            generation.results.put(error)
        except Exception as error:
            logger.exception(
                "the engine failed on a prompt of %d", len(generation.request.prompt_ids)
            )
            generation.results.put(error)
        generation.results.put(_END)
