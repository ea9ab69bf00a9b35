"""GGUF files written by the ``gguf`` package, with rows in llama.cpp's order."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize

from llm.llama.config import LlamaConfig
from llm.llama.files.rank_layout import tensor_shapes

# What the package cannot make: bytes of a block in which every field has a sane value.
_HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_weights(config: LlamaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Return float32 weights with logits of order one, by Hugging Face's names."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        values = rng.standard_normal(shape)
        values = 1 + 0.2 * values if "norm" in name else values / np.sqrt(shape[-1])
        weights[name] = values.astype(np.float32)
    return weights


def permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """Put rows as llama.cpp has them: of each head, the halves' rows in turns."""
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def blocks_of(values: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Return rows in blocks of a type, as bytes; of K types any valid ones."""
    made = gguf.GGMLQuantizationType[kind]
    if kind not in _HALVES:
        return quantize(values, made)
    numbers, size = gguf.GGML_QUANT_SIZES[made]
    stored = rng.integers(0, 256, (values.size // numbers, size), dtype=np.uint8)
    for at in _HALVES[kind]:
        scale = rng.uniform(1e-3, 2e-3, len(stored)).astype(np.float16)
        stored[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return stored.reshape(*values.shape[:-1], -1)


def write_gguf(
    file: Path,
    config: LlamaConfig,
    weights: dict[str, np.ndarray],
    kind: str = "F32",
    metadata: dict[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Write a model; return what its matrices' blocks stand for, in llama.cpp's order.

    Args:
        file: to write.
        config: of the model.
        weights: by Hugging Face's names.
        kind: type of the matrices; vectors are F32.
        metadata: further keys; those that are None are left out.
    """
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add |= {bool: writer.add_bool, list: writer.add_array}
        add[type(value)](key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    rng, wide = np.random.default_rng(1), {}
    for name, values in weights.items():
        count = next((n for inner, n in heads.items() if f".{inner}." in name), None)
        rows = values if count is None else permuted(values, count)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        of = gguf.GGMLQuantizationType[kind if rows.ndim > 1 else "F32"]
        stored = blocks_of(rows, of.name, rng)
        wide[name] = gguf.quants.dequantize(stored, of).reshape(rows.shape)
        writer.add_tensor(theirs, stored, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wide
