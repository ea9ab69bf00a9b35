"""The sampler against distributions written out one token at a time."""

import math

import numpy as np
import pytest

from common.errors import UserError
from external_ops.sampling import BROKEN, RULED_OUT, Settings, sample_native, sample_ref
from llm.engine.request import BrokenLogitsError, Request, SamplingParams
from llm.engine.sampler import sample_rows, uniform
from llm.engine.sequence import Row, Sequence

RNG = np.random.default_rng(5)
LOGITS = {
    "few": np.array([2.0, 1.0, 0.0, -1.0, -30.0], np.float32),
    "ties": np.array([1.0, 1.0, 1.0, 0.5, 0.5, -2.0], np.float32),
    "many": (2 * RNG.standard_normal(3000)).astype(np.float32),
}


@pytest.fixture(params=["reference", "native"])
def kernel(request):
    """Each form of the op, the native one with the best instruction set there is."""
    if request.param == "reference":
        return sample_ref
    request.getfixturevalue("native_ops")
    return sample_native


def sample(logits, sequence):
    """Choose the token behind one row."""
    (outcome,) = sample_rows(logits[None], [Row(sequence)])
    return outcome


def sequence_of(params, tokens=(1,), choice=0):
    return Sequence.of(Request(tokens, params, choice), eos_ids=())


def expected(logits, params):
    """The distribution by the definitions, over Python numbers, in float64."""
    scaled = [float(value) / params.temperature for value in logits]
    kept = set(range(len(scaled)))

    def shares():
        top = max(scaled[i] for i in kept)
        weights = {i: math.exp(scaled[i] - top) for i in kept}
        total = math.fsum(weights.values())
        return {i: weight / total for i, weight in weights.items()}

    def first(order, mass):
        reached, chosen = 0.0, set()
        for i in order:
            if reached >= mass:
                break
            chosen.add(i)
            reached += shares_now[i]
        return chosen

    if params.top_k:
        least = sorted((scaled[i] for i in kept), reverse=True)[: params.top_k][-1]
        kept = {i for i in kept if scaled[i] >= least}
    shares_now = shares()
    if params.top_p < 1:
        kept = first(sorted(kept, key=lambda i: (-scaled[i], i)), params.top_p)
        shares_now = shares()
    if params.min_p:
        most = max(shares_now.values())
        kept = {i for i in kept if shares_now[i] >= params.min_p * most}
        shares_now = shares()
    if params.typical_p < 1:
        entropy = -math.fsum(p * math.log(p) for p in shares_now.values())
        order = sorted(kept, key=lambda i: (abs(-math.log(shares_now[i]) - entropy), i))
        kept = first(order, params.typical_p)
        shares_now = shares()
    return np.array([shares_now.get(i, 0.0) for i in range(len(scaled))])


LIMITS = [
    {},
    {"temperature": 0.7, "top_k": 3, "top_p": 0.95},
    {"top_p": 0.5},
    {"top_k": 40, "temperature": 1.7},
    {"min_p": 0.2},
    {"top_p": 0.9, "min_p": 0.05, "temperature": 1.3},
    {"typical_p": 0.6},
    {"top_k": 100, "typical_p": 0.9, "top_p": 0.99},
]


@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: "-".join(limits) or "none")
@pytest.mark.parametrize("kind", LOGITS)
def test_draws_follow_the_distribution(kernel, kind, limits):
    """Places of the sum are asked for evenly, so that nothing is left to chance."""
    logits = LOGITS[kind]
    params = SamplingParams(seed=3, **limits)
    count = 800
    settings = [Settings(**limits, place=(number + 0.5) / count) for number in range(count)]
    draws, _ = kernel(np.tile(logits, [count, 1]), [None] * count, settings)
    observed = np.bincount(draws, minlength=logits.size) / count
    # Neighbours in the sum share a border: each may gain or lose one draw.
    assert np.abs(observed - expected(logits, params)).max() <= 2 / count


