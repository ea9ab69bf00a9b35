"""Damaged and foreign model directories: each is refused by name before anything is loaded."""

import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.errors import UserError
from llm.llama.build import load_model
from llm.llama.config import load_config
from llm.llama.files.checkpoint import open_checkpoint
from tests.unit.llama.files.checkpoint_files import (
    INDEX,
    SINGLE,
    tensors,
    write_config,
    write_sharded,
    write_single,
)

SHARD = "model-00002-of-00002.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def save_changed(directory, changes):
    """Write the single file with some tensors replaced, or dropped where the change is None."""
    merged = tensors() | changes
    save_file({k: v for k, v in merged.items() if v is not None}, directory / SINGLE)


def replace_header(file, change):
    """Rewrite the JSON header of a safetensors file; ``change`` edits or replaces it."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def edit_entry(directory, **changes):
    replace_header(directory / SINGLE, lambda header: header[Q_PROJ].update(changes))


def edit_index(directory, change):
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    (directory / INDEX).write_text(json.dumps(change(index) or index), encoding="utf-8")


def cut(file, keep):
    file.write_bytes(file.read_bytes()[:keep])


def with_bin_only(directory):
    (directory / SINGLE).rename(directory / "pytorch_model.bin")


def with_pdparams_only(directory):
    (directory / SINGLE).rename(directory / "model_state.pdparams")


def zeros(*shape):
    return np.zeros(shape, np.float32)


SINGLE_CASES = [
    (lambda d: (d / "config.json").unlink(), "has no config.json; give a model directory"),
    (lambda d: (d / "config.json").write_text("{"), r"config.json is not valid JSON"),
    (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), r"config.json is not valid JSON"),
    (lambda d: (d / "config.json").write_text("[]"), "config.json has to hold a JSON object"),
    (lambda d: (d / "generation_config.json").write_text("nope"), "generation_config.json is not"),
    (lambda d: write_config(d, model_type="qwen2"), "model_type='qwen2' is not llama"),
    (
        lambda d: write_config(d, quantization_config={"quant_method": "bitsandbytes"}),
        r"weights are quantized \(bitsandbytes\); use the checkpoint they were made from",
    ),
    (
        lambda d: write_config(d, rope_scaling={"rope_type": "mrope", "factor": 4.0}),
        "rope type 'mrope' is not one of default, linear, dynamic, llama3, yarn",
    ),
    (lambda d: write_config(d, num_key_value_heads=3), "num_attention_heads=4 is not a multiple"),
    (lambda d: (d / SINGLE).unlink(), "has neither model.safetensors nor model.safetensors.index"),
    (with_bin_only, "pytorch_model.bin is no file of torch.save"),
    (with_pdparams_only, "model_state.pdparams is no pickle of arrays: opcode"),
    (lambda d: (d / SINGLE).write_bytes(b""), "model.safetensors has no header: it is cut off"),
    (lambda d: cut(d / SINGLE, 5), "has no header: it is cut off"),
    (lambda d: cut(d / SINGLE, 300), "has no header: it is cut off"),
    (lambda d: cut(d / SINGLE, -8), "is cut off: tensor model.norm.weight ends at byte"),
    (
        lambda d: (d / SINGLE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha"),
        "is a Git LFS pointer; run `git lfs pull`",
    ),
    (lambda d: (d / SINGLE).write_bytes(os.urandom(4096)), "has no header: it is cut off or no"),
    (
        lambda d: (d / SINGLE).write_bytes(struct.pack("<Q", 64) + b"\xff" * 100),
        "has a damaged safetensors header",
    ),
    (
        lambda d: (d / SINGLE).write_bytes(struct.pack("<Q", 2) + b"[]"),
        "has a damaged safetensors header: not a JSON object",
    ),
    (lambda d: edit_entry(d, shape=[16, 15]), "do not hold F32 of shape .16, 15."),
    (lambda d: edit_entry(d, shape=[-16, -16]), "do not hold F32 of shape .-16, -16."),
    (lambda d: edit_entry(d, data_offsets=[0]), f"has a damaged entry for tensor {Q_PROJ}"),
    (lambda d: edit_entry(d, shape=None), f"has a damaged entry for tensor {Q_PROJ}"),
    (lambda d: edit_entry(d, dtype="I8"), f"{Q_PROJ} has type I8; supported: F32, F16, BF16"),
    (
        lambda d: save_changed(d, {Q_PROJ: zeros(16, 8)}),
        rf"{Q_PROJ} has shape \[16, 8\], the config asks for \[16, 16\]",
    ),
    (
        lambda d: write_config(d, intermediate_size=32),
        r"gate_proj.weight has shape \[24, 16\], the config asks for \[32, 16\]",
    ),
    (
        lambda d: write_config(d, num_key_value_heads=4),
        r"k_proj.weight has shape \[8, 16\], the config asks for \[16, 16\]",
    ),
    (
        lambda d: write_config(d, vocab_size=48),
        r"embed_tokens.weight has shape \[40, 16\], the config asks for \[48, 16\]",
    ),
    (
        lambda d: save_changed(d, {"lm_head.weight": None}),
        "lacks lm_head.weight: config.json describes another model",
    ),
    (
        lambda d: save_changed(d, {"model.layers.0.self_attn.q_norm.weight": zeros(4)}),
        "has unexpected model.layers.0.self_attn.q_norm.weight",
    ),
    (
        lambda d: write_config(d, num_hidden_layers=3),
        r"lacks model.layers.2.input_layernorm.weight, .* and 6 more: config.json describes",
    ),
    (lambda d: write_config(d, num_hidden_layers=1), "has unexpected model.layers.1"),
    (lambda d: write_config(d, attention_bias=True), "lacks model.layers.0.self_attn.k_proj.bias"),
]

SHARDED_CASES = [
    (lambda d: (d / SHARD).unlink(), f"lacks {SHARD}, which {INDEX} names"),
    (lambda d: cut(d / SHARD, -100), f"{SHARD} is cut off: tensor"),
    (lambda d: (d / INDEX).write_text("{"), f"{INDEX} is damaged"),
    (lambda d: edit_index(d, lambda index: {"metadata": {}}), f"{INDEX} is damaged"),
    (lambda d: edit_index(d, lambda index: {"weight_map": []}), f"{INDEX} is damaged"),
    (
        lambda d: edit_index(d, lambda index: index["weight_map"].update(x="../../etc/passwd")),
        f"{INDEX} names files outside its own directory",
    ),
    (
        lambda d: edit_index(d, lambda index: index["weight_map"].update({Q_PROJ: SHARD})),
        f"{SHARD} lacks tensor {Q_PROJ}, which {INDEX} puts there",
    ),
    (
        lambda d: edit_index(
            d, lambda index: index["weight_map"].pop("model.norm.weight") and None
        ),
        "holds model.norm.weight, but .* does not have it",
    ),
]


@pytest.mark.parametrize(
    ("write", "damage", "message"),
    [(write_single, *case) for case in SINGLE_CASES]
    + [(write_sharded, *case) for case in SHARDED_CASES],
    ids=[message for _, message in SINGLE_CASES + SHARDED_CASES],
)
def test_refused_by_name(tmp_path, write, damage, message):
    load_model(write(tmp_path))
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_not_a_directory(tmp_path):
    with pytest.raises(UserError, match="'/no/such/model' is not a model directory"):
        load_model("/no/such/model")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(UserError, match="is not a model directory"):
        load_model(file)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_types_that_this_device_cannot_compute_in(tmp_path, dtype):
    message = "is not one of float32" if dtype == "int8" else f"dtype={dtype} needs a GPU"
    with pytest.raises(UserError, match=message):
        load_model(write_single(tmp_path), dtype=dtype)


@pytest.mark.parametrize("openers", [load_model, open_checkpoint, load_config])
def test_one_file_of_a_model_names_its_directory(tmp_path, openers):
    (directory := tmp_path / "model").mkdir()
    write_single(directory)
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(UserError, match=f"a file of one; give its directory, {directory}$"):
            openers(directory / name)
    (tmp_path / "mp_rank_00").mkdir()
    (tmp_path / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"x")
    for place in (tmp_path / "mp_rank_00", tmp_path / "mp_rank_00" / "model_optim_rng.pt"):
        with pytest.raises(UserError, match=f"one rank's; that of all ranks is {tmp_path}"):
            openers(place)
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(UserError, match="is not a model directory and no GGUF file"):
        openers(tmp_path / "notes.txt")
