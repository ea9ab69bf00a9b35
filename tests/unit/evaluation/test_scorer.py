"""Likelihoods against one forward pass per token, and against an exported program."""

import math

import numpy as np
import paddle
import pytest

from common.errors import UserError
from llm.engine.runners import DygraphRunner, PredictorRunner
from llm.evaluation import scorer as scorer_module
from llm.evaluation.perplexity import Document, perplexity, sliding_rows
from llm.evaluation.scorer import NetworkScorer, PagedScorer, rolling_rows
from llm.llama.adapters.prefix import PrefixConfig, add_prefix
from llm.llama.build import build_model
from llm.llama.config import PRESETS
from llm.llama.export import export_program

CONTEXT = 48


@pytest.fixture(scope="module")
def model():
    config = PRESETS["tiny-random-llama"].replace(max_position_embeddings=CONTEXT)
    network = build_model(config, seed=3)
    for name, parameter in network.named_parameters():
        if "norm" not in name:
            parameter.set_value(parameter * 8)  # so that likelihoods differ clearly
    network.eval()
    return network


@pytest.fixture(scope="module")
def requests(model):
    rng = np.random.default_rng(1)
    sizes = [(1, 1), (5, 3), (17, 1), (30, 18), (2, 40), (16, 16), (7, 1)]
    vocab = model.config.vocab_size
    made = [
        (rng.integers(0, vocab, before).tolist(), rng.integers(0, vocab, after).tolist())
        for before, after in sizes
    ]
    greedy = []
    context = made[1][0]
    for _ in range(4):
        greedy.append(best_next(model, [*context, *greedy]))
    # One that is greedy, one that is but for its last token, choices that share an input, and the
    # same ids cut elsewhere.
    almost = [*greedy[:-1], (greedy[-1] + 1) % vocab]
    before, after = made[4]
    return [
        *(*made, (context, greedy), (context, almost)),
        *((made[3][0], [n]) for n in range(4)),
        *((before + after[:cut], after[cut:]) for cut in (39, 7)),
    ]


def next_logprobs(model, ids):
    """Return log p of every next token in float64, from a pass over these ids alone."""
    with paddle.no_grad():
        logits = model(paddle.to_tensor([ids])).numpy()[0, -1].astype(np.float64)
    return logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())


def best_next(model, ids):
    return int(next_logprobs(model, ids).argmax())


def by_hand(model, context, continuation):
    total, greedy = 0.0, True
    for number, token in enumerate(continuation):
        logprobs = next_logprobs(model, [*context, *continuation[:number]])
        total += logprobs[token]
        greedy &= int(logprobs.argmax()) == token
    return total, greedy


def assert_same(scores, expected):
    np.testing.assert_allclose([s.logprob for s in scores], [p for p, _ in expected], rtol=1e-5)
    assert [s.is_greedy for s in scores] == [bool(greedy) for _, greedy in expected]


@pytest.fixture(scope="module")
def expected(model, requests):
    found = [by_hand(model, *request) for request in requests]
    assert {greedy for _, greedy in found} == {True, False}
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_likelihoods_are_those_of_one_pass_per_token(model, requests, expected, batch_size):
    assert_same(NetworkScorer(model, batch_size=batch_size).loglikelihood(requests), expected)


@pytest.mark.parametrize("limits", [(1, 8192), (64, 8192), (1 << 20, 40)])
def test_smaller_batches_change_nothing(model, requests, expected, limits, monkeypatch):
    logits, tokens = limits
    scorer = NetworkScorer(model, batch_size=100)
    monkeypatch.setattr(scorer, "batch_logits", logits)
    monkeypatch.setattr(scorer_module, "_BATCH_TOKENS", tokens)
    sizes = []
    forward = scorer._forward
    monkeypatch.setattr(
        scorer, "_forward", lambda batch: sizes.append(len(batch)) or forward(batch)
    )
    assert_same(scorer.loglikelihood(requests), expected)
    assert len(sizes) > 1
    # The two that differ in their last token share an input, and so do the four choices and the
    # three cuts.
    assert sum(sizes) == len(requests) - 1 - 3 - 2


