"""The engine as routes see it, from the HTTP process: requests go to it, tokens come back.

HTTP threads hand requests over with :meth:`EngineWorker.open` and read the tokens that steps give
them; meanwhile they look whether their client is still there. The engine's side is
:class:`llm.serving.steps.EngineSteps`, at the other end of a link.
"""

import itertools
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from data.tokenizer import Tokenizer
from llm.engine.request import Request, Token
from llm.engine.stats import EngineStats
from llm.serving.errors import ApiError, ClientGoneError
from llm.serving.link import Event, Failure, Link
from llm.serving.served import EngineLimits, ModelFacts, ServedModel

# Faster than a reader sees text grow. Each time wakes the thread of each stream, which costs more
# than a token's text does; what engines make that take longer for a step is told at once.
_TELLING_S = 0.02
POLL_SECONDS = 0.1  # how soon a vanished client or a shutdown is noticed

Gone = Callable[[], bool]


class Served(NamedTuple):
    """A model that answers and the limits of its engine, as routes see them."""

    model: ServedModel
    engine: EngineLimits

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may call a model: the model itself, then its adapters."""
        return self.model.name, *self.model.adapter_names

    def adapter(self, model_id: str | None) -> str | None:
        """Return the adapter that a request for a model of that name runs with, if any."""
        return model_id if model_id in self.model.adapter_names else None


class _Answers:
    """The answers to one HTTP request on their way."""

    def __init__(self, number: int, count: int) -> None:
        self.id = number
        # What has come of it by then, at once: each waking of its thread has a price.
        self.results: queue.SimpleQueue[list[tuple[int, Token | Failure]]] = queue.SimpleQueue()
        self.num_left = count  # answers that have not ended
        # Of those that have begun: prompt tokens that were there, and when it was.
        self.cached: dict[int, int] = {}
        self.started: dict[int, float] = {}

    def take(self, events: Sequence[Event]) -> None:
        """Hand on what a step made."""
        for event in events:
            if isinstance(event.what, Failure) or event.what.finish_reason is not None:
                self.num_left -= 1
            self.cached.setdefault(event.number, event.num_cached)
            self.started.setdefault(event.number, event.started)
        self.results.put([(event.number, event.what) for event in events])


class EngineWorker:
    """The engine at the other end of a link.

    Args:
        link: to the engine's side.
        max_queue: requests that may wait beside those that the engine runs together.
        tokenizer: the model's.
        on_lost: is called when the engine's side ends before it said so.
    """

    def __init__(
        self,
        link: Link,
        max_queue: int,
        tokenizer: Tokenizer,
        *,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._link, self._max_queue, self._tokenizer = link, max_queue, tokenizer
        self._on_lost = on_lost
        self._ids = itertools.count()
        self._open: dict[int, _Answers] = {}
        self._changes: dict[int, queue.SimpleQueue[Failure | None]] = {}
        self._lock = threading.Lock()  # of both, and of what steps computed
        self._idle = threading.Condition(self._lock)
        self._loaded = threading.Event()
        self._asked = threading.Event()  # to drain
        self._stopping = threading.Event()
        self._served: Served | None = None
        self._stats: EngineStats | None = None
        self._step_tokens: Counter[int] = Counter()
        self._held: list[Event] = []  # the reading thread's, as what follows
        self._told = 0.0  # when events were handed out
        self._thread = threading.Thread(target=self._read, name="tokens", daemon=True)
        self.drain_seconds = 0.0

    def start(self) -> None:
        """Begin to hear the engine; returns at once."""
        self._thread.start()

    def wait_loaded(self, timeout: float | None = None) -> bool:
        """Wait for the model; False when ``timeout`` seconds passed before, or the server stops."""
        self._loaded.wait(timeout)
        return self._served is not None

    def wait_asked(self) -> None:
        """Wait until the engine's side asks to stop; from then on nothing new is taken."""
        self._asked.wait()

    def drain(self) -> int:
        """Wait for what runs and waits, for as long as was asked; return how many are left."""
        with self._idle:
            self._idle.wait_for(lambda: not self._open, self.drain_seconds)
            return len(self._open)

    def close(self) -> None:
        """End all answers that are left; their clients are told."""
        self._asked.set()
        self._stopping.set()

    @property
    def status(self) -> str:
        """``loading``, ``ok`` or ``stopping``."""
        if self._asked.is_set():
            return "stopping"
        return "ok" if self._served is not None else "loading"

    @property
    def loaded(self) -> Served | None:
        """What :attr:`served` is, also while the server stops; None before the model is loaded."""
        return self._served

    @property
    def served(self) -> Served:
        """The model that answers now, and the limits of its engine.

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
    def stats(self) -> EngineStats | None:
        """What the engine counted up to its last step; None before the model is loaded."""
        return self._stats

    @property
    def step_tokens(self) -> dict[int, int]:
        """How many steps computed how many tokens."""
        with self._lock:
            return dict(self._step_tokens)

    @property
    def num_running(self) -> int:
        """Answers that took part in the last step and go on."""
        return 0 if self._stats is None else self._stats.num_running

    @property
    def num_waiting(self) -> int:
        """Answers that somebody waits for and that do not run, or have given way."""
        with self._lock:
            left = sum(one.num_left for one in self._open.values())
        return max(left - self.num_running, 0)

    def change_adapters(self, name: str, directory: str | None, *, replace: bool = False) -> None:
        """Load an adapter that requests may name from then on, or unload it.

        Args:
            name: by which requests ask for it.
            directory: in PEFT's layout; None unloads.
            replace: another one of the name gives way.

        Raises:
            ApiError: 400, see ``llm.llama.adapters.per_request.RequestAdapters``, or an exported
                program, which takes none; 503 while loading or stopping.
        """
        assert self.served  # or it raises
        result: queue.SimpleQueue[Failure | None] = queue.SimpleQueue()
        number = next(self._ids)
        self._changes[number] = result
        self._link.send("change", number, name, directory, replace)
        while True:
            self.check(lambda: False)
            try:
                failure = result.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if failure is not None:
                raise failure.as_error()
            return

    def open(self, requests: Sequence[Request], gone: Gone) -> "AnswerStream":
        """Hand over requests that belong together; their answers come as one stream.

        Args:
            requests: prompts and how to answer them.
            gone: tells whether the client has closed its connection.

        Raises:
            ApiError: 503 when too many wait, or while loading or stopping.
        """
        most = self.served.engine.max_sequences
        with self._lock:
            if len(self._open) >= most + self._max_queue:
                raise ApiError(
                    f"{most} requests run together (--max_num_seqs), {len(self._open) - most} "
                    f"wait already and the limit is {self._max_queue} (--max_queue); try again "
                    "later",
                    status=503,
                    code="overloaded",
                    retry_after=1,
                )
            answers = _Answers(next(self._ids), len(requests))
            self._open[answers.id] = answers
        self._link.send("open", answers.id, list(requests))
        return AnswerStream(self, answers, gone)

    def drop(self, answers: _Answers, number: int) -> None:
        """End one answer of a request with the step that is being computed."""
        self._link.send("drop", answers.id, number)

    def forget(self, answers: _Answers) -> None:
        """Take a request out of the count; the engine drops what it has of it after its step."""
        with self._idle:
            self._open.pop(answers.id, None)
            self._idle.notify_all()
        self._link.send("close", answers.id)

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

    def _read(self) -> None:
        """Hand out what the engine's side sends, until it ends."""
        while True:
            left = self._told + _TELLING_S - time.monotonic() if self._held else None
            try:
                message = self._link.receive(left and max(left, 0.0))
            except EOFError:
                if not self._asked.is_set():
                    self._on_lost()
                self.close()
                self._loaded.set()
                return
            name, *args = message or ("nothing",)
            if name == "nothing":
                self._tell()
            elif name == "step":
                self._step(*args)
            elif name == "changed":
                self._changed(*args)
            elif name == "loaded":
                self._know(*args)
                self._loaded.set()
            else:
                (self.drain_seconds,) = args
                self._asked.set()
                self._loaded.set()

    def _know(self, facts: ModelFacts, limits: EngineLimits, stats: EngineStats) -> None:
        self._stats = stats
        self._served = Served(ServedModel(facts, self._tokenizer), limits)

    def _step(self, events: Sequence[Event], stats: EngineStats) -> None:
        """Take what a step made; tell of it, but not of what goes on and has just been told of."""
        self._stats = stats  # before anybody hears the end of an answer
        if stats.num_step_tokens:
            with self._lock:
                self._step_tokens[stats.num_step_tokens] += 1
        self._held += events
        late = time.monotonic() - self._told >= _TELLING_S
        if late or any(self._turns(event) for event in events):
            self._tell()

    def _turns(self, event: Event) -> bool:
        """Whether an answer begins or ends with it."""
        if isinstance(event.what, Failure) or event.what.finish_reason is not None:
            return True
        answers = self._open.get(event.id)
        return answers is not None and event.number not in answers.cached

    def _tell(self) -> None:
        """Hand out what is held."""
        held, self._held = self._held, []
        self._told = time.monotonic()
        of_each: dict[int, list[Event]] = {}
        for event in held:
            of_each.setdefault(event.id, []).append(event)
        for number, events in of_each.items():
            if (answers := self._open.get(number)) is not None:  # else closed meanwhile
                answers.take(events)

    def _changed(self, number: int, failure: Failure | None, facts: ModelFacts) -> None:
        if self._served is not None:
            # Another one: who has checked a request's model goes on with what it has seen.
            model = ServedModel(facts, self._tokenizer)
            self._served = self._served._replace(model=model)
        self._changes.pop(number).put(failure)


class AnswerStream:
    """Tokens of the answers to one HTTP request, as steps make them; close it in any case."""

    def __init__(self, worker: EngineWorker, answers: _Answers, gone: Gone) -> None:
        self._worker, self._answers, self._gone = worker, answers, gone
        self._ended: set[int] = set()

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
                items = self._answers.results.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            for number, what in items:
                if isinstance(what, Failure):
                    raise what.as_error()
                if what.finish_reason is not None:
                    self._ended.add(number)
                yield number, what

    def num_cached(self, number: int) -> int:
        """Return how many tokens of an answer's prompt the cache had; it has begun."""
        return self._answers.cached[number]

    def started(self, number: int) -> float:
        """Return when an answer left the queue, as ``time.monotonic`` says; it has begun."""
        return self._answers.started[number]

    def drop(self, number: int) -> None:
        """End one answer, if it has not ended: a stop string has come."""
        if number not in self._ended:
            self._worker.drop(self._answers, number)

    def close(self) -> None:
        """Leave; what still runs ends with the step that is being computed."""
        self._worker.forget(self._answers)