def test_places_are_even_and_independent():
    """Chi-square over 16 bins, and over pairs of neighbouring positions, choices and seeds."""
    size = 20_000
    streams = {
        "positions": [uniform(7, 0, n) for n in range(size)],
        "choices": [uniform(7, n, 12) for n in range(size)],
        "seeds": [uniform(n, 0, 12) for n in range(size)],
    }
    for name, places in streams.items():
        bins = (np.array(places) * 16).astype(int)
        single = np.bincount(bins, minlength=16)
        pairs = np.bincount(bins[:-1] * 16 + bins[1:], minlength=256)
        for counts in (single, pairs):
            mean = counts.sum() / counts.size
            square = float(((counts - mean) ** 2 / mean).sum())
            limit = counts.size + 5 * math.sqrt(2 * counts.size)
            assert square < limit, f"{name}: {square:.0f} of {limit:.0f}"
    assert uniform(2**64 + 5, 0, 1) == uniform(5, 0, 1) and uniform(-1, 0, 1) < 1


def test_a_row_does_not_depend_on_its_neighbours():
    rows = np.stack([LOGITS["many"], RNG.standard_normal(3000).astype(np.float32), LOGITS["many"]])
    several = [
        SamplingParams(seed=1, top_p=0.9, logprobs=3),
        SamplingParams(temperature=0),
        SamplingParams(seed=1, repetition_penalty=1.3, min_p=0.01),
    ]
    sequences = [sequence_of(params, [5, 6, number]) for number, params in enumerate(several)]
    together = sample_rows(rows, list(map(Row, sequences)))
    assert together == [sample(row, one) for row, one in zip(rows, sequences, strict=True)]


def test_one_broken_row_is_one_error():
    rows = np.stack([LOGITS["few"]] * 4)
    rows[1, 2], rows[2, 0] = np.nan, np.inf
    sequences = [sequence_of(SamplingParams(temperature=0)) for _ in range(3)]
    first, second, third = sample_rows(rows, list(map(Row, sequences)))
    assert first.token_id == 0
    assert isinstance(second, BrokenLogitsError) and isinstance(third, BrokenLogitsError)


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-20])
def test_tiny_temperatures_take_the_likeliest(temperature):
    params = SamplingParams(temperature=temperature, seed=1)
    assert sample(LOGITS["few"], sequence_of(params)).token_id == 0


def test_repetition_penalty_divides_or_multiplies():
    logits = np.array([1.0, 0.9, -0.5, -0.4], dtype=np.float32)
    penalised = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert sample(logits, sequence_of(penalised, [0])).token_id == 1
    assert sample(-np.abs(logits), sequence_of(penalised, [3])).token_id == 2


def test_presence_and_frequency_count_the_answer_alone():
    logits = np.array([1.0, 0.9, 0.2, 0.0], np.float32)
    params = SamplingParams(temperature=0, presence_penalty=0.2)
    sequence = sequence_of(params, [0, 0, 0])
    first = sample(logits, sequence)
    assert first.token_id == 0, "the prompt does not count"
    sequence.append(first)
    assert sample(logits, sequence).token_id == 1
    frequent = sequence_of(SamplingParams(temperature=0, frequency_penalty=0.06), [1])
    chosen = [frequent.append(sample(logits, frequent)).token_id for _ in range(5)]
    assert chosen == [0, 0, 1, 0, 1]


def test_bias_and_bad_words():
    logits = LOGITS["few"]
    biased = SamplingParams(temperature=0, logit_bias=((3, 3.5), (0, -100.0)))
    assert sample(logits, sequence_of(biased)).token_id == 3
    bad = SamplingParams(temperature=0, bad_words=((0,), (7, 8, 1)))
    assert sample(logits, sequence_of(bad, [7, 8])).token_id == 2
    assert sample(logits, sequence_of(bad, [8, 7])).token_id == 1
    assert sample(logits, sequence_of(bad, [8])).token_id == 1


