"""Rows beyond the trained context: steps compute what whole rows do, for each rotary scaling."""

import numpy as np
import paddle
import pytest

from common.errors import UserError
from llm.engine.batch import Batch
from llm.engine.engine import Engine
from llm.engine.opening import open_network
from llm.engine.request import Request, SamplingParams
from llm.engine.runners import DygraphRunner
from llm.evaluation.scorer import NetworkScorer
from llm.llama.build import build_model
from llm.llama.config import PRESETS, RopeScaling
from llm.llama.fused import pack_where_possible
from tests.unit.serving.fakes import FakeTokenizer

TRAINED, LENGTH = 32, 75
SCALINGS = {
    "linear": RopeScaling("linear", factor=4.0),
    "yarn": RopeScaling("yarn", factor=4.0, original_max_position_embeddings=TRAINED),
    "dynamic": RopeScaling("dynamic", factor=4.0),
}


def network(kind):
    shape = PRESETS["tiny-random-llama"].replace(
        max_position_embeddings=TRAINED, rope_scaling=SCALINGS[kind], initializer_range=0.1
    )
    model = build_model(shape, seed=0)
    model.eval()
    return model


def stepped(runner, ids):
    """Return the logits of all rows, a part of the row at a time."""
    count = len(ids)
    runner.allocate(-(-count // runner.block_size))
    table = np.arange(-(-count // runner.block_size), dtype=np.int32)[None]
    found = []
    for start in range(0, count, 20):
        places = np.arange(start, min(start + 20, count), dtype=np.int32)
        step = (np.asarray(ids)[places], np.zeros(len(places), np.int32), places, table)
        found.append(runner.run(Batch(*step, np.arange(len(places), dtype=np.int64))))
    return np.concatenate(found)


def whole(model, ids):
    with paddle.no_grad():
        return model(paddle.to_tensor([ids])).numpy()[0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", SCALINGS)
def test_steps_equal_whole_rows(kind, packed):
    model = network(kind)
    ids = np.random.default_rng(0).integers(0, 1024, LENGTH)
    far, near = whole(model, ids), whole(model, ids[:TRAINED])
    if packed:
        pack_where_possible(model)
    runner = DygraphRunner(model)
    np.testing.assert_allclose(stepped(runner, ids[:TRAINED]), near, atol=2e-5)
    runner.extend(LENGTH)
    assert runner.max_model_len >= LENGTH and runner.longest == 4 * TRAINED
    np.testing.assert_allclose(stepped(runner, ids), far, atol=2e-5)
    # Scaling shows: neither is what a plain network computes.
    plain = build_model(model.config.replace(rope_scaling=RopeScaling()), seed=0)
    assert np.abs(whole(plain, ids) - far).max() > 0.01


def test_a_kernel_that_cannot_scale_cosines_is_not_used():
    model = network("yarn")
    if not pack_where_possible(model):
        pytest.skip("no native kernels")
    opened = open_network(model, FakeTokenizer())
    (decoder,) = (choice for choice in opened.ops if choice.op == "decoder")
    assert decoder.form == "reference" and "YaRN scales cosines" in decoder.why


def test_engines_go_as_far_as_scaling_does():
    opened = open_network(network("dynamic"), FakeTokenizer())
    assert opened.context == 4 * TRAINED
    params = SamplingParams(max_new_tokens=4, temperature=0, ignore_eos=True)
    prompt = list(range(LENGTH - 4))
    (answer,) = opened.open_engine(1, LENGTH).generate([Request(prompt, params)])
    ids = prompt
    for token in answer.ids:
        # All rows of the engine are rotated for its longest: fill up to that length.
        row = ids + [0] * (LENGTH - len(ids))
        assert whole(opened.network, row)[len(ids) - 1].argmax() == token
        ids = [*ids, token]
    with pytest.raises(UserError, match=r"129 tokens of prompt and answer exceed .* of 128"):
        opened.open_engine(1, 4 * TRAINED + 1)
    with pytest.raises(UserError, match="exceed the model's context of 32"):
        Engine(DygraphRunner(network("dynamic")), max_tokens=TRAINED + 1)


def test_scores_default_to_the_trained_length_of_dynamic_scaling():
    assert NetworkScorer(network("dynamic")).max_length == TRAINED
    assert NetworkScorer(network("dynamic"), max_length=LENGTH).max_length == LENGTH
    assert NetworkScorer(network("linear")).max_length == 4 * TRAINED
