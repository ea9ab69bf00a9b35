"""The check of an export: it passes good ones and finds faults of every kind."""

import dataclasses

import numpy as np
import paddle
import pytest

from common.errors import DataError, UserError
from llm.engine import verify
from llm.engine.replay import both_ways
from llm.engine.runners import PredictorRunner
from llm.llama.build import build_model
from llm.llama.config import PRESETS
from llm.llama.export import export_program
from llm.llama.files.parameters import missing_weights
from llm.llama.fused import pack

CONFIG = PRESETS["tiny-random-llama"].replace(
    num_hidden_layers=1, vocab_size=200, initializer_range=0.2
)
MODES = {"native": None, "reference": {"others": "reference"}}


@pytest.fixture(params=MODES)
def mode(request, monkeypatch, native_ops):
    """How both networks run; the program runs in this process, to save the start of another."""

    def here(output, asked):
        runner = PredictorRunner(output.parent, output.name, device="cpu", threads=1)
        return both_ways(runner, asked["sequences"], asked["prompts"])

    monkeypatch.setattr(verify, "_run", here)
    return request.param


def make(mode, config=CONFIG, change=None):
    """Return a network as it is exported, changed before that."""
    model = build_model(config, seed=5, ops=MODES[mode])
    layer = model.model.layers[0]
    if change is not None:
        with paddle.no_grad():
            change(model, layer)
    return pack(model) if mode == "native" else model


def verified(mode, tmp_path, **wrong):
    """Check the export of one network against another."""
    exported = make(mode, **wrong)
    manifest = export_program(exported, tmp_path / "llama", model_name="tiny", block_size=8)
    return verify.verify_program(make(mode), tmp_path / "llama", manifest, 1, "cpu")


def test_good_exports_pass(mode, tmp_path):
    found = verified(mode, tmp_path)
    assert found.positions == 1 + 7 + 40 + 3 * 16
    assert found.tolerance == (0 if mode == "native" else 1e-4)
    assert ("equal bit by bit" in str(found)) == (mode == "native")


def swap_heads(model, layer):
    weight, size = layer.self_attn.q_proj.weight, CONFIG.head_dim
    numbers = weight.numpy()
    numbers[:, : 2 * size] = np.roll(numbers[:, : 2 * size], size, axis=1)
    weight.set_value(numbers)


def row_of(weight, row, by=1.5):
    numbers = weight.numpy()
    numbers[row] *= by
    weight.set_value(numbers)


FAULTS = {
    "a swapped head": {"change": swap_heads},
    "a wrong rope": {"config": CONFIG.replace(rope_theta=CONFIG.rope_theta * 1.01)},
    "a scaled rope": {
        "config": CONFIG.replace(
            rope_scaling=dataclasses.replace(CONFIG.rope_scaling, rope_type="linear", factor=2.0)
        )
    },
    "a wrong epsilon": {"config": CONFIG.replace(rms_norm_eps=1e-3)},
    "a wrong row of a product": {"change": lambda _, layer: row_of(layer.mlp.down_proj.weight, 3)},
    "a wrong row of the head": {"change": lambda model, _: row_of(model.lm_head.weight, 3)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_logits_tell_faults(mode, tmp_path, fault, monkeypatch):
    monkeypatch.setattr(verify, "_check_weights", lambda *_: None)
    with pytest.raises(UserError, match=r"gives other logits .* do not use .*llama \(one by one\)"):
        verified(mode, tmp_path, **FAULTS[fault])


def test_a_row_that_no_token_of_the_check_uses(mode, tmp_path):
    used = {i for ids in verify._sequences(200, 2048)[0] for i in ids}
    row = max(set(range(200)) - used)
    wrong = {"change": lambda model, _: row_of(model.model.embed_tokens.weight, row)}
    with pytest.raises(UserError, match=r"embed_tokens.weight is not among them \(1 in all\)"):
        verified(mode, tmp_path, **wrong)


@pytest.mark.parametrize("size", [10, 30, 200])
def test_a_file_of_weights_that_ends_early(tmp_path, size):
    export_program(make("reference"), tmp_path / "llama", model_name="tiny", block_size=8)
    path = tmp_path / "llama.pdiparams"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"llama.pdiparams: no whole parameter at byte 0"):
        missing_weights(path, {})


def test_a_program_that_depends_on_company(mode, tmp_path, monkeypatch):
    honest = verify._run

    def crowded(output, asked):
        found = honest(output, asked)
        found["together"][-1, 7] *= 1.01
        return found

    monkeypatch.setattr(verify, "_run", crowded)
    with pytest.raises(UserError, match=r"1 of 96 tokens: token 7 scores .*llama \(together\)"):
        verified(mode, tmp_path)
