"""Rotary position embedding tables (Su et al. 2021) and their context extensions.

Behaviour matches ``transformers/modeling_rope_utils.py``: ``linear`` (Chen et al. 2023),
``dynamic`` NTK (bloc97 2023) and the frequency-dependent ``llama3`` of Llama 3.1.
"""

import math

import numpy as np

from llm.llama.config import LlamaConfig, RopeScaling


def _llama3(inv_freq: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Stretch low frequencies by ``factor``, keep high ones, blend those between."""
    original = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
    stretched = np.where(
        wavelength > original / scaling.low_freq_factor, inv_freq / scaling.factor, inv_freq
    )
    between = (wavelength <= original / scaling.low_freq_factor) & (
        wavelength >= original / scaling.high_freq_factor
    )
    return np.where(between, blend, stretched)


def inverse_frequencies(config: LlamaConfig, length: int = 0) -> np.ndarray:
    """Return the angular step per position of each rotated pair.

    Args:
        config: the architecture.
        length: positions in use; only ``dynamic`` depends on it, once it exceeds the trained
            context. Cached decoding has to pick one length for a whole session, as the keys that
            are already in the cache were rotated with it.

    Returns:
        float32 ``[head_dim / 2]``, radians.
    """
    scaling, theta = config.rope_scaling, config.rope_theta
    trained = config.max_position_embeddings
    if scaling.rope_type == "dynamic" and length > trained:
        stretch = scaling.factor * length / trained - (scaling.factor - 1)
        theta *= stretch ** (config.head_dim / (config.head_dim - 2))
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    inv_freq = 1.0 / np.power(np.float32(theta), exponents, dtype=np.float32)
    if scaling.rope_type == "linear":
        inv_freq = inv_freq / np.float32(scaling.factor)
    elif scaling.rope_type == "llama3":
        inv_freq = _llama3(inv_freq, scaling)
    return inv_freq.astype(np.float32)
