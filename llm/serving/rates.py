"""Requests and tokens per minute of one API key, held over every 60 seconds.

A window is a log of what the last minute has taken, so that no 60 seconds ever hold more than the
limit; a bucket that fills up again would let twice as much through. Statuses, headers and their
values are those of OpenAI's API: https://platform.openai.com/docs/guides/rate-limits
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from llm.serving.errors import ApiError

MINUTE = 60.0

Clock = Callable[[], float]


@dataclass(eq=False)
class _Taken:
    at: float
    amount: int


class Window:
    """What was taken in the last 60 seconds. Not thread-safe.

    Args:
        limit: the most of 60 seconds.
        clock: seconds that only grow.
    """

    def __init__(self, limit: int, clock: Clock = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._log: deque[_Taken] = deque()
        self._sum = 0

    def _forget(self) -> float:
        """Drop what is a minute old; return the time."""
        now = self._clock()
        while self._log and self._log[0].at <= now - MINUTE:
            self._sum -= self._log.popleft().amount
        return now

    @property
    def remaining(self) -> int:
        """What may be taken now."""
        self._forget()
        return max(self.limit - self._sum, 0)

    @property
    def reset(self) -> float:
        """Seconds until nothing of it counts any more, if nothing is taken."""
        now = self._forget()
        return self._log[-1].at + MINUTE - now if self._log else 0.0

    def wait(self, amount: int) -> float:
        """Return for how many seconds an amount has to wait: 0 if it may be taken now.

        Infinite where it is more than the limit.
        """
        now = self._forget()
        excess = self._sum + amount - self.limit
        if excess <= 0:
            return 0.0
        for one in self._log:
            excess -= one.amount
            if excess <= 0:
                return one.at + MINUTE - now
        return math.inf

    def take(self, amount: int) -> _Taken:
        """Take an amount; :meth:`wait` has said that it may be."""
        taken = _Taken(self._forget(), amount)
        self._log.append(taken)
        self._sum += amount
        return taken

    def change(self, taken: _Taken, amount: int) -> None:
        """Let what was taken count as another amount from the same time on."""
        if taken.at > self._forget() - MINUTE:
            self._sum += amount - taken.amount
        taken.amount = amount


class Rates:
    """Both limits of one key; any number of threads.

    Args:
        name: of the key, for messages.
        requests: the most per minute; None is no limit.
        tokens: of prompts and answers, likewise.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        name: str,
        requests: int | None = None,
        tokens: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._clock = clock
        self._windows: dict[str, Window] = {}
        self.limit(requests, tokens)

    def limit(self, requests: int | None, tokens: int | None) -> None:
        """Set the limits; what the last minute has taken goes on to count."""
        with self._lock:
            for what, most in (("requests", requests), ("tokens", tokens)):
                if most is None:
                    self._windows.pop(what, None)
                elif what in self._windows:
                    self._windows[what].limit = most
                else:
                    self._windows[what] = Window(most, self._clock)

    def take_request(self) -> None:
        """Count a request.

        Raises:
            ApiError: 429, the minute is full.
        """
        self._take("requests", 1)

    def take_tokens(self, amount: int) -> "Charge":
        """Count the tokens that a request may come to, before it runs.

        Raises:
            ApiError: 429, the minute is full, or the amount is more than a minute holds.
        """
        return Charge(self._lock, self._take("tokens", amount))

    def _take(self, what: str, amount: int) -> tuple[Window, _Taken] | None:
        with self._lock:
            window = self._windows.get(what)
            if window is None:
                return None
            wait = window.wait(amount)
            if not wait:
                return window, window.take(amount)
            used = window.limit - window.remaining
        told = f"the key {self._name!r} has {window.limit} {what} per minute"
        if math.isinf(wait):
            raise ApiError(
                f"{told}, and this request alone may come to {amount} with its prompt and the most "
                "that it asks for; shorten the prompt, or ask for fewer new tokens or choices",
                status=429,
                code="rate_limit_exceeded",
                kind=what,
                headers={"x-should-retry": "false"},  # which OpenAI's clients obey
            )
        raise ApiError(
            f"{told}, {used} are taken and this request asks for {amount}; try again in "
            f"{duration(wait)}",
            status=429,
            code="rate_limit_exceeded",
            kind=what,
            retry_after=math.ceil(wait),
        )

    def headers(self) -> dict[str, str]:
        """Return OpenAI's headers about the limits that there are."""
        with self._lock:
            return {
                f"x-ratelimit-{name}-{what}": value
                for what, window in self._windows.items()
                for name, value in (
                    ("limit", str(window.limit)),
                    ("remaining", str(window.remaining)),
                    ("reset", duration(window.reset)),
                )
            }


class Charge:
    """Tokens that a request may come to, taken off its key's limit until it is known how many."""

    def __init__(self, lock: threading.Lock, taken: tuple[Window, _Taken] | None) -> None:
        self._lock, self._taken = lock, taken

    def settle(self, amount: int) -> None:
        """Let the request count as the tokens that it came to."""
        if self._taken is not None:
            window, taken = self._taken
            with self._lock:
                window.change(taken, amount)


def duration(seconds: float) -> str:
    """Return a time as OpenAI writes it: ``12ms``, ``1.5s``, ``6m0s``."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds, 3), 60)
    return f"{int(minutes)}m{rest:.3g}s" if minutes else f"{rest:.5g}s"
