"""Scaling by search changes no function, and outputs less; 8 bits go where 4 cost the most."""

import json

import numpy as np
import paddle
import pytest

from common.errors import UserError
from external_ops import native
from llm.llama.build import build_model, load_model, save_model
from llm.llama.config import PRESETS
from llm.llama.fused import pack
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.calibration import quantize_calibrated
from llm.llama.quantization.network import quantization_of, quantized_linears
from llm.llama.quantization.scaling import (
    apply,
    best_factor,
    costly,
    output_errors,
    output_gradients,
)

TINY = PRESETS["tiny-random-llama"].replace(
    vocab_size=96, hidden_size=64, intermediate_size=96, initializer_range=0.15, mlp_bias=True
)
ROWS = np.random.default_rng(0).integers(0, 96, [6, 16])
UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
MIXED = QuantConfig(4, None, 32, packed=True, wide=(DOWN, UP, "model.layers.1.mlp.gate_proj"))


def uneven(**changes):
    """Return a network some of whose channels are ten times the others'."""
    model = build_model(TINY.replace(**changes), seed=3)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.set_value(np.where(np.arange(64) % 9 == 0, 10, 1).astype(np.float32))
    model.eval()
    return model


def logits(model):
    with paddle.no_grad():
        return model(paddle.to_tensor(ROWS)).numpy()


def numpy_error(x, weight, factor, group, rounds):
    """Mean square error of the outputs of a weight ``[I, O]`` rounded to 4 bits, in float64."""
    wide = (weight * factor[:, None]).T.reshape(weight.shape[1], -1, group)
    step = np.abs(wide).max(-1, keepdims=True) / 7
    rounded = (np.rint(wide / step) * step).reshape(weight.shape[1], -1)
    inputs = x / factor
    if rounds:
        unit = np.abs(inputs).max(-1, keepdims=True) / 127
        inputs = np.rint(inputs / unit) * unit
    return ((inputs @ rounded.T - x @ weight) ** 2).mean(0)


@pytest.mark.parametrize("kind", ["W4", "A8W4"])
def test_search_finds_a_factor_that_changes_outputs_less(kind):
    linear = uneven().model.layers[0].mlp.up_proj
    x = np.random.default_rng(1).standard_normal([40, 64]) * np.where(np.arange(64) % 9, 0.1, 3)
    config = QuantConfig.of_type(kind, 32)
    inputs = paddle.to_tensor(x.astype(np.float32))
    with paddle.no_grad():
        factor, (error,) = best_factor([linear], inputs, config, scaled=True)
        one, (plain,) = best_factor([linear], inputs, config, scaled=False)
    weight, rounds = linear.weight.numpy().astype(np.float64), kind == "A8W4"
    assert (one == 1).all() and error.sum() < 0.7 * plain.sum()
    for by, found in ((factor, error), (one, plain)):
        wanted = numpy_error(x, weight, by.astype(np.float64), 32, rounds)
        np.testing.assert_allclose(found.sum(), wanted.sum(), rtol=0.03)


def test_function_stays_and_errors_are_of_all_linears():
    model = uneven()
    wanted = logits(model)
    before = model.model.layers[1].mlp.down_proj.weight.numpy().copy()
    errors, factors = output_errors(model, QuantConfig.of_type("W4", 32), ROWS, scale=True)
    assert (model.model.layers[1].mlp.down_proj.weight.numpy() != before).any()
    np.testing.assert_allclose(logits(model), wanted, atol=2e-4 * np.abs(wanted).max())
    plain, none = output_errors(uneven(), QuantConfig.of_type("W4", 32), ROWS, scale=False)
    assert errors.keys() == plain.keys() and len(errors) == 14
    again = uneven()
    apply(again, factors)
    np.testing.assert_array_equal(logits(again), logits(model))
    assert not none and sum(e.sum() for e in errors.values()) < sum(e.sum() for e in plain.values())


def test_gradients_are_those_of_biases():
    """Of two tokens only the first is scored, so a bias gets the gradient of that one output."""
    model, row = uneven(), np.array([[5, 9]])
    found = output_gradients(model, row)
    model.token_losses(paddle.to_tensor(row), paddle.to_tensor([9, -100]))[0].sum().backward()
    for name in (UP, DOWN):
        bias = dict(model.named_sublayers())[name].bias
        np.testing.assert_allclose(found[name], bias.grad.numpy() ** 2 / 2, rtol=1e-3)
    assert len(found) == 14


def test_eight_bits_go_where_they_gain_most_per_weight():
    layer = "model.layers.0."
    names = [f"{layer}mlp.{name}_proj" for name in ("gate", "up", "down")]
    names.append(f"{layer}self_attn.o_proj")
    errors = dict(zip(names, map(np.array, ([1.0], [2.0], [2.0, 2.0], [9.0])), strict=True))
    ones = {name: np.ones_like(error) for name, error in errors.items()}
    sizes = dict(zip(names, (10, 10, 10, 70), strict=True))
    # gate and up together gain 3 for 20 weights, down 4 for 10, o 9 for 70.
    assert costly(errors, ones, sizes, 0.1) == [names[2]]
    assert costly(errors, ones, sizes, 0.3) == sorted(names[:3])
    assert costly(errors, ones, sizes, 0.29) == [names[2]]
    assert costly(errors, ones, sizes, 1.0) == sorted(names)
    gradients = ones | {names[3]: np.array([100.0])}
    assert costly(errors, gradients, sizes, 0.75) == [names[3]]


@pytest.mark.parametrize("rounds", [False, True])
def test_mixed_widths_travel_through_files_and_kernels(tmp_path, rounds):
    config = QuantConfig(4, 8 if rounds else None, 32, packed=True, wide=MIXED.wide)
    model = quantize_calibrated(uneven(), config, ROWS)
    bits = {name: layer.bits for name, layer in quantized_linears(model)}
    assert {name for name, width in bits.items() if width == 8} == set(MIXED.wide)
    assert set(quantization_of(model).wide) == set(MIXED.wide)
    save_model(model, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert [g["weights"]["num_bits"] for g in described["config_groups"].values()] == [4, 8]
    again = load_model(tmp_path)
    again.eval()
    np.testing.assert_array_equal(logits(again), logits(model))
    if native.available():
        wanted = logits(model)
        packed = pack(again)
        with paddle.no_grad():
            found = packed(paddle.to_tensor(ROWS)).numpy()
        np.testing.assert_allclose(found, wanted, atol=(2e-2 if rounds else 1e-4) * wanted.max())


def test_foreign_mixtures_are_refused():
    described = MIXED.to_hf()
    assert QuantConfig.from_hf(described) == MIXED
    for change in ({"num_bits": 4}, {"strategy": "group", "group_size": 32}):
        described = MIXED.to_hf()
        described["config_groups"]["group_1"]["weights"].update(change)
        with pytest.raises(UserError, match="settings for some linears alone are supported where"):
            QuantConfig.from_hf(described)
    with pytest.raises(UserError, match="need others of 4 bits"):
        QuantConfig(8, wide=(UP,))
