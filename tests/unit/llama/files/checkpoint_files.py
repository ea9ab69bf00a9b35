"""Model directories written by the ``safetensors`` package, to be damaged by tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def tensors(dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Return random weights of ``CONFIG`` under Hugging Face's names, ``[out, in]``."""
    shapes = {"model.embed_tokens.weight": (40, 16), "lm_head.weight": (40, 16)}
    for layer in ("model.layers.0", "model.layers.1"):
        for part, size in (("q", 16), ("k", 8), ("v", 8), ("o", 16)):
            shapes[f"{layer}.self_attn.{part}_proj.weight"] = (size, 16)
        for part, shape in (("gate", (24, 16)), ("up", (24, 16)), ("down", (16, 24))):
            shapes[f"{layer}.mlp.{part}_proj.weight"] = shape
        for part in ("input", "post_attention"):
            shapes[f"{layer}.{part}_layernorm.weight"] = (16,)
    shapes["model.norm.weight"] = (16,)
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_config(directory: Path, **changes: Any) -> None:
    """Write config.json; a change to ``...`` drops the key."""
    config = {k: v for k, v in (CONFIG | changes).items() if v is not ...}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_single(directory: Path) -> Path:
    """Write one file and its config."""
    write_config(directory)
    save_file(tensors(), directory / SINGLE)
    return directory


def write_sharded(directory: Path) -> Path:
    """Write two shards, their index and config."""
    write_config(directory)
    items = list(tensors().items())
    weight_map = {}
    for number, part in enumerate((items[:9], items[9:]), start=1):
        name = f"model-{number:05}-of-00002.safetensors"
        save_file(dict(part), directory / name)
        weight_map |= {tensor: name for tensor, _ in part}
    content = {"metadata": {}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(content), encoding="utf-8")
    return directory
