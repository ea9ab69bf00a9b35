"""A nan in logits ends the request that it is of, with an error; it never becomes a token."""

import numpy as np
import paddle
import pytest

from llm.engine.engine import Engine
from llm.engine.request import BrokenLogitsError, Request, SamplingParams, requests
from llm.engine.runners import DygraphRunner, PredictorRunner
from llm.engine.texts import generate_texts
from llm.evaluation.scorer import NetworkScorer, PagedScorer
from llm.llama.build import build_model
from llm.llama.config import PRESETS
from llm.llama.export import export_program

POISON = 7
GREEDY = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=6, temperature=1, top_k=5, seed=1, ignore_eos=True)
GOOD = ([3, 4, 5], [9, 8], [11, 12, 13, 14, 15])


@pytest.fixture(scope="module", params=["auto", "reference"])
def model(request):
    """A network whose activations are nan wherever one token stands."""
    network = build_model(PRESETS["tiny-random-llama"], seed=3, ops={"others": request.param})
    table = network.model.embed_tokens.weight
    values = table.numpy()
    values[POISON] = np.nan
    table.set_value(values)
    network.lm_head.weight.set_value(paddle.abs(network.lm_head.weight))
    network.eval()
    return network


@pytest.fixture
def engine(model):
    return Engine(DygraphRunner(model, block_size=4), max_sequences=4, max_tokens=32, num_blocks=12)


class Decoder:
    def push(self, token_id):
        return f"{token_id} "

    def finish(self):
        return ""


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_that_sequence_alone(engine, params):
    """Others in the batch, and later ones in the same cache blocks, answer as without it."""
    alone = [engine.generate([Request(prompt, params)])[0].ids for prompt in GOOD]
    free = engine.num_free_blocks
    prompts = [GOOD[0], [3, POISON, 5], GOOD[1], [POISON], GOOD[2]]
    got = {n: [] for n in range(5)}
    with pytest.raises(BrokenLogitsError, match=r"prompts 2, 4 of 5: .* nan or inf"):
        engine.generate(requests(prompts, params), lambda n, token: got[n].append(token.token_id))
    assert got == {0: alone[0], 1: [], 2: alone[1], 3: [], 4: alone[2]}
    assert engine.num_free_blocks == free and not engine.has_work
    assert [engine.generate([Request(p, params)])[0].ids for p in GOOD] == alone


def test_a_stream(engine):
    tokens = engine.stream(Request([3, POISON], GREEDY))
    with pytest.raises(BrokenLogitsError, match="after 2 tokens"):
        next(tokens)
    assert not engine.has_work
    assert len(list(engine.stream(Request([3], GREEDY)))) == 6


def test_an_export(model, tmp_path):
    export_program(model, tmp_path / "llama", model_name="tiny", block_size=4, max_model_len=32)
    runner = PredictorRunner(tmp_path, "llama", device="cpu", threads=1)
    engine = Engine(runner, max_sequences=1, max_tokens=32)
    before = engine.generate([Request([3], GREEDY)])[0].ids
    with pytest.raises(BrokenLogitsError, match="prompt 1 of 1"):
        engine.generate([Request([3, POISON], GREEDY)])
    assert engine.generate([Request([3], GREEDY)])[0].ids == before


def test_texts(engine):
    asked = requests([[3], [POISON]], GREEDY)
    with pytest.raises(BrokenLogitsError, match="prompt 2 of 2"):
        generate_texts(engine, asked, [Decoder(), Decoder()])
    assert not engine.has_work


@pytest.mark.parametrize("kind", ["network", "paged"])
def test_likelihoods(model, kind):
    """0.25 for four choices of nan is no figure."""
    scorer = NetworkScorer(model) if kind == "network" else PagedScorer(DygraphRunner(model))
    good = [([3, 4], [5]), ([3, 4], [6])]
    assert all(np.isfinite(score.logprob) for score in scorer.loglikelihood(good))
    with pytest.raises(BrokenLogitsError, match="text 3 of 3"):
        scorer.loglikelihood([*good, ([3, POISON], [5])])
