"""Rotary position embedding tables (Su et al. 2021) and their context extensions.

Behaviour matches ``transformers/modeling_rope_utils.py``: ``linear`` (Chen et al. 2023),
``dynamic`` NTK (bloc97 2023), ``yarn`` (Peng et al. 2023) and the frequency-dependent ``llama3`` of
Llama 3.1.
"""

import math
from typing import Any

import numpy as np

from llm.llama.config import LlamaConfig
from llm.llama.rope_scaling import RopeScaling


def _power(base: np.floating, exponents: np.ndarray | np.floating) -> Any:
    """Raise to a power, rounding once to float32.

    NumPy's float32 power is off by a unit in the last place on some processors. One unit in a
    frequency moves the angle of position 10 000 by 0.001, and logits by more than rounding does.
    """
    return np.power(np.float64(base), np.float64(exponents)).astype(np.float32)


def _llama3(inv_freq: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Stretch low frequencies by ``factor``, keep high ones, blend those between."""
    original = scaling.original_max_position_embeddings
    # PyTorch divides a number by a tensor as number times reciprocal: two roundings.
    wavelength = np.float32(2 * math.pi) * (np.float32(1.0) / inv_freq)
    smooth = (np.float32(original) * (np.float32(1.0) / wavelength) - scaling.low_freq_factor) / (
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


def _yarn(power: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """Stretch pairs that turn seldom in the original context, keep fast ones, blend by number.

    Args:
        power: ``theta ** exponent`` of each pair.
        config: the architecture.
    """
    scaling, size = config.rope_scaling, config.head_dim
    trained = scaling.original_max_position_embeddings

    def pair_with(turns: float) -> float:
        fraction = math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        return size * fraction

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 if low == high else 0
    numbers = np.arange(size // 2, dtype=np.float32)
    ramp = np.clip((numbers - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = np.float32(1.0) - ramp
    stretched = np.float32(1.0) / (np.float32(scaling.factor) * power)
    return stretched * (np.float32(1.0) - kept) + np.float32(1.0) / power * kept


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
    scaling, theta = config.rope_scaling, np.float32(config.rope_theta)
    trained = config.max_position_embeddings
    if scaling.rope_type == "dynamic" and length > trained:
        stretch = np.float32(scaling.factor * length) / np.float32(trained) - np.float32(
            scaling.factor - 1
        )
        theta *= _power(stretch, np.float64(config.head_dim / (config.head_dim - 2)))
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    power = _power(theta, exponents)
    inv_freq = np.float32(1.0) / power
    if scaling.rope_type == "linear":
        inv_freq = inv_freq / np.float32(scaling.factor)
    elif scaling.rope_type == "llama3":
        inv_freq = _llama3(inv_freq, scaling)
    elif scaling.rope_type == "yarn":
        inv_freq = _yarn(power, config)
    return inv_freq.astype(np.float32)
