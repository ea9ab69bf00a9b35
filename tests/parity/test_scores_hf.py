"""Perplexity and likelihoods against transformers, on WikiText-2's validation text."""

import json
import math

import numpy as np
import pytest

from data.tokenizer import load_tokenizer
from llm.engine.runners import PredictorRunner
from llm.evaluation.perplexity import Document, perplexity
from llm.evaluation.scorer import NetworkScorer, PagedScorer
from llm.llama.build import build_model, save_model
from llm.llama.config import PRESETS
from llm.llama.export import export_program

CONTEXT = 96
TOKENS = 1500
WINDOWS = [(96, 96), (96, 48), (96, 13), (40, 40), (17, 16), (1, 1)]
LIMIT = 1e-4  # of a perplexity, relative


@pytest.fixture(scope="module")
def compared(peer, shared_data, tmp_path_factory):
    """Return a model, its ids and requests, and what transformers makes of them."""
    root = tmp_path_factory.mktemp("scores")
    config = PRESETS["tiny-llama-2"].replace(vocab_size=32000, max_position_embeddings=CONTEXT)
    model = build_model(config, seed=1)
    model.eval()
    rng = np.random.default_rng(1)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            value = rng.standard_normal(parameter.shape, dtype=np.float32)
            parameter.set_value(value / np.float32(math.sqrt(config.hidden_size)))
    save_model(model, root / "model")
    tokenizer = load_tokenizer(shared_data / "llama2.tokenizer.model")
    text = (shared_data / "wikitext2.valid.txt").read_text("utf-8")[: 8 * TOKENS]
    ids = tokenizer.encode(text, add_bos=True)[:TOKENS]
    assert len(ids) == TOKENS
    pairs = [
        (ids[n : n + 30], ids[n + 30 : n + 30 + size]) for n, size in ((0, 1), (9, 40), (70, 5))
    ]
    request = {
        "ids": ids,
        # There, a window's last token is only a label; here, max_length counts what goes in.
        "windows": [(length + 1, stride) for length, stride in WINDOWS],
        "pairs": pairs,
    }
    (root / "request.json").write_text(json.dumps(request), encoding="utf-8")
    peer("score", root, "score_side")
    return model, ids, pairs, json.loads((root / "scores.json").read_text("utf-8"))


@pytest.mark.parametrize("window", WINDOWS)
def test_perplexity(compared, window, measured):
    model, ids, _, theirs = compared
    total, count = theirs["windows"][WINDOWS.index(window)]
    length, stride = window
    got = perplexity(
        NetworkScorer(model, batch_size=16), [Document(ids)], max_length=length, stride=stride
    )
    assert got.tokens == count == TOKENS - 1
    wanted = math.exp(total / count)
    error = abs(got.token_perplexity - wanted) / wanted
    assert measured(f"perplexity, {length} in, stride {stride}", "scores", error) <= LIMIT


def test_windows_matter(compared):
    # Equal numbers for all strides would mean that the context is not used.
    totals = {round(total, 1) for total, _ in compared[3]["windows"]}
    assert len(totals) == len(WINDOWS)


def test_likelihoods_of_network_and_program(compared, measured, tmp_path):
    model, _, pairs, theirs = compared
    export_program(model, tmp_path / "llama", model_name="tiny", block_size=16)
    runner = PredictorRunner(tmp_path, "llama", device="cpu", threads=1)
    for name, scorer in (("network", NetworkScorer(model)), ("program", PagedScorer(runner))):
        scores = scorer.loglikelihood(pairs)
        assert [score.is_greedy for score in scores] == [greedy for _, greedy in theirs["pairs"]]
        for score, (wanted, _) in zip(scores, theirs["pairs"], strict=True):
            error = abs(score.logprob - wanted) / abs(wanted)
            assert measured(f"likelihoods of the {name}", "scores", error) <= 1e-5
