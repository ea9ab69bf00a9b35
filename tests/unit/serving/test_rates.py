"""No 60 seconds hold more than a key's limit, by the times of what was let through."""

import math
import random

import pytest

from llm.serving.errors import ApiError
from llm.serving.rates import Rates, Window, duration


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("seed", range(5))
def test_no_minute_holds_more(seed: int) -> None:
    """Every window of a random load is added up from the list of what was taken."""
    rng, clock = random.Random(seed), Clock()
    window = Window(100, clock)
    taken: list[tuple[float, int]] = []
    waits = 0
    for _ in range(400):
        clock.now += rng.expovariate(1 / 3)
        amount = rng.randrange(1, 60)
        wait = window.wait(amount)
        last = [size for at, size in taken if at > clock.now - 60]
        assert window.remaining == 100 - sum(last)
        if wait:
            waits += 1
            assert sum(last) + amount > 100, "nothing waits while there is room"
            clock.now += wait - 1e-6
            assert window.wait(amount), "and not a moment less than is said"
            clock.now += 2e-6
            assert not window.wait(amount)
        window.take(amount)
        taken.append((clock.now, amount))
    assert waits > 20
    for end, _ in taken:
        assert sum(size for at, size in taken if end - 60 < at <= end) <= 100


def test_tokens_that_were_not_used_come_back() -> None:
    clock = Clock()
    rates = Rates("alice", tokens=1000, clock=clock)
    charge = rates.take_tokens(900)
    with pytest.raises(ApiError, match="'alice' has 1000 tokens per minute, 900 are taken"):
        rates.take_tokens(200)
    charge.settle(50)
    rates.take_tokens(900)
    assert rates.headers()["x-ratelimit-remaining-tokens"] == "50"
    clock.now += 61
    charge.settle(700)  # what is long forgotten changes nothing
    assert rates.headers()["x-ratelimit-remaining-tokens"] == "1000"


def test_what_openai_clients_are_told() -> None:
    clock = Clock()
    rates = Rates("bob", requests=2, tokens=50, clock=clock)
    rates.take_request()
    clock.now += 20.25
    rates.take_request()
    with pytest.raises(ApiError) as refused:
        rates.take_request()
    error = refused.value
    assert (error.status, error.code, error.kind) == (429, "rate_limit_exceeded", "requests")
    assert error.retry_after == 40, "whole seconds, and not too few: 39.75"
    assert "try again in 39.75s" in error.message
    assert rates.headers() == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
        "x-ratelimit-limit-tokens": "50",
        "x-ratelimit-remaining-tokens": "50",
        "x-ratelimit-reset-tokens": "0ms",
    }
    with pytest.raises(ApiError, match="this request alone may come to 51") as refused:
        rates.take_tokens(51)
    assert refused.value.headers == {"x-should-retry": "false"} and not refused.value.retry_after
    clock.now += 39.75
    rates.take_request()


def test_limits_that_change_while_they_count() -> None:
    clock = Clock()
    rates = Rates("c", requests=5, clock=clock)
    for _ in range(5):
        rates.take_request()
    rates.limit(7, None)
    rates.take_request()
    rates.limit(None, None)
    rates.take_request()
    assert rates.headers() == {}
    rates.take_tokens(10**9).settle(3)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0ms"), (0.0121, "13ms"), (1, "1s"), (8.64, "8.64s"), (60, "1m0s"), (372.5, "6m12.5s")],
)
def test_duration(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_more_than_a_minute_holds_never_fits() -> None:
    assert Window(10, Clock()).wait(11) == math.inf