def test_logprobs_are_the_models_own():
    params = SamplingParams(temperature=0, logit_bias=((4, 50.0),), logprobs=2)
    logits = LOGITS["few"]
    token = sample(logits, sequence_of(params))
    shares = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    assert token.token_id == 4 and token.logprob == pytest.approx(shares[4])
    assert [one for one, _ in token.top] == [0, 1]
    assert [value for _, value in token.top] == pytest.approx(list(shares[:2]))
    every = sample(logits, sequence_of(SamplingParams(temperature=0, logprobs=9)))
    assert [one for one, _ in every.top] == [0, 1, 2, 3, 4]


def test_choices_of_one_seed_differ_and_repeat():
    params = SamplingParams(seed=9)
    logits = LOGITS["many"]
    drawn = [sample(logits, sequence_of(params, choice=n)).token_id for n in range(8)]
    assert len(set(drawn)) > 4
    assert drawn == [sample(logits, sequence_of(params, choice=n)).token_id for n in range(8)]
    unseeded = [sample(logits, sequence_of(SamplingParams())).token_id for _ in range(8)]
    assert len(set(unseeded)) > 4


HARD = {
    "a large vocabulary": (3 * RNG.standard_normal(128_256)).astype(np.float32),
    "nearly flat": (0.02 * RNG.standard_normal(32_003)).astype(np.float32),
    "all equal": np.zeros(5000, np.float32),
    "far apart": np.array([3e38, -3e38, 0, 3e38], np.float32),
    "one": np.array([-7.0], np.float32),
    "two of many": np.where(np.arange(1003) % 600 == 5, 9, -80).astype(np.float32),
}


@pytest.mark.parametrize("kind", HARD)
def test_kernels_draw_what_the_reference_draws(each_level, kind):
    """The same tokens, but where a place is at the border of two."""
    row = HARD[kind]
    limits = [*LIMITS, {"temperature": 0}, {"temperature": 1e-20}, {"top_k": 1}, {"top_p": 1e-9}]
    places = (0.0, 1e-9, 0.3, 0.77, 1 - 2**-53)
    settings = [Settings(**one, place=place) for one in limits for place in places]
    edited = [None if n % 3 else np.where(row < row.max(), row, -np.inf) for n in range(60)]
    rows = np.tile(row, [len(settings), 1])
    expected, logprobs = sample_ref(rows, edited, settings)
    tokens, found = sample_native(rows, edited, settings)
    for number in np.flatnonzero(tokens != expected):
        if tokens[number] == RULED_OUT or expected[number] == RULED_OUT:
            pytest.fail("only one of them has no token")
        # The shares up to the place, as far as they lie beside one another.
        weights = np.exp((row - row.max()).astype(np.float64) / settings[number].temperature)
        first, last = sorted((tokens[number], expected[number]))
        between = weights[first + 1 : last].sum() / weights.sum()
        assert between < 1e-6, f"{settings[number]}: {tokens[number]}, not {expected[number]}"
    np.testing.assert_allclose(found, logprobs, rtol=1e-6, atol=2e-6)


def test_rows_that_have_no_token(each_level):
    rows = np.zeros([4, 37], np.float32)
    rows[0, 36], rows[1, 3], rows[2, 20] = np.nan, np.inf, -np.inf
    ruled_out = np.full(37, -np.inf, np.float32)
    for kernel in (sample_ref, sample_native):
        tokens, _ = kernel(rows, [None, None, None, ruled_out], [Settings()] * 4)
        assert tokens.tolist() == [BROKEN, BROKEN, BROKEN, RULED_OUT]
    tokens, logprobs = sample_native(np.zeros([0, 37], np.float32), [], [])
    assert tokens.shape == logprobs.shape == (0,)


def test_words_that_rule_out_everything():
    bans = tuple((token, -100.0) for token in range(5))
    outcome = sample(LOGITS["few"], sequence_of(SamplingParams(logit_bias=bans)))
    assert isinstance(outcome, UserError) and "rule out every token" in str(outcome)
