"""A token's logits are the same bits alone and in a crowd: of networks, and of their exports.

``make bits`` runs the long form (``BITS=all``), with the levels that the processor lacks in
software.
"""

import os

import numpy as np
import paddle
import pytest

from llm.engine.batch import Batch
from llm.engine.replay import one_by_one, replay
from llm.engine.runners import DygraphRunner, PredictorRunner
from llm.llama.build import build_model
from llm.llama.config import PRESETS
from llm.llama.export import export_program
from llm.llama.fused import pack
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.network import quantize_model

ALL = os.environ.get("BITS") == "all"
CONFIG = PRESETS["tiny-random-llama"].replace(
    num_hidden_layers=2, vocab_size=200, initializer_range=0.2, hidden_size=96, head_dim=16
)
GROUPED = CONFIG.replace(num_attention_heads=6, num_key_value_heads=2, intermediate_size=320)
SINGLE = CONFIG.replace(num_attention_heads=4, num_key_value_heads=4, intermediate_size=320)
KINDS = {
    "float32": None,
    "bfloat16": None,
    "W8": ("W8",),
    "W4": ("W4", 32),
    "A8W8": ("A8W8",),
    "A8W4": ("A8W4", 32),
}
RNG = np.random.default_rng(0)
LONG, SHORT, CROWD = 150, 3, 63
SEQUENCES = [RNG.integers(0, 200, n).tolist() for n in [LONG, *[SHORT] * CROWD]]


def packed(kind, config):
    """Return a network laid out for the kernels, and its runner."""
    dtype = kind if kind == "bfloat16" else "float32"
    model = build_model(config, seed=5, dtype=dtype, to_pack=True)
    if KINDS[kind] is not None:
        quantize_model(model, QuantConfig.of_type(*KINDS[kind]))
    return pack(model)


def bits(runner, steps):
    """Return the logits of all tokens that steps run, as integers."""
    return replay(runner, SEQUENCES, steps).view(np.int32)


def chunks(size):
    """Return steps that run the long sequence in pieces."""
    return [[(0, start, min(start + size, LONG))] for start in range(0, LONG, size)]


def crowd(count):
    """Return steps in which the long sequence's tokens are beside those of others."""
    others = range(1, count)
    first = [(0, 0, LONG - SHORT), *[(n, 0, 1) for n in others]]
    rest = [
        [(0, LONG - SHORT + turn, LONG - SHORT + turn + 1), *[(n, turn, turn + 1) for n in others]]
        for turn in range(1, SHORT)
    ]
    middle = [(0, LONG - SHORT, LONG - SHORT + 1)]
    return [first, middle, *rest]


def check(runner, alone):
    """Compare steps of every kind with tokens that run one by one."""
    for size in (7, 33, LONG, *(range(2, 20) if ALL else ())):
        np.testing.assert_array_equal(bits(runner, chunks(size))[:LONG], alone[:LONG], str(size))
    for count in range(1, CROWD + 2) if ALL else (9, CROWD + 1):
        ran = LONG + SHORT * (count - 1)
        np.testing.assert_array_equal(bits(runner, crowd(count))[:ran], alone[:ran], str(count))


@pytest.mark.parametrize(
    ("kind", "config", "cache"),
    [
        *[pytest.param(kind, GROUPED, "auto", id=kind) for kind in KINDS],
        *[
            pytest.param(kind, SINGLE, "auto", id=f"{kind}, one head a key")
            for kind in (KINDS if ALL else ("bfloat16",))
        ],
        *[
            pytest.param(kind, GROUPED, "int8", id=f"{kind}, cache in int8")
            for kind in (KINDS if ALL else ("bfloat16",))
        ],
    ],
)
def test_networks(each_level, set_threads, kind, config, cache):
    runner = DygraphRunner(packed(kind, config), cache_dtype=cache)
    set_threads(1)
    alone = bits(runner, one_by_one(SEQUENCES, [1] * len(SEQUENCES)))
    check(runner, alone)
    set_threads(2)
    check(runner, alone)


@pytest.mark.usefixtures("native_ops")
@pytest.mark.parametrize(
    ("kind", "cache"),
    [*[(kind, "auto") for kind in (KINDS if ALL else ("float32",))], ("W4", "int8")],
)
def test_exports(kind, cache, tmp_path):
    model = packed(kind, GROUPED)
    runner = DygraphRunner(model, cache_dtype=cache)
    alone = bits(runner, one_by_one(SEQUENCES, [1] * len(SEQUENCES)))
    place = tmp_path / "llama"
    export_program(model, place, model_name="tiny", block_size=8, cache_dtype=cache)
    check(PredictorRunner(tmp_path, "llama", device="cpu", threads=2), alone)


def test_the_number_of_tokens_whose_logits_are_asked_for(each_level):
    runner = DygraphRunner(packed("float32", GROUPED))
    runner.allocate(40)
    ids = np.array(SEQUENCES[0], np.int64)
    table = np.arange(10, dtype=np.int32)[None]
    places = (np.zeros(LONG, np.int32), np.arange(LONG, dtype=np.int32), table)
    all_rows = runner.run(Batch(ids, *places, np.arange(LONG))).view(np.int32)
    for rows in ([LONG - 1], [3, 9, 80], list(range(0, LONG, 2))):
        some = runner.run(Batch(ids, *places, np.array(rows))).view(np.int32)
        np.testing.assert_array_equal(some, all_rows[rows])


def test_a_neighbour_that_is_no_number(each_level):
    """Its own logits are lost, those of the others not, nor those of tokens before it."""
    model = packed("float32", GROUPED)
    runner = DygraphRunner(model)
    alone = bits(runner, one_by_one(SEQUENCES[:4], [1] * 4))
    spoiled = max(
        set(range(200)) - set(SEQUENCES[0][:100]) - {i for s in SEQUENCES[1:3] for i in s}
    )
    with paddle.no_grad():
        model.model.embed_tokens.weight[spoiled] = float("nan")
    sequences = [
        [*SEQUENCES[0][:100], spoiled, *SEQUENCES[0][101:]],
        *SEQUENCES[1:3],
        [spoiled] * 3,
    ]
    steps = [[(0, 0, LONG), (1, 0, 3), (2, 0, 3), (3, 0, 3)]]
    found = replay(runner, sequences, steps)
    assert np.isnan(found[100]).all() and np.isnan(found[LONG + 6 :]).all()
    kept = [*range(100), *range(LONG, LONG + 6)]
    np.testing.assert_array_equal(found.view(np.int32)[kept], alone[kept])
