"""Random loads of an engine: requests of all kinds that come over time, and some that leave."""

import random
from collections.abc import Sequence

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


def drive(
    engine: Engine, made: Sequence[Request], rng: random.Random
) -> tuple[dict[int, list[Token]], set[int]]:
    """Let requests arrive over time, and look at the cache's books after every step.

    Returns:
        what each got, its prompt's scores first, and the numbers of those that left early.
    """
    engine._scheduler.max_scored = rng.choice([5, 64])  # else prompts fit in one step
    waiting, handles = list(enumerate(made)), {}
    got: dict[int, list[Token]] = {number: [] for number in range(len(made))}
    leavers = {number for number in got if rng.random() < 0.1}
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
                got[number].append(handle.produced.popleft())
            if number in leavers and len(got[number]) >= 2:
                engine.abort(handle)
    return got, leavers


def room(rng: random.Random) -> dict[str, int | bool]:
    """Return an engine's limits: often so few blocks that sequences have to give way."""
    return {
        "max_sequences": rng.choice([1, 3, 8]),
        "max_tokens": MOST,
        "max_step_tokens": rng.choice([1, 5, 64]),
        "prefix_cache": rng.random() < 0.8,
    }


def differing(
    got: dict[int, list[Token]], leavers: set[int], expected: Sequence[list[Token]]
) -> list[int]:
    """Return the requests that got something else than when they ran alone."""
    return [
        number
        for number, alone in enumerate(expected)
        if got[number] != (alone[: len(got[number])] if number in leavers else alone)
    ]
