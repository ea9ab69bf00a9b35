"""Rotary frequencies against the papers' formulas, one pair at a time, in float64."""

import math

import numpy as np
import paddle
import pytest

from llm.llama.build import build_model
from llm.llama.config import PRESETS, LlamaConfig, RopeScaling
from llm.llama.rope import inverse_frequencies

ULP = 2.0**-23


def config(theta, size, scaling=None, trained=4096):
    return LlamaConfig(
        100,
        64,
        64,
        1,
        4,
        4,
        trained,
        head_dim=size,
        rope_theta=theta,
        rope_scaling=scaling or RopeScaling(),
    )


def llama3(frequency, scaling):
    """Llama 3.1: full turns within the original context decide how far a pair is slowed."""
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    return frequency * (kept + (1 - kept) / scaling.factor)


def formula(config, length=0):
    scaling, theta = config.rope_scaling, config.rope_theta
    ratio = length / config.max_position_embeddings
    if scaling.rope_type == "dynamic" and ratio > 1:
        stretch = 1 + scaling.factor * (ratio - 1)
        theta *= stretch ** (config.head_dim / (config.head_dim - 2))
    steps = [theta ** (-2 * pair / config.head_dim) for pair in range(config.head_dim // 2)]
    if scaling.rope_type == "linear":
        return [step / scaling.factor for step in steps]
    if scaling.rope_type == "llama3":
        return [llama3(step, scaling) for step in steps]
    return steps


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    preset = PRESETS[name]
    np.testing.assert_allclose(inverse_frequencies(preset), formula(preset), rtol=4 * ULP)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("size", [4, 64, 100, 128])
@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(),
        RopeScaling("linear", factor=3.0),
        RopeScaling("dynamic", factor=2.0),
        RopeScaling("llama3", factor=8.0),
        RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        RopeScaling("llama3", 4.0, 0.5, 2.0, 50),
    ],
    ids=lambda s: f"{s.rope_type}-{s.factor}-{s.original_max_position_embeddings}",
)
@pytest.mark.parametrize("length", [0, 4096, 5000, 40000])
def test_variants(theta, size, scaling, length):
    one = config(theta, size, scaling)
    table = inverse_frequencies(one, length)
    assert table.dtype == np.float32 and table.shape == (size // 2,)
    # Interpolation between bands subtracts near equals, in float32 as in transformers.
    rtol = (32 if scaling.rope_type == "llama3" else 8) * ULP
    np.testing.assert_allclose(table, formula(one, length), rtol=rtol)


def test_all_three_bands_of_llama_31():
    preset = PRESETS["llama-3.1-8b"]
    plain = inverse_frequencies(preset.replace(rope_scaling=RopeScaling()))
    ratio = plain / inverse_frequencies(preset)
    assert (ratio == 1).sum() >= 20
    assert np.isclose(ratio, 8).sum() >= 20
    between = (ratio > 1.001) & (ratio < 7.999)
    assert between.sum() >= 3
    assert (np.diff(ratio) >= -1e-5).all()


def test_dynamic_scaling_starts_beyond_the_trained_context():
    one = config(10000.0, 64, RopeScaling("dynamic", factor=2.0), trained=128)
    plain = inverse_frequencies(one.replace(rope_scaling=RopeScaling()))
    np.testing.assert_array_equal(inverse_frequencies(one, 128), plain)
    longer = inverse_frequencies(one, 129)
    assert (longer[1:] < plain[1:]).all() and longer[0] == plain[0] == 1


def test_tables_of_the_network_at_far_positions():
    """Angles are float32 products; their cosines are right to float32 even at 120 000."""
    preset = PRESETS["tiny-llama-3.1"]
    model = build_model(preset, seed=0).model
    positions = np.array([[0, 1, 8191, 8192, 120000]])
    cos, sin = model.rotary_tables(paddle.to_tensor(positions), 0, "float32")
    angles = positions[..., None].astype(np.float32) * inverse_frequencies(preset)
    for table, function in ((cos, np.cos), (sin, np.sin)):
        assert table.shape == [1, 5, 1, preset.head_dim // 2]
        exact = function(angles.astype(np.float64))
        np.testing.assert_allclose(table.numpy()[:, :, 0], exact, atol=2 * ULP)
