"""Random loads of an engine: requests of all kinds that come over time, and some that leave."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm.engine.engine import Engine
from llm.engine.request import Request, SamplingParams, Token
from llm.engine.speculation import Speculator, Wanted

MOST = 64  # tokens of prompt and answer
FIRST_ID = 3  # those before it are the model's own


def draw(
    rng: random.Random, count: int, ids: Sequence[int], poison: int | None = None
) -> list[Request]:
    """Return requests, many of which begin alike.

    Args:
        rng: draws them.
        count: how many prompts; some are asked for three answers.
        ids: of which prompts are made.
        poison: an id that stands in some prompts.
    """
    shared = [rng.choices(ids, k=rng.randrange(1, 30)) for _ in range(3)]
    made = []
    for _ in range(count):
        prompt = rng.choice(shared) + rng.choices(ids, k=rng.randrange(0, 9))
        if poison is not None and rng.random() < 0.1:
            prompt.insert(rng.randrange(len(prompt)), poison)
        params = SamplingParams(
            max_new_tokens=rng.randrange(1, 20),
            temperature=rng.choice([0, 0.8, 1.5]),
            top_p=rng.choice([1, 0.8]),
            repetition_penalty=rng.choice([1, 1.2]),
            seed=rng.randrange(99),
            logprobs=rng.choice([0, 2]),
            prompt_logprobs=rng.choice([None, None, None, None, 0, 3]),
        )
        for choice in range(rng.choice([1, 1, 3])):
            place = {"priority": rng.randrange(2), "client": rng.choice("ab")}
            made.append(Request(tuple(prompt), params, choice, **place))
    return made


def as_many_as_may_be(self: Speculator, limits: Wanted, room: int) -> list[int]:
    """Stand for ``Speculator.lengths``, which goes by times: those are not the same twice."""
    given: list[int] = []
    for _, limit in limits:
        given.append(max(min(limit, self.drafter.most, room - sum(given)), 0))
    return given


@dataclass
class Got:
    """What a request was given while others ran.

    Args:
        left: after two tokens, before its end.
    """

    tokens: list[Token]
    scores: Any = None
    left: bool = False


def drive(engine: Engine, made: Sequence[Request], rng: random.Random) -> list[Got]:
    """Let requests arrive over time; after every step look at the cache's books.

    Returns:
        what each got, its prompt's scores first, and the numbers of those that left early.
    """
    engine._scheduler.max_scored = rng.choice([5, 64])  # else prompts fit in one step
    waiting, handles = list(enumerate(made)), {}
    got = [Got([], left=rng.random() < 0.1) for _ in made]
    while waiting or engine.has_work:
        for _ in range(min(rng.randrange(0, 4), len(waiting))):
            number, request = waiting.pop(0)
            handles[number] = engine.add(request)
        told = engine.step()
        engine.check_blocks()
        having = [one for one in handles.values() if one.produced or one.error is not None]
        assert set(told) <= set(having), "a step tells of those with another token, or an end"
        assert all(one in told for one in having if one.produced)
        for number, handle in handles.items():
            if handle.produced and not got[number]:
                got[number] += handle.scores
            while handle.produced:
                one.tokens.append(handle.produced.popleft())
            if one.left and len(one.tokens) >= 2:
                engine.abort(handle)
    for number, handle in handles.items():
        got[number].scores = handle.scores
    return got


def room(rng: random.Random) -> dict[str, int | bool]:
    """Return an engine's limits: often so few blocks that sequences have to give way."""
    return {
        "max_sequences": rng.choice([1, 3, 8]),
        "max_tokens": MOST,
        "max_step_tokens": rng.choice([1, 5, 64]),
        "prefix_cache": rng.random() < 0.8,
    }


def differing(got: Sequence[Got], alone: Sequence[tuple[list[Token], Any]]) -> list[int]:
    """Return the requests that got other tokens or scores than when they ran alone."""
    return [
        number
        for number, (one, (tokens, scores)) in enumerate(zip(got, alone, strict=True))
        if (one.tokens != tokens[: len(one.tokens)] if one.left else one.tokens != tokens)
        or (not one.left and one.scores != scores)
    ]
