"""What bench_generation.py and bench_engine.py ask of every engine that schedules by itself.

A file for each engine has a :class:`Stepped`; the cells and loads over it are written once, here.
Its command is ``FILE MODEL THREADS STEP_TOKENS PREFIX_CACHE CHECK``: the most tokens of a step, on
or off, and the file for what it says of the prompt.
"""

import itertools
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import generation_models as shared
from interleave import Run, serve

# Requests that run at once, at most, tokens of the longest, and tokens of the cache where an engine
# cannot change it.
MOST, LONGEST, CACHE = 32, max(shared.PROMPTS) + 64, 40960
_GROWN = shared.STEPS * (shared.TURNS + 1)
_ROOM = (24, 1600)  # what loads need


class Stepped(Protocol):
    """An engine that does a step when it is told to, and takes the likeliest tokens."""

    vocabulary: int

    def add(self, ids: list[int], new: int) -> int:
        """Queue a request for exactly so many tokens; return its number."""

    def step(self) -> dict[int, int]:
        """Run a step; return how many tokens each request got by it."""

    def clear(self, sequences: int, tokens: int) -> None:
        """Drop all requests; so many will come at once, with so many tokens at most."""

    def write_logprobs(self, file: Path) -> None:
        """Write what it says of the prompt's last tokens: logits, or log-probabilities.

        Log-probabilities are of the tokens themselves, logits of what follows each.
        """


class Cases:
    """The cells of bench_generation.py and the loads of bench_engine.py.

    Args:
        engine: runs them.
        check: where it writes what it says of the prompt.
    """

    def __init__(self, engine: Stepped, check: Path) -> None:
        self._engine, self._check = engine, check
        self._ids = shared.prompt(engine.vocabulary).tolist()

    def _prompt(self, length: int) -> None:
        self._engine.add(self._ids[:length], 1)
        while not self._engine.step():
            pass

    def _decode(self, batch: int) -> Run:
        for _ in range(batch):
            self._engine.add(self._ids[: shared.CONTEXT], _GROWN)
        started: set[int] = set()
        while len(started) < batch:
            started |= self._engine.step().keys()

        def run() -> None:
            # Tokens are counted, since an engine may hand them out a step later.
            wanted = batch * shared.STEPS
            while wanted > 0:
                wanted -= sum(self._engine.step().values())

        return run

    def make(self, case: str) -> Run:
        """Return what a case runs."""
        name, _, number = case.rpartition(" ")
        if case == "check":
            self._engine.clear(1, shared.PROMPT + 1)
            return lambda: self._engine.write_logprobs(self._check)
        if name == "prompt":
            self._engine.clear(1, int(number) + 1)
            return lambda: self._prompt(int(number))
        if name == "decode":
            self._engine.clear(int(number), shared.CONTEXT + _GROWN)
            return self._decode(int(number))
        self._engine.clear(*_ROOM)
        load = LOADS[name]
        return lambda: load(self._engine, int(number))


# --- loads ----------------------------------------------------------------------------------------


@dataclass
class Asked:
    """A request of a load: its prompt, the length of its answer, and when tokens came."""

    ids: list[int]
    new: int
    began: float = 0.0
    came: list[float] | None = None

    @property
    def first(self) -> float:
        """Seconds to its first token."""
        assert self.came
        return self.came[0] - self.began


