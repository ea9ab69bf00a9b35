"""What is known of one HTTP request: for the log, the metrics, and the limits of its key.

A request's :class:`Watch` is made when its head has been read and closed with the last byte of its
response. :func:`llm.serving.requests.run` tells it of every token.
"""

import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from llm.serving.errors import ApiError, ClientGoneError
from llm.serving.metrics import Metrics
from llm.serving.rates import Charge
from llm.serving.text import Piece


@cache
def _unseen() -> Metrics:
    """Where is counted what nobody scrapes: answers that no server asks for."""
    return Metrics()


@dataclass(eq=False)
class _Times:
    """When things happened to one answer, as ``time.monotonic`` says."""

    num_prompt: int
    max_tokens: int
    started: float = 0.0  # its first step
    first: float = 0.0  # its first token
    last: float = 0.0
    num_tokens: int = 0


@dataclass(eq=False)
class Watch:
    """One HTTP request.

    Args:
        metrics: of the server.
        request_id: by which logs and clients name it.
        key: name of its API key, where keys have names.
        model: that answers, as the client calls it.
        charge: tokens that were taken off its key's limit beforehand.
    """

    metrics: Metrics = field(default_factory=_unseen)
    request_id: str = ""
    key: str | None = None
    model: str | None = None
    charge: Charge | None = None
    num_prompt: int = 0
    num_cached: int = 0
    num_generated: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    error: str | None = None  # the code of an error
    body: bytes | None = None  # as it was sent, where texts are logged
    texts: dict[int, str] = field(default_factory=dict)  # answers, likewise
    with_texts: bool = False
    begin: float = field(default_factory=time.monotonic)
    _open: dict[int, _Times] = field(default_factory=dict)
    _one: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def client(self) -> str:
        """Who takes turns with others in the engine: the key, or the request where none is named.

        Without names each HTTP request is a client of its own: one with many choices lets others
        through.
        """
        return self._one if self.key is None else f"key {self.key}"

    @contextmanager
    def answering(self, model: str, prompts: Sequence[tuple[int, int]], n: int) -> Iterator[None]:
        """Count what ends within the block, or does not.

        Args:
            model: whose series count it.
            prompts: tokens of each answer's prompt, and the most it may have itself.
            n: answers to a prompt.
        """
        self._series = series = self.metrics.of(model)
        series.request_n.observe(n)
        self._open = {number: _Times(*one) for number, one in enumerate(prompts)}
        self._begun: set[int] = set()
        self._n = n
        try:
            yield
        except BaseException as error:
            left = isinstance(error, GeneratorExit | ClientGoneError)
            stopping = isinstance(error, ApiError) and error.status == 503
            reason = "abort" if left or stopping else "error"
            for number in list(self._open):
                self.ended(number, reason)
            raise

    def token(self, number: int, started: float, num_cached: int, *, kept: bool = True) -> None:
        """Note an answer's next token.

        Args:
            number: of the answer.
            started: when its first step began.
            num_cached: tokens of its prompt that were in the cache.
            kept: it is part of the answer; none is where only the prompt is scored.
        """
        now = time.monotonic()
        times, series = self._open[number], self._series
        if times.num_tokens == 0:
            times.started, times.first = started, now
            self._first(times, number // self._n, num_cached)
        else:
            series.inter_token.observe(now - times.last)
        times.last = now
        if not kept:
            return
        times.num_tokens += 1
        self.num_generated += 1
        series.generation_tokens.inc()

    def _first(self, times: _Times, prompt: int, num_cached: int) -> None:
        self._series.first_token.observe(times.first - self.begin)
        if self.first_token_seconds is None:
            self.first_token_seconds = times.first - self.begin
            self.queue_seconds = max(times.started - self.begin, 0.0)
        if prompt not in self._begun:
            self._begun.add(prompt)
            self.num_prompt += times.num_prompt
            self.num_cached += num_cached
            self._series.prompt_tokens.inc(times.num_prompt)

    def ended(self, number: int, reason: str) -> None:
        """Note why an answer ended.

        Args:
            number: of the answer.
            reason: ``stop``, ``length``, ``abort`` (nobody waits any more) or ``error``.
        """
        times, series = self._open.pop(number), self._series
        self.reasons[reason] += 1
        series.success[reason].inc()
        series.request_prompt.observe(times.num_prompt)
        series.request_max.observe(times.max_tokens)
        series.request_generation.observe(times.num_tokens)
        now = time.monotonic()
        series.whole.observe(now - self.begin)
        if not times.first:
            return
        started = max(times.started, self.begin)
        series.queue.observe(started - self.begin)
        series.prefill.observe(times.first - started)
        series.decode.observe(times.last - times.first)
        series.inference.observe(times.last - started)
        if times.num_tokens > 1:
            series.per_token.observe((times.last - times.first) / (times.num_tokens - 1))

    def text(self, number: int, pieces: Iterable[Piece]) -> None:
        """Keep what an answer says, where texts are logged."""
        if self.with_texts:
            said = "".join(piece.text for piece in pieces)
            self.texts[number] = self.texts.get(number, "") + said

    def settle(self) -> None:
        """Take off the key's limit what was used, and count it."""
        if self.charge is not None:
            self.charge.settle(self.num_prompt + self.num_generated)
        if self.key is not None:
            self.metrics.key_tokens.labels(self.key, "prompt").inc(self.num_prompt)
            self.metrics.key_tokens.labels(self.key, "generation").inc(self.num_generated)

    def close(self) -> float:
        """Settle the account at the last byte; return how long it took, in seconds."""
        self.settle()
        return time.monotonic() - self.begin

    def entry(self) -> dict[str, Any]:
        """Return what the access log says of it; None where there is nothing to say."""
        rounded = [
            None if value is None else round(value, 6)
            for value in (self.queue_seconds, self.first_token_seconds)
        ]
        generated = self.reasons or self.num_generated
        return {
            "request_id": self.request_id,
            "key": self.key,
            "model": self.model,
            "error": self.error,
            "prompt_tokens": self.num_prompt if generated else None,
            "cached_tokens": self.num_cached if generated else None,
            "completion_tokens": self.num_generated if generated else None,
            "finish_reasons": dict(self.reasons) or None,
            "queue_seconds": rounded[0],
            "first_token_seconds": rounded[1],
            "request": None if self.body is None else self.body.decode("utf-8", "replace"),
            "answers": [self.texts[number] for number in sorted(self.texts)] or None,
        }
