"""What prompts and answers are scored with: the engine, evaluation and training agree."""

import dataclasses

import numpy as np
import paddle
import pytest

from external_ops import native
from llm.engine.engine import Engine
from llm.engine.request import Request, SamplingParams
from llm.engine.runners import DygraphRunner
from llm.evaluation.scorer import NetworkScorer, PagedScorer
from llm.llama.build import build_model
from llm.llama.config import PRESETS
from llm.llama.fused import pack
from llm.train.preference import sequence_log_probs

CONFIG = PRESETS["tiny-random-llama"].replace(
    num_hidden_layers=2, vocab_size=200, initializer_range=0.2, max_position_embeddings=128
)
RNG = np.random.default_rng(2)
PROMPTS = [RNG.integers(0, 200, size).tolist() for size in (2, 17, 70)]
SCORED = SamplingParams(12, temperature=0.9, seed=4, ignore_eos=True, prompt_logprobs=0)


@pytest.fixture(scope="module")
def runner():
    network = build_model(CONFIG, seed=5, to_pack=native.available())
    return DygraphRunner(pack(network) if native.available() else network)


def answers(runner, requests, **options):
    return Engine(runner, max_tokens=100, **options).generate(requests)


def test_prompts_are_scored_as_evaluation_does(runner, monkeypatch):
    monkeypatch.setattr("llm.engine.engine._SCORED_BYTES", 9 * 4 * CONFIG.vocab_size)
    requests = [Request(prompt, SCORED) for prompt in PROMPTS]
    found = answers(runner, [*requests, Request([5], dataclasses.replace(SCORED, seed=1))])
    alone = [answers(runner, [request])[0] for request in requests]
    if native.available():
        assert found[:3] == alone, "scores and answers alone and in company, bit by bit"
    scorer = PagedScorer(runner, batch_size=3)
    scores = scorer.loglikelihood([(prompt[:-1], prompt[-1:]) for prompt in PROMPTS])
    whole = scorer.loglikelihood([(prompt[:1], prompt[1:]) for prompt in PROMPTS])
    for one, last, total in zip(found, scores, whole, strict=False):
        logprobs = [token.logprob for token in one.prompt]
        exact = {"rel": 0, "abs": 0} if native.available() else {"abs": 1e-5}
        assert logprobs[-1] == pytest.approx(last.logprob, **exact)
        assert sum(logprobs) == pytest.approx(total.logprob, abs=1e-5)
    assert not found[3].prompt, "nothing comes before a first token"


def test_answers_are_scored_as_training_does(runner):
    """The engine's figures and the trained network's, of the same answers: rounding apart."""
    training = build_model(CONFIG, seed=5)
    found = answers(runner, [Request(prompt, SCORED) for prompt in PROMPTS])
    exact = NetworkScorer(training)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids = [*prompt, *answer.ids]
        labels = [-100] * (len(prompt) - 1) + answer.ids
        rows = [paddle.to_tensor([one]) for one in (ids[:-1], labels)]
        total = float(sequence_log_probs(training, *rows)[0])
        assert sum(answer.logprobs) == pytest.approx(total, abs=1e-4)
        each = exact.loglikelihood(
            [(ids[:end], [ids[end]]) for end in range(len(prompt), len(ids))]
        )
        gaps = [abs(a - b.logprob) for a, b in zip(answer.logprobs, each, strict=True)]
        assert max(gaps) < 1e-5, "of one token; importance ratios of a policy gradient stay at 1"