def drive(
    engine: Stepped,
    requests: list[Asked],
    clients: int,
    late: Callable[[int], list[Asked]] = lambda _: [],
) -> float:
    """Answer requests, as many at a time as there are clients; return seconds.

    Args:
        engine: has no other requests.
        requests: in the order in which they are asked; each gets its times.
        clients: each asks when its last answer is there.
        late: what comes beside, whoever waits, by the number of steps so far.
    """
    waiting, running = deque(requests), dict[int, Asked]()
    begin = time.perf_counter()

    def ask(one: Asked) -> None:
        one.began, one.came = time.perf_counter(), []
        running[engine.add(one.ids, one.new)] = one

    beside = 0
    for number in itertools.count():
        extra = late(number)
        beside += len(extra)
        for one in extra:
            ask(one)
        while waiting and len(running) - beside < clients:
            ask(waiting.popleft())
        if not running:
            return time.perf_counter() - begin
        got = engine.step()
        now = time.perf_counter()
        for key, count in got.items():
            one = running[key]
            assert one.came is not None
            one.came += [now] * count
            if len(one.came) >= one.new:
                del running[key]
                beside -= one in extra
    raise AssertionError("a count has no end")


def _random(engine: Stepped, load: str, turn: int) -> Callable[[int], list[int]]:
    """Return what draws ids: others for each load and turn: engines keep caches."""
    import numpy as np

    random = np.random.default_rng([*load.encode(), turn])
    return lambda length: random.integers(3, engine.vocabulary, length).tolist()


def _figures(requests: list[Asked], seconds: float) -> dict[str, float]:
    firsts = sorted(one.first for one in requests)
    return {
        "seconds": seconds,
        "tokens_per_second": sum(one.new for one in requests) / seconds,
        "first_p50": firsts[len(firsts) // 2],
        "first_p95": firsts[int(0.95 * (len(firsts) - 1))],
    }


def _clients(count: int) -> Callable[[Stepped, int], dict[str, float]]:
    """Return a load of clients that ask twice: prompts of 64 to 256 tokens, answers of 32."""

    def load(engine: Stepped, turn: int) -> dict[str, float]:
        draw = _random(engine, f"clients {count}", turn)
        lengths = [64 + 192 * n // (2 * count - 1) for n in range(2 * count)]
        # Long and short ones alternate.
        order = [lengths[n // 2 if n % 2 else -1 - n // 2] for n in range(2 * count)]
        requests = [Asked(draw(length), 32) for length in order]
        return _figures(requests, drive(engine, requests, count))

    return load


def _prefix(clients: int) -> Callable[[Stepped, int], dict[str, float]]:
    """Return a load of 16 requests of 1,000 shared and 32 own tokens, answers of 16."""

    def load(engine: Stepped, turn: int) -> dict[str, float]:
        draw = _random(engine, f"prefix {clients}", turn)
        common = draw(1000)
        requests = [Asked(common + draw(32), 16) for _ in range(16)]
        found = _figures(requests, drive(engine, requests, clients))
        later = sorted(one.first for one in requests[8:])
        return found | {"first_of_later": later[len(later) // 2]}

    return load


def _pauses(engine: Stepped, turn: int) -> dict[str, float]:
    """Run 22 answers beside which two prompts of 1,500 tokens come: the longest pause in one."""
    draw = _random(engine, "pauses", turn)
    requests = [Asked(draw(32), 40) for _ in range(22)]
    long = [Asked(draw(1500), 4) for _ in range(2)]
    seconds = drive(engine, requests, 22, lambda number: long if number == 12 else [])
    gaps = [b - a for one in requests for a, b in itertools.pairwise(one.came or [])]
    return _figures(requests, seconds) | {
        "worst_pause": max(gaps),
        "first_of_long": max(one.first for one in long),
    }


LOADS: dict[str, Callable[[Stepped, int], dict[str, Any]]] = {
    "8 clients": _clients(8),
    "24 clients": _clients(24),
    "prefix, 8 at a time": _prefix(8),
    "prefix, together": _prefix(16),
    "pauses, 24": _pauses,
}


def serve_engine(engine: Callable[[Path, int, int, bool], Stepped]) -> None:
    """Be the worker that the command line asks for."""
    model, threads, step_tokens, prefix_cache, check = sys.argv[1:]
    started = engine(Path(model), int(threads), int(step_tokens), prefix_cache == "on")
    serve(Cases(started, Path(check)).make)
