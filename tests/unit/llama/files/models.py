"""Small checkpoints in Hugging Face's layout, written and read by the ``safetensors`` package."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from llm.llama.config import PRESETS, LlamaConfig
from llm.llama.files.rank_layout import tensor_shapes

TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
}
SHAPES = {
    "llama-2-gqa": PRESETS["llama-2-70b"].replace(**_SIZES),
    "llama-3.1": PRESETS["llama-3.1-8b"].replace(**_SIZES),
    "llama-3.2-tied": PRESETS["llama-3.2-1b"].replace(**_SIZES),
    "biases": PRESETS["llama-2-7b"].replace(**_SIZES, attention_bias=True, mlp_bias=True),
}


def write_model(
    directory: Path, config: LlamaConfig, dtype: str = "float32", files: int = 1, seed: int = 0
) -> Path:
    """Write random weights with logits of order one, config.json and a tokenizer's file."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    entries = {}
    for name, shape in tensor_shapes(config).items():
        values = rng.standard_normal(shape)
        values = 1 + 0.2 * values if "norm" in name else values / np.sqrt(shape[-1])
        entries[name] = values.astype(TYPES[dtype])
    names = list(entries)
    parts = [names[number::files] for number in range(files)]
    where = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{files:05}.safetensors" if files > 1 else "model.safetensors"
        save_file({n: entries[n] for n in part}, directory / name, {"format": "pt"})
        where |= dict.fromkeys(part, name)
    if files > 1:
        index = {"metadata": {}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config.to_hf(dtype)))
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 7}')
    return directory


def read_tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return type, shape and bytes of every tensor in a directory's safetensors files."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, entry in safetensors.deserialize(file.read_bytes()):
            assert name not in found
            found[name] = (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return found


def as_arrays(directory: Path) -> dict[str, np.ndarray]:
    """Return every tensor of a directory's safetensors files as an array of its own type."""
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    return {
        name: np.frombuffer(data, kinds[dtype]).reshape(shape)
        for name, (dtype, shape, data) in read_tensors(directory).items()
    }
