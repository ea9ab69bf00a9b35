"""Directories that this suite saved, opened by transformers."""

import json

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from llm.llama.build import build_model, save_model
from llm.llama.config import PRESETS
from tests.parity.ours import LOGIT_LIMIT, in_file_layout

LENGTH = 40


def shrunk(name):
    """Keep all of a preset but its size: rotary scaling, epsilon, ids, grouping and tying."""
    preset = PRESETS[name]
    grouped = preset.num_key_value_heads < preset.num_attention_heads
    return preset.replace(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2 if grouped else 4,
        head_dim=16,
    )


VARIANTS = {name: (shrunk(name), {}) for name in PRESETS} | {
    "biases, sharded": (
        shrunk("llama-2-70b").replace(attention_bias=True, mlp_bias=True),
        {"max_shard_bytes": 20_000},
    ),
    "tied, sharded": (shrunk("llama-3.2-1b"), {"max_shard_bytes": 20_000}),
    "wide heads": (shrunk("llama-2-7b").replace(head_dim=24), {}),
}


def drawn(config, seed):
    """Return a network with logits of order one, biases and norms away from their start."""
    model = build_model(config, seed=seed)
    model.eval()
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        value = rng.standard_normal(parameter.shape, dtype=np.float32)
        if parameter.ndim == 1:
            parameter.set_value(0.2 * value + (1.0 if "norm" in name else 0.0))
        else:
            parameter.set_value(value / np.float32(np.sqrt(config.hidden_size)))
    return model


@pytest.fixture(scope="module")
def opened(peer, tmp_path_factory):
    """Save every variant, let transformers open all of them in one process."""
    root = tmp_path_factory.mktemp("ours")
    models = {}
    for seed, (name, (config, options)) in enumerate(VARIANTS.items()):
        models[name] = drawn(config, seed)
        directory = root / str(seed)
        save_model(models[name], directory, **options)
        ids = np.random.default_rng(seed).integers(0, config.vocab_size, [2, LENGTH])
        save_file({"ids": ids}, directory / "ids.safetensors")
    # bfloat16 has no matrix product on CPU; saving it does not need one.
    narrow = drawn(VARIANTS["llama-3-8b"][0], 99)
    narrow.to(dtype="bfloat16")
    save_model(narrow, root / "bfloat16", max_shard_bytes=30_000)
    save_file({"ids": np.zeros([1, 2], np.int64)}, root / "bfloat16" / "ids.safetensors")
    peer("read", root)
    return root, models, narrow


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_reads_equal_weights_and_logits(opened, name, measured):
    root, models, _ = opened
    model = models[name]
    directory = root / str(list(VARIANTS).index(name))
    theirs = load_file(directory / "hf.safetensors")
    for parameter_name, parameter in model.named_parameters():
        mine = in_file_layout(model, parameter_name, parameter.numpy())
        np.testing.assert_array_equal(mine, theirs[f"weight.{parameter_name}"])
    ids = load_file(directory / "ids.safetensors")["ids"]
    with paddle.no_grad():
        logits = model(paddle.to_tensor(ids)).numpy()
    assert 1 < np.abs(logits).max() < 10
    error = float(np.abs(logits - theirs["logits"]).max())
    assert measured(f"ours in transformers: {name}", "logits", error) <= LOGIT_LIMIT


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_reads_equal_settings(opened, name):
    root, models, _ = opened
    config = models[name].config
    directory = root / str(list(VARIANTS).index(name))
    theirs = json.loads((directory / "hf.json").read_text(encoding="utf-8"))
    rope = theirs["rope_parameters"]
    assert rope["rope_theta"] == config.rope_theta
    assert rope["rope_type"] == config.rope_scaling.rope_type
    if rope["rope_type"] == "llama3":
        for key in ("factor", "low_freq_factor", "high_freq_factor"):
            assert rope[key] == getattr(config.rope_scaling, key)
        assert rope["original_max_position_embeddings"] == 8192
    for key in (
        "vocab_size",
        "hidden_size",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "bos_token_id",
    ):
        assert theirs[key] == getattr(config, key), key
    eos = theirs["eos_for_generation"]
    assert tuple(eos if isinstance(eos, list) else [eos]) == config.eos_token_id


def test_bfloat16_weights_arrive_bit_for_bit(opened):
    root, _, model = opened
    config = json.loads((root / "bfloat16" / "config.json").read_text(encoding="utf-8"))
    assert config["torch_dtype"] == "bfloat16"
    theirs = load_file(root / "bfloat16" / "hf.safetensors")
    for name, parameter in model.named_parameters():
        mine = in_file_layout(model, name, parameter.astype("float32").numpy())
        np.testing.assert_array_equal(mine, theirs[f"weight.{name}"])
