"""GPTQ against the slow method that it is derived from, and against plain rounding."""

import shutil

import numpy as np
import paddle
import pytest

from common.errors import UserError
from common.flags import load
from llm.config.tools import QuantizeArguments
from llm.llama.build import build_model, save_model
from llm.llama.config import PRESETS
from llm.llama.layers import SAME_INPUT
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization import calibration
from llm.llama.quantization.calibration import quantize_calibrated
from llm.llama.quantization.gptq import Curvature, gptq, search_scales
from llm.llama.quantization.linear import round_to_nearest
from llm.llama.quantization.network import quantize_model, quantized_linears
from llm.llama.quantization.post_training import progress_of
from llm.llama.quantization.progress import Progress

TINY = PRESETS["tiny-random-llama"].replace(
    vocab_size=96, hidden_size=64, intermediate_size=96, initializer_range=0.15
)


def correlated(rows, size, seed=0):
    """Return inputs that are far from independent, of different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal([rows, size]) @ rng.standard_normal([size, size])
    return x * rng.uniform(0.1, 3.0, size)


def brain_surgeon(weight, hessian, scale, ends):
    """Round inputs one by one and update the rest: optimal brain quantization, fixed order.

    The inverse of the Hessian shrinks by Gaussian elimination after each input; no Cholesky factor,
    no blocks, one output at a time.
    """
    size = weight.shape[1]
    order = np.argsort(-np.diag(hessian), kind="stable")
    result = np.zeros(weight.shape)
    for row, values in enumerate(weight.astype(np.float64)):
        left, inverse = values.copy(), np.linalg.inv(hessian)
        for place in order:
            step = float(scale[row, place // (size // scale.shape[1])])
            result[row, place] = np.clip(np.rint(left[place] / step), *ends)
            lost = (left[place] - result[row, place] * step) / inverse[place, place]
            left -= lost * inverse[:, place]
            inverse -= np.outer(inverse[:, place], inverse[place]) / inverse[place, place]
            inverse[place, :] = inverse[:, place] = 0.0
    return result


@pytest.mark.parametrize(("bits", "group"), [(4, 8), (4, None), (8, None)])
def test_equals_optimal_brain_quantization(bits, group):
    rng = np.random.default_rng(bits)
    weight = rng.standard_normal([6, 16]).astype(np.float32)
    x = correlated(200, 16)
    hessian = x.T @ x / 200
    config = QuantConfig(bits, group_size=group, packed=bits == 4)
    integers, scale = gptq(weight, Curvature.of(hessian, 0.05), config)
    damped = hessian + 0.05 * np.mean(np.diag(hessian)) * np.eye(16)
    wanted = brain_surgeon(weight, damped, scale, {4: (-8, 7), 8: (-127, 127)}[bits])
    np.testing.assert_array_equal(integers, wanted)


def test_blocks_change_nothing(monkeypatch):
    weight = np.random.default_rng(1).standard_normal([5, 48]).astype(np.float32)
    x = correlated(300, 48)
    config = QuantConfig.of_type("W4", 16)
    whole, _ = gptq(weight, Curvature.of(x.T @ x), config)
    monkeypatch.setattr("llm.llama.quantization.gptq._BLOCK", 7)
    np.testing.assert_array_equal(gptq(weight, Curvature.of(x.T @ x), config)[0], whole)


@pytest.mark.parametrize("group", [None, 16])
def test_outputs_change_less_than_by_plain_rounding(group):
    weight = np.random.default_rng(2).standard_normal([32, 64]).astype(np.float32)
    x = correlated(500, 64)
    config = QuantConfig.of_type("W4", group)

    def error(integers, scale):
        steps = np.repeat(scale, 64 // scale.shape[1], axis=1)
        return ((x @ (integers * steps - weight).T) ** 2).mean()

    plain = error(*round_to_nearest(paddle.to_tensor(weight), config, "x"))
    assert error(*gptq(weight, Curvature.of(x.T @ x), config)) < 0.6 * plain


def test_scales_have_the_least_weighted_error_of_all_tried():
    rng = np.random.default_rng(3)
    weight, importance = rng.standard_normal([4, 16]), rng.uniform(0.1, 5, 16)
    scale = search_scales(weight.T.astype(np.float32), importance, 4, 2).T

    def error(row, group, step):
        part = slice(8 * group, 8 * group + 8)
        rounded = np.clip(np.rint(weight[row, part] / step), -8, 7) * step
        return (importance[part] * (weight[row, part] - rounded) ** 2).sum()

    for row in range(4):
        for group in range(2):
            largest = max(weight[row, 8 * group : 8 * group + 8], key=abs)
            found = error(row, group, scale[row, group])
            tried = np.concatenate([np.linspace(0.64, 1, 10) / end for end in (7, -8)])
            errors = [error(row, group, largest * step) for step in tried]
            assert found <= 1.02 * min(errors)  # bfloat16 moves a scale a little


def test_the_largest_weight_of_a_group_may_lie_at_the_longer_end():
    weight = np.array([[-8, 7, 1, 0, 2, 3, -4, 5], [8, -7, 1, 0, 2, 3, -4, 5]]) * 0.25
    integers, scale = gptq(weight, Curvature.of(np.eye(8)), QuantConfig.of_type("W4"))
    np.testing.assert_array_equal(scale, [[0.25], [-0.25]])
    np.testing.assert_array_equal(integers * scale, weight)


def test_inputs_that_never_occur_are_no_problem():
    weight = np.random.default_rng(4).standard_normal([4, 16]).astype(np.float32)
    x = correlated(100, 16)
    x[:, 5] = 0
    integers, scale = gptq(weight, Curvature.of(x.T @ x), QuantConfig.of_type("W4"))
    assert np.isfinite(scale).all() and np.abs(integers).max() <= 8
    gptq(np.zeros_like(weight), Curvature.of(x.T @ x), QuantConfig.of_type("W4"))


@pytest.mark.parametrize(("kind", "group"), [("W4", 32), ("A8W4", None), ("A8W8", None)])
def test_network_keeps_its_logits_better_on_text_like_the_calibration(kind, group):
    rng = np.random.default_rng(6)
    ids = rng.integers(0, 24, [10, 32])  # a part of the vocabulary: inputs are not white
    config = QuantConfig.of_type(kind, group)
    held_out = paddle.to_tensor(rng.integers(0, 24, [4, 32]))

    def logits(model):
        model.eval()
        with paddle.no_grad():
            return model(held_out).numpy()

    wanted = logits(build_model(TINY, seed=1))
    plain = quantize_model(build_model(TINY, seed=1), config)
    model = build_model(TINY, seed=1)
    model.train()
    tuned = quantize_calibrated(model, config, ids)
    assert tuned is model and tuned.training
    assert len(dict(quantized_linears(tuned))) == 14
    ours, theirs = (np.square(logits(m) - wanted).mean() for m in (tuned, plain))
    assert ours < (0.9 if kind == "W4" else 1.0) * theirs


@pytest.mark.parametrize("kind", ["W4", "A8W4"])
def test_every_linear_is_tuned_on_what_the_quantized_network_feeds_it(monkeypatch, kind):
    seen = {}

    made = Curvature.of

    def watched(hessian, damping, name):
        for other in next(group for group in SAME_INPUT if name.endswith(group[0])):
            seen[f"{'.'.join(name.split('.')[:3])}.{other}"] = hessian
        return made(hessian, damping, name)

    monkeypatch.setattr(calibration.Curvature, "of", watched)
    ids = np.random.default_rng(7).integers(0, 96, [6, 16])
    model = quantize_calibrated(build_model(TINY, seed=1), QuantConfig.of_type(kind, 32), ids)
    layers = dict(quantized_linears(model))
    assert seen.keys() == layers.keys()
    inputs = {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda _, given, name=name: inputs.update({name: given[0].numpy().astype(np.float64)})
        )
    with paddle.no_grad():
        model(paddle.to_tensor(ids))
    for name, hessian in seen.items():
        x = inputs[name].reshape(96, -1)
        if kind == "A8W4":
            unit = np.abs(x).max(-1, keepdims=True) / 127
            x = np.rint(x / unit) * unit
        wanted = x.T @ x / 96
        np.testing.assert_allclose(hessian, wanted, rtol=1e-3, atol=1e-3 * wanted.max())
        if kind == "A8W4":
            plain = inputs[name].reshape(96, -1)
            assert (
                np.abs(hessian - wanted).max() < 0.1 * np.abs(plain.T @ plain / 96 - wanted).max()
            )


def test_an_ended_run_goes_on_behind_its_last_layer(monkeypatch, tmp_path):
    ids, config = np.random.default_rng(8).integers(0, 96, [4, 16]), QuantConfig.of_type("W4", 32)
    wanted = dict(quantized_linears(quantize_calibrated(build_model(TINY, seed=1), config, ids)))
    done = []

    def until(last):
        def watched(weight, curvature, config, name):
            if len(done) == last:
                raise KeyboardInterrupt
            done.append(name)
            return gptq(weight, curvature, config, name)

        return watched

    monkeypatch.setattr(calibration, "gptq", until(10))  # in the second of two layers
    place = tmp_path / "progress"
    with pytest.raises(KeyboardInterrupt):
        quantize_calibrated(
            build_model(TINY, seed=1), config, ids, progress=Progress(place, {"a": 1})
        )
    done.clear()
    monkeypatch.setattr(calibration, "gptq", until(99))
    progress = Progress(place, {"a": 1})
    model = quantize_calibrated(build_model(TINY, seed=1), config, ids, progress=progress)
    assert len(done) == 7 and all("layers.1." in name for name in done)
    for name, layer in quantized_linears(model):
        np.testing.assert_array_equal(layer.integers(), wanted[name].integers())
        np.testing.assert_array_equal(layer.weight_scale.numpy(), wanted[name].weight_scale.numpy())
    with pytest.raises(UserError, match="progress holds the layers of a run with another model"):
        Progress(place, {"a": 2})
    whole = (place / "model.layers.0.npz").read_bytes()
    for left in (0, 2, 500, len(whole) - 1):
        (place / "model.layers.0.npz").write_bytes(whole[:left])
        with pytest.raises(UserError, match=r"layers\.0\.npz is damaged; remove it"):
            progress.load("model.layers.0")
    progress.remove()
    assert not place.exists()


def test_what_an_ended_run_goes_on_from_is_of_the_same_model_and_settings(tmp_path):
    """An embedding in 8 bits gives every layer other inputs, and so does another config.json."""
    save_model(build_model(TINY, seed=1), tmp_path / "model")
    ids = np.zeros([1, 8], np.int64)
    words = ["--model_path", tmp_path / "model", "--output_dir", tmp_path / "out"]
    words = [str(one) for one in (*words, "--quant_type", "W4", "--calibration_file", "x")]

    def going_on(*others):
        args = load((QuantizeArguments,), [*words, *others], prog="x")[0]
        return progress_of(args, ids)

    going_on().store("layer", {"a": ids})
    assert len(going_on()) == 1
    with pytest.raises(UserError, match="of a run with another model, text or settings"):
        going_on("--embedding_type", "int8")
    save_model(build_model(TINY.replace(rope_theta=5e5), seed=1), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "config.json", tmp_path / "model")
    with pytest.raises(UserError, match="of a run with another model, text or settings"):
        going_on()


def test_bad_calibration():
    config = QuantConfig.of_type("W4", 32)
    for ids, message in (
        (np.zeros([0, 8], np.int64), "not rows of tokens"),
        (np.zeros([8], np.int64), "not rows of tokens"),
        (np.array([[1, 96]]), "token id 96 is outside the model's vocabulary of 96"),
        (np.array([[-1, 5]]), "token id -1 is outside"),
    ):
        model = build_model(TINY, seed=1)
        with pytest.raises(UserError, match=message):
            quantize_calibrated(model, config, ids)
        assert not dict(quantized_linears(model))
    broken = build_model(TINY, seed=1)
    weight = broken.model.layers[1].mlp.up_proj.weight
    values = weight.numpy().copy()
    values[3, 4] = np.nan
    weight.set_value(values)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 values"):
        quantize_calibrated(broken, config, np.zeros([1, 8], np.int64))
    assert not dict(quantized_linears(broken))
    with pytest.raises(UserError, match="inputs of x on the calibration text are not finite"):
        Curvature.of(np.full([8, 8], np.inf), name="x")
    singular = np.ones([8, 8])
    singular[0, 1] = singular[1, 0] = 5.0
    with pytest.raises(UserError, match="says too little about the inputs of x"):
        Curvature.of(singular, name="x")
