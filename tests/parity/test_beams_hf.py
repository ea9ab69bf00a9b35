"""Beam search beside that of transformers: all answers of a search, and their scores."""

import json
import math

import numpy as np
import pytest

from llm.engine.beam import BeamParams, beam_search
from llm.engine.engine import Engine
from llm.engine.runners import DygraphRunner
from llm.llama.build import build_model, save_model
from llm.llama.config import PRESETS

NEW = 14
SETTINGS = [
    {"num_beams": beams, "length_penalty": penalty, "early_stopping": early, "eos_token_id": ends}
    for beams, penalty, early, ends in (
        (2, 1.0, False, None),
        (4, 1.0, False, [7]),
        (4, 0.0, True, [7, 30, 41]),
        (3, 2.5, False, [7, 30, 41]),
        (5, -1.0, False, [30, 7, 2, 5]),
        (5, 1.0, True, [30, 7, 2, 5]),
    )
]
SHAPES = {
    "grouped": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True, "num_hidden_layers": 3},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_and_scores(peer, tmp_path, shape, measured):
    config = PRESETS["tiny-random-llama"].replace(vocab_size=60, **SHAPES[shape])
    model = build_model(config, seed=3)
    rng = np.random.default_rng(1)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            value = rng.standard_normal(parameter.shape, dtype=np.float32)
            parameter.set_value(1.5 * value / np.float32(math.sqrt(parameter.shape[0])))
    save_model(model, tmp_path / "model")
    prompts = [rng.integers(3, 60, size).tolist() for size in (1, 9, 33)]
    settings = [{**how, "max_new_tokens": NEW} for how in SETTINGS]
    request = {"prompts": prompts, "settings": settings}
    (tmp_path / "request.json").write_text(json.dumps(request), encoding="utf-8")
    peer("search", tmp_path, "beam_side")
    theirs = json.loads((tmp_path / "beams.json").read_text("utf-8"))
    ended = 0
    for how, expected in zip(SETTINGS, theirs, strict=True):
        given = dict(how)
        ends = given.pop("eos_token_id")
        runner = DygraphRunner(model, block_size=4)
        runner.eos_ids = tuple(ends or ())
        engine = Engine(runner, max_sequences=4, max_tokens=64)
        found = beam_search(engine, prompts, BeamParams(max_new_tokens=NEW, **given))
        for ours, answers in zip(found, expected, strict=True):
            assert [list(beam.ids) for beam in ours] == [ids for ids, _ in answers], how
            for beam, (_, score) in zip(ours, answers, strict=True):
                measured("beam search", shape, abs(beam.score - score))
                assert beam.score == pytest.approx(score, rel=2e-6, abs=1e-4)
                ended += beam.finish_reason == "stop"
    assert ended > 10, "answers of several lengths"