@pytest.fixture(scope="module")
def program(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")
    export_program(model, directory / "llama", model_name="tiny", block_size=4)
    return PredictorRunner(directory, "llama", device="cpu", threads=1)


@pytest.mark.parametrize("step_tokens", [512, 7])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_exported_program_scores_as_the_network(
    program, requests, expected, batch_size, step_tokens, monkeypatch
):
    monkeypatch.setattr(scorer_module, "_STEP_TOKENS", step_tokens)
    scores = PagedScorer(program, batch_size=batch_size).loglikelihood(requests)
    assert_same(scores, expected)


def test_long_contexts_lose_their_beginning(model):
    rng = np.random.default_rng(2)
    context = rng.integers(0, model.config.vocab_size, CONTEXT + 20).tolist()
    scorer = NetworkScorer(model)
    (score, short) = scorer.loglikelihood([(context, [1, 2, 3]), (context[:5], [1])])
    # The last of the continuation is never an input, so one more token of context fits.
    assert_same([score], [by_hand(model, context[-(CONTEXT - 2) :], [1, 2, 3])])
    assert scorer.truncated == 1
    assert_same([short], [by_hand(model, context[:5], [1])])


def test_a_prefix_takes_its_place_from_the_context(model):
    network = build_model(model.config, seed=5)
    add_prefix(network, PrefixConfig(num_virtual_tokens=8), seed=1)
    scorer = NetworkScorer(network)
    assert scorer.max_length == CONTEXT - 8
    pair = ([4, 5, 6], [7, 8])
    paged = PagedScorer(DygraphRunner(network))
    assert paged.max_length == CONTEXT - 8
    network.eval()
    expected = by_hand(network, *pair)
    assert_same([*scorer.loglikelihood([pair]), *paged.loglikelihood([pair])], [expected] * 2)


def test_rolling_windows_are_those_of_the_harness():
    # The example in the documentation of lm-evaluation-harness' LM.loglikelihood_rolling.
    rows = rolling_rows(range(10), 99, 4)
    assert [row.ids.tolist() for row in rows] == [[99, 0, 1, 2], [3, 4, 5, 6], [5, 6, 7, 8]]
    assert [row.targets.tolist() for row in rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert rolling_rows([], 99, 4) == []


def test_rolling_sums_each_document(model):
    rng = np.random.default_rng(3)
    documents = [rng.integers(0, 1024, size).tolist() for size in (CONTEXT + 9, 5)]
    totals = NetworkScorer(model, batch_size=2).rolling([*documents, []], 1)
    first = [1, *documents[0]]
    expected = by_hand(model, first[:1], first[1 : CONTEXT + 1])[0]
    rest = first[: CONTEXT + 9 + 1]
    expected += by_hand(model, rest[-(CONTEXT + 1) : -9], rest[-9:])[0]
    np.testing.assert_allclose(totals[0], expected, rtol=1e-5)
    np.testing.assert_allclose(totals[1], by_hand(model, [1], documents[1])[0], rtol=1e-5)
    assert totals[2] == 0


@pytest.mark.parametrize("tokens", [2, 3, 9, 10, 11, 40])
@pytest.mark.parametrize(("length", "stride"), [(4, 1), (4, 3), (4, 4), (10, 3), (1, 1)])
def test_windows_predict_each_token_once_with_the_most_context(tokens, length, stride):
    ids = np.arange(tokens)
    rows = sliding_rows(ids, length, stride)
    assert np.concatenate([row.targets for row in rows]).tolist() == list(range(1, tokens))
    for number, row in enumerate(rows):
        assert row.ids[0] == number * stride
        assert len(row.ids) == min(length, tokens - 1 - number * stride)
        # The continuous numbers make it plain that targets follow the end of the input.
        assert row.targets[-1] == row.ids[-1] + 1


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_perplexity_is_that_of_single_passes(model, stride):
    ids = np.random.default_rng(4).integers(0, 1024, 30)
    got = perplexity(
        NetworkScorer(model, batch_size=4), [Document(ids, 7, 50)], stride=stride, max_length=8
    )
    total = 0.0
    for target in range(1, len(ids)):
        # The first window that reaches a token predicts it.
        start = next(s for s in range(0, len(ids), stride) if s + 8 >= target)
        total += next_logprobs(model, ids[start:target].tolist())[ids[target]]
    figures = got.figures()
    np.testing.assert_allclose(got.logprob, total, rtol=1e-5)
    assert got.tokens == 29
    assert math.isclose(figures["token_perplexity"], math.exp(-total / 29), rel_tol=1e-5)
    assert math.isclose(figures["word_perplexity"], math.exp(-total / 7), rel_tol=1e-4)
    assert math.isclose(figures["byte_perplexity"], math.exp(-total / 50), rel_tol=1e-5)
    assert math.isclose(figures["bits_per_byte"], -total / 50 / math.log(2), rel_tol=1e-5)


BAD = {
    "empty context": (lambda s: s.loglikelihood([([1], [2]), ([], [2])]), "request 1 has an empty"),
    "long continuation": (
        lambda s: s.loglikelihood([([1], [2] * (CONTEXT + 1))]),
        "continuation of request 0 has 49 tokens, the model's context only 48",
    ),
    "unknown id": (
        lambda s: s.loglikelihood([([1], [5000])]),
        "token id 5000 is outside the model's vocabulary of 1024",
    ),
    "negative id": (lambda s: s.rolling([[-1]], 0), "token id -1 is outside"),
    "wide stride": (
        lambda s: perplexity(s, [Document(np.arange(9))], stride=9, max_length=8),
        "stride=9 has to be between 1 and max_length=8",
    ),
    "wide window": (
        lambda s: perplexity(s, [Document(np.arange(9))], max_length=49),
        "max_length=49 exceeds the model's context of 48",
    ),
    "one token": (
        lambda s: perplexity(s, [Document(np.arange(1))]),
        "1 tokens are too few for a perplexity; two are the least",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(model, case):
    act, message = BAD[case]
    with pytest.raises(UserError, match=message):
        act(NetworkScorer(model))


@pytest.mark.parametrize("length", [0, CONTEXT + 1])
def test_impossible_lengths(model, length):
    with pytest.raises(UserError, match=f"max_length={length} has to be between 1 and"):
        NetworkScorer(model, max_length=length)
    with pytest.raises(UserError, match="batch_size=0 has to be at least 1"):
        NetworkScorer(model, batch_size=0)


def test_an_empty_continuation_is_certain(model):
    assert_same(NetworkScorer(model).loglikelihood([([1], []), ([], [])]), [(0.0, True)] * 2)
