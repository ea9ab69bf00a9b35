"""Architecture in GGUF metadata, read as config.json and written from a configuration.

Keys are llama.cpp's (``gguf-py/gguf/constants.py``). Llama 3.1's rotary scaling has none: its
factors lie in the file as the tensor ``rope_freqs.weight``, one for each rotated pair.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any

from common.errors import UserError
from common.gguf import GGUFHeader
from llm.llama.rope_scaling import RopeScaling

ARCHITECTURE = "llama"
ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# Keys of config.json by llama.cpp's, below the architecture's name, and the kinds of values.
_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
_NUMBERS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta"}
# Keys that would change what the network computes, at the values at which they do not.
_IDLE = {
    "expert_count": (0,),
    "attention.sliding_window": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "attention.causal": (True,),
    "logit_scale": (0.0,),
    "embedding_scale": (0.0,),
    "residual_scale": (0.0,),
    "attention.scale": (0.0,),
    "use_parallel_residual": (False,),
}
# Llama 3.1's, as all published models of it have them; the factor is seen in the tensor.
_LOW, _HIGH, _ORIGINALS = 1.0, 4.0, (8192, 4096, 2048, 16384, 32768)
_ROUNDING = 1e-5


def described(header: GGUFHeader) -> dict[str, Any]:
    """Return what config.json of the model would hold.

    Raises:
        UserError: another architecture, or one that computes otherwise than a Llama; values that
            are damaged.
    """
    file = header.file
    architecture = header.get("general.architecture", str)
    if header.get("general.type", str, "model") != "model":
        raise UserError(
            f"{file} holds no model but {header.metadata['general.type']!r}; give the model's file"
        )
    if architecture != ARCHITECTURE:
        raise UserError(
            f"{file}: general.architecture={architecture!r} is not llama, the one that is read"
        )
    for key, idle in _IDLE.items():
        value = header.metadata.get(f"{ARCHITECTURE}.{key}", idle[0])
        if value not in idle:
            raise UserError(f"{file}: {ARCHITECTURE}.{key}={value!r} is of no Llama")
    raw: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    for keys, kind in ((_SIZES, int), (_NUMBERS, float)):
        for key, name in keys.items():
            value = header.get(f"{ARCHITECTURE}.{key}", kind)
            if value is not None:
                raw[name] = value if kind is int else shortest(value)
    if EMBEDDING not in header.tensors:
        raise UserError(f"{file} holds no weights ({EMBEDDING} is missing), only a vocabulary")
    raw["vocab_size"] = header.tensors[EMBEDDING].shape[0]
    raw["tie_word_embeddings"] = HEAD not in header.tensors
    raw["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    raw["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    raw["rope_scaling"] = _scaling(header, raw)
    raw.update(_ids(header))
    _check_whole_heads(header, raw)
    return raw


def shortest(value: float) -> float:
    """Return the shortest decimal number that a float32 stands for: 1e-05, not 9.9999997e-06."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def _ids(header: GGUFHeader) -> dict[str, Any]:
    """Return the ids of control tokens; all that end an answer count."""
    found = {
        name: header.get(f"tokenizer.ggml.{name}_token_id", int)
        for name in ("bos", "eos", "eot", "eom", "padding")
    }
    ends = list(
        dict.fromkeys(i for i in (found["eos"], found["eot"], found["eom"]) if i is not None)
    )
    return {
        "bos_token_id": found["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": found["padding"],
    }


def _check_whole_heads(header: GGUFHeader, raw: dict[str, Any]) -> None:
    rotated = header.get(f"{ARCHITECTURE}.rope.dimension_count", int)
    heads = raw.get("num_attention_heads")
    if rotated is None or not heads:
        return
    size = raw.get("head_dim", raw.get("hidden_size", 0) // heads)
    if rotated != size:
        raise UserError(
            f"{header.file}: {ARCHITECTURE}.rope.dimension_count={rotated} rotates a part of each "
            f"head of {size}; Llama rotates all"
        )


def _scaling(header: GGUFHeader, raw: dict[str, Any]) -> dict[str, Any] | None:
    """Return rotary scaling as config.json has it."""
    prefix = f"{ARCHITECTURE}.rope.scaling"
    kind = header.get(f"{prefix}.type", str, "none")
    factor = header.get(f"{prefix}.factor", float)
    if factor is None:  # an older spelling
        factor = header.get(f"{ARCHITECTURE}.rope.scale_linear", float)
        kind = "linear" if factor not in (None, 1.0) and kind == "none" else kind
    if ROPE_FACTORS in header.tensors:
        return _of_factors(header, raw)
    if kind == "none" or factor in (None, 0.0, 1.0):
        return None
    scaling = {"rope_type": kind, "factor": shortest(factor)}
    if kind == "yarn":
        original = header.get(f"{prefix}.original_context_length", int)
        scaling["original_max_position_embeddings"] = original
    return scaling


def _of_factors(header: GGUFHeader, raw: dict[str, Any]) -> dict[str, Any]:
    """Return Llama 3.1's settings that give the stored factors.

    Raises:
        UserError: none of those in use does.
    """
    tensor = header.tensors[ROPE_FACTORS]
    if tensor.dtype != "F32":
        raise UserError(f"{header.file}: {ROPE_FACTORS} has type {tensor.dtype}, not F32")
    with header.file.open("rb") as stream:
        stream.seek(tensor.offset)
        stored = struct.unpack(f"<{tensor.nbytes // 4}f", stream.read(tensor.nbytes))
    theta = raw.get("rope_theta", 10000.0)
    for original in _ORIGINALS:
        scaling = RopeScaling("llama3", max(1.0, shortest(max(stored))), _LOW, _HIGH, original)
        wanted = rope_factors(scaling, theta, 2 * len(stored))
        if all(abs(a - b) <= _ROUNDING * b for a, b in zip(stored, wanted, strict=True)):
            return scaling.to_hf() or {}
    raise UserError(
        f"{header.file}: {ROPE_FACTORS} is not Llama 3.1's scaling, with frequencies between "
        f"{_LOW:g} and {_HIGH:g} turns blended; convert from the model in Hugging Face's layout"
    )


def rope_factors(scaling: RopeScaling, theta: float, head_dim: int) -> list[float]:
    """Return what Llama 3.1 divides the frequency of each rotated pair by.

    The formula is that of ``llama.cpp/convert_hf_to_gguf.py``, ``generate_extra_tensors``.

    Args:
        scaling: of the type ``llama3``.
        theta: the base of the frequencies.
        head_dim: of a head; there are half as many pairs.
    """
    original, factors = scaling.original_max_position_embeddings, []
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
        smooth = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return factors


def metadata(config: Any, vocab_size: int) -> Sequence[tuple[str, Any]]:
    """Return the metadata of an architecture, floats as floats and counts as whole numbers.

    Args:
        config: a ``LlamaConfig``.
        vocab_size: rows of the embedding.

    Raises:
        UserError: rotary scaling that the format cannot say.
    """
    scaling: RopeScaling = config.rope_scaling
    entries: list[tuple[str, Any]] = [
        (f"{ARCHITECTURE}.{key}", getattr(config, name))
        for key, name in (*_SIZES.items(), *_NUMBERS.items())
    ]
    entries += [
        (f"{ARCHITECTURE}.attention.value_length", config.head_dim),
        (f"{ARCHITECTURE}.rope.dimension_count", config.head_dim),
        (f"{ARCHITECTURE}.vocab_size", vocab_size),
    ]
    if scaling.rope_type in ("default", "llama3"):
        return entries
    plain_yarn = RopeScaling(
        "yarn",
        scaling.factor,
        original_max_position_embeddings=scaling.original_max_position_embeddings,
    )
    if scaling.rope_type != "linear" and scaling != plain_yarn:
        raise UserError(
            f"rotary scaling {scaling.to_hf()} has no place in a GGUF file; linear, llama3 and "
            "yarn with its usual settings have"
        )
    prefix = f"{ARCHITECTURE}.rope.scaling"
    entries += [(f"{prefix}.type", scaling.rope_type), (f"{prefix}.factor", float(scaling.factor))]
    if scaling.rope_type == "yarn":
        original = scaling.original_max_position_embeddings
        entries.append((f"{prefix}.original_context_length", original))
    return entries
