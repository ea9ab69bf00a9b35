"""Smoothing changes no function, and lets 8 bits hold activations with outliers."""

import numpy as np
import paddle
import pytest

from common.errors import UserError
from llm.llama.build import build_model
from llm.llama.config import PRESETS
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.network import quantize_model
from llm.llama.quantization.smoothing import smooth

TINY = PRESETS["tiny-random-llama"].replace(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    initializer_range=0.15,
    attention_bias=True,
    mlp_bias=True,
)
ROWS = np.random.default_rng(0).integers(0, 96, [9, 16])


def outliers(seed=3):
    """Return a network in which few channels are a hundred times the others, as in large ones."""
    model = build_model(TINY, seed=seed)
    rng = np.random.default_rng(1)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            value = np.ones(64, np.float32)
            value[rng.choice(64, 3, replace=False)] = 100.0
            norm.weight.set_value(value)
        for linear in (layer.self_attn.q_proj, layer.mlp.up_proj, layer.mlp.gate_proj):
            linear.bias.set_value(rng.normal(0, 0.1, linear.bias.shape).astype(np.float32))
            linear.weight.set_value(0.1 * linear.weight)
    model.eval()
    return model


def logits(model):
    with paddle.no_grad():
        return model(paddle.to_tensor(ROWS)).numpy()


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_function_stays(strength):
    model = outliers()
    wanted = logits(model)
    before = model.model.layers[1].mlp.down_proj.weight.numpy().copy()
    assert smooth(model, ROWS, strength) is model
    assert np.abs(model.model.layers[1].mlp.down_proj.weight.numpy() / before - 1).max() > 0.1
    np.testing.assert_allclose(logits(model), wanted, atol=2e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.8])
def test_channels_end_as_the_paper_says(strength):
    """With a and w the largest input and weight of a channel, a ** strength = w ** (1 - strength).

    Strength 0.5 makes them equal.
    """
    model = smooth(outliers(), ROWS, strength)
    layer, seen = model.model.layers[1], {}
    attention = layer.self_attn
    readers = {
        attention.q_proj: (attention.q_proj, attention.k_proj, attention.v_proj),
        layer.mlp.down_proj: (layer.mlp.down_proj,),
    }
    for first in readers:
        first.register_forward_pre_hook(
            lambda linear, given: seen.update({linear: given[0].abs().max([0, 1]).numpy()})
        )
    logits(model)
    for first, linears in readers.items():
        weight = np.max([abs(linear.weight.numpy()).max(1) for linear in linears], axis=0)
        np.testing.assert_allclose(seen[first] ** strength, weight ** (1 - strength), rtol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_rounded_inputs_keep_more(seed):
    config = QuantConfig.of_type("A8W8")
    wanted = logits(outliers(seed))
    plain = np.square(logits(quantize_model(outliers(seed), config)) - wanted).mean()
    smoothed = quantize_model(smooth(outliers(seed), ROWS), config)
    assert np.square(logits(smoothed) - wanted).mean() < 0.5 * plain


def test_silent_channels_stay():
    model = outliers()
    weight = np.ones(64, np.float32)
    weight[7] = 0
    model.model.layers[0].input_layernorm.weight.set_value(weight)
    before = model.model.layers[0].self_attn.q_proj.weight.numpy()[7].copy()
    smooth(model, ROWS)
    np.testing.assert_array_equal(model.model.layers[0].self_attn.q_proj.weight.numpy()[7], before)
    assert np.isfinite(logits(model)).all()


def test_refusals():
    for strength in (0, -1, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"strength .* has to be above 0 and at most 1"):
            smooth(outliers(), ROWS, strength)
    with pytest.raises(UserError, match="smooth before quantizing"):
        smooth(quantize_model(outliers(), QuantConfig.of_type("W8")), ROWS)
    with pytest.raises(UserError, match="token id 96 is outside"):
        smooth(outliers(), np.full([1, 4], 96))
