"""Tensors and keys beside those that a network reads: honoured, named, or refused."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from common.notes import say_once
from llm.llama.build import load_model, save_model
from llm.llama.config import LlamaConfig, load_config
from llm.llama.files import comparing
from llm.llama.files.checkpoint import open_checkpoint
from llm.llama.files.conversion import convert
from llm.llama.files.rank_layout import RankLayout
from tests.unit.llama.files.checkpoint_files import (
    CONFIG,
    SINGLE,
    tensors,
    write_config,
    write_sharded,
)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROTARY = "model.layers.0.self_attn.rotary_emb.inv_freq"
PLAIN = np.array([1.0, 0.01], np.float32)  # of four numbers a head and theta 10000
IDS = paddle.to_tensor([[1, 5, 39, 7, 0]])


def write(directory: Path, changes: dict[str, Any] | None = None, **config: Any) -> Path:
    """Write a model; a change to None drops the tensor, a key to ``...`` the key."""
    kept = {n: v for n, v in (tensors() | (changes or {})).items() if v is not None}
    save_file(kept, directory / SINGLE)
    write_config(directory, **config)
    return directory


@pytest.fixture
def said(caplog):
    """What was said, each sentence anew."""
    say_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def logits(directory: Path) -> np.ndarray:
    with paddle.no_grad():
        return load_model(directory)(IDS).numpy()


def test_a_head_that_is_not_the_embedding_is_kept(tmp_path, said):
    untied = logits(write(tmp_path))
    write_config(tmp_path, tie_word_embeddings=True)
    model = load_model(tmp_path)
    assert HEAD in dict(model.named_parameters())
    np.testing.assert_array_equal(model(IDS).numpy(), untied)
    assert len(said()) == 1 and "both are kept, as if it said false" in said()[0]
    save_model(model, tmp_path / "again")
    assert not load_config(tmp_path / "again").tie_word_embeddings
    np.testing.assert_array_equal(logits(tmp_path / "again"), untied)


def test_an_equal_head_is_one_matrix(tmp_path, said):
    write(tmp_path, {HEAD: tensors()[EMBEDDING]}, tie_word_embeddings=True)
    assert HEAD not in dict(load_model(tmp_path).named_parameters())
    assert not said()


def test_conversion_and_its_check_see_the_head(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write(source, tie_word_embeddings=True)
    convert(open_checkpoint(source), tmp_path / "hf")
    assert load_config(tmp_path / "hf") == load_config(source).replace(tie_word_embeddings=False)
    np.testing.assert_array_equal(logits(tmp_path / "hf"), logits(source))
    convert(open_checkpoint(source), tmp_path / "ranks", layout=RankLayout(2))
    np.testing.assert_array_equal(logits(tmp_path / "ranks"), logits(source))
    # The check is not blind: another head in the result is seen.
    found = load_file(tmp_path / "hf" / SINGLE)
    save_file(found | {HEAD: found[EMBEDDING]}, tmp_path / "hf" / SINGLE)
    pair = open_checkpoint(source), open_checkpoint(tmp_path / "hf")
    with pytest.raises(UserError, match="logits is off by"):
        comparing.report(comparing.compare(*pair))


def test_rank_files_with_two_copies_that_differ(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write(source, {HEAD: None}, tie_word_embeddings=True)
    ranks = tmp_path / "ranks"
    convert(open_checkpoint(source), ranks, layout=RankLayout())
    file = ranks / "model_state.pdparams"
    stored = tensors()[EMBEDDING].tobytes()
    data = file.read_bytes()
    last = data.rindex(stored)  # lm_head's
    file.write_bytes(data[:last] + bytes(4) + data[last + 4 :])
    with pytest.raises(UserError, match="set it to false in"):
        load_model(ranks)


NAMED = {
    "value head": ({"v_head.summary.weight": PLAIN, "v_head.summary.bias": PLAIN}, {}, "2 tensors"),
    "score": ({"score.weight": PLAIN}, {}, "1 tensors of another head .score.weight."),
    "frequencies of another theta": (
        {ROTARY: 0.5 * PLAIN},
        {},
        "1 of 1 stored rotary frequencies .*rope_theta=10000, default",
    ),
    "frequencies of other heads": ({ROTARY: np.ones(3, np.float32)}, {}, "1 of 1 stored rotary"),
    "code": ({}, {"auto_map": {"AutoModelForCausalLM": "m.M"}}, "auto_map. is not run"),
    "dropout": ({}, {"attention_dropout": 0.1}, "attention_dropout=0.1 is not applied in training"),
    "unknown keys": ({}, {"colour": "red", "tags": []}, "2 keys mean nothing here .*colour, tags"),
    "keys of another rope type": (
        {},
        {"rope_scaling": {"type": "linear", "factor": 2.0, "low_freq_factor": 1.0}},
        "1 keys mean nothing .*rope_scaling.low_freq_factor",
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_named_once(tmp_path, said, case):
    spare, keys, message = NAMED[case]
    write(tmp_path, spare, **keys)
    for _ in range(2):
        load_model(tmp_path)
    open_checkpoint(tmp_path)
    assert len(said()) == 1, said()
    assert re.search(message, said()[0]), said()


SILENT = {
    "frequencies": ({ROTARY: PLAIN}, {}),
    "rounded frequencies": ({ROTARY: PLAIN.astype(np.float16)}, {}),
    "frequencies before scaling": (
        {ROTARY: PLAIN},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "frequencies after scaling": (
        {ROTARY: PLAIN / 2},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "bookkeeping": ({}, {"transformers_version": "4.40.0", "attention_dropout": 0.0}),
    "values at which nothing changes": (
        {},
        {"sliding_window": None, "logit_scale": 1, "num_experts": 0, "layer_types": None},
    ),
    "a window that is off": ({}, {"sliding_window": 64, "use_sliding_window": False}),
    "the same rope twice": (
        {},
        {
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        },
    ),
}


@pytest.mark.parametrize("case", SILENT)
def test_nothing_to_say(tmp_path, said, case):
    spare, keys = SILENT[case]
    load_model(write(tmp_path, spare, **keys))
    assert not said()


REFUSED_TENSORS = {
    "a norm of heads": (
        {"model.layers.0.self_attn.q_norm.weight": PLAIN},
        "has unexpected model.layers.0.self_attn.q_norm.weight",
    ),
    "a layer too many": (
        {"model.layers.2.mlp.down_proj.weight": tensors()["model.layers.1.mlp.down_proj.weight"]},
        "has unexpected model.layers.2",
    ),
    "biases of attention": (
        {"model.layers.1.self_attn.q_proj.bias": np.ones(16, np.float32)},
        "would attention_bias=true be right",
    ),
    "biases of the feed-forward": (
        {"model.layers.1.mlp.up_proj.bias": np.ones(24, np.float32)},
        "would mlp_bias=true be right",
    ),
    "quantized": (
        {"model.layers.1.mlp.up_proj.weight_scale": PLAIN},
        "quantization_config says otherwise",
    ),
    "an adapter": ({"model.layers.1.mlp.up_proj.lora_A.weight": PLAIN}, "as --lora_path"),
    "a scorer of texts": (
        {HEAD: None, "score.weight": PLAIN},
        "its head is score.weight, which scores texts",
    ),
    "wrapped": ({"module.model.norm.weight": PLAIN}, "names begin with 'module.'"),
}


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_refused_tensors(tmp_path, case):
    changes, message = REFUSED_TENSORS[case]
    write(tmp_path, changes)
    for use in (load_model, open_checkpoint):
        with pytest.raises(UserError, match=message):
            use(tmp_path)


def shards(directory: Path, **changes: Any) -> Path:
    """Write two shards and their index; ``extra`` puts tensors into the second unasked."""
    write_sharded(directory)
    second = directory / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | changes.get("extra", {}), second)
    return directory


def test_an_index_and_what_it_does_not_say(tmp_path):
    """transformers reads what shards hold beyond the index, and a single file before any index."""
    load_model(shards(tmp_path))
    shards(tmp_path, extra={EMBEDDING: tensors()[EMBEDDING][::-1].copy()})
    message = "00002-of-00002.safetensors holds model.embed_tokens.weight, but .* puts it into"
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)
    shards(tmp_path, extra={"v_head.weight": PLAIN})
    with pytest.raises(UserError, match=r"holds v_head.weight, but .* does not have it"):
        load_model(tmp_path)
    shards(tmp_path)
    save_file(tensors(), tmp_path / SINGLE)
    for use in (load_model, open_checkpoint):
        with pytest.raises(UserError, match="two models, or parts of two"):
            use(tmp_path)


LINEAR = {"rope_type": "linear", "factor": 2.0}
REFUSED_KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "two ropes": (
        {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 4.0}},
        "rope_parameters and rope_scaling say different things .*factor': 4.0.*factor': 2.0",
    ),
    "two thetas": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        "rope_theta is 10000.0, and 500000.0 in rope_parameters",
    ),
    "two originals": (
        {
            "original_max_position_embeddings": 32,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 16,
            },
        },
        "original_max_position_embeddings is 32, and 16 in rope_scaling",
    ),
    "a factor without a type": ({"rope_scaling": {"factor": 4.0}}, "no type that stretches by it"),
    "ropes of layers": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "full_attention is a mapping of its own",
    ),
    "yarn without a range": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}},
        "beta_fast=1 has to be at least beta_slow=2",
    ),
    "yarn and a theta of 1": (
        {"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        "rope_theta=1.0 has to exceed 1",
    ),
    "partial rotation": (
        {"rope_parameters": {"rope_type": "default"}, "partial_rotary_factor": 0.5},
        "partial_rotary_factor=0.5",
    ),
    "a window": ({"sliding_window": 64}, "sliding_window=64 makes another function"),
    "a softcap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    "experts": ({"num_local_experts": 8}, "num_local_experts=8"),
    "layers with windows": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "every layer of a Llama attends",
    ),
    "a model around it": ({"vision_config": {"hidden_size": 8}}, "vision_config="),
    **{
        f"{name} of null": ({name: None}, f"config.json: missing {name}")
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size"),
            *("num_hidden_layers", "num_attention_heads"),
        )
    },
    "another name of quantization": (
        {"compression_config": {"quant_method": "compressed-tensors"}},
        "write it as quantization_config",
    ),
}


@pytest.mark.parametrize("case", REFUSED_KEYS)
def test_refused_keys(case):
    keys, message = REFUSED_KEYS[case]
    with pytest.raises(UserError, match=message):
        LlamaConfig.from_hf(CONFIG | keys)


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        ({"rope_type": "linear", "factor": 2.5}, 160),
        ({"rope_type": "dynamic", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
    ],
)
def test_context(scaling, context):
    config = LlamaConfig.from_hf(CONFIG | {"rope_scaling": scaling})
    assert config.context == context
    again = LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf())))
    assert again == config
