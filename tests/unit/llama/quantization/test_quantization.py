"""Quantized linears against NumPy, their files, and what must not change a bit."""

import json

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from external_ops.frozen_matmul import widen
from llm.engine.engine import Engine
from llm.engine.request import Request, SamplingParams
from llm.engine.runners import DygraphRunner
from llm.engine.verify import verify_program
from llm.llama import build
from llm.llama.adapters.lora import LoRAConfig, add_lora, load_lora, save_lora
from llm.llama.build import build_model, load_model, save_model
from llm.llama.config import PRESETS
from llm.llama.export import export_program
from llm.llama.files.dtypes import TYPES, to_bfloat16
from llm.llama.files.safetensors import read_header
from llm.llama.merging import merge_lora
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.embedding import QuantizedEmbedding
from llm.llama.quantization.linear import (
    QuantizedLinear,
    pack,
    round_to_nearest,
    round_tokens,
    unpack,
)
from llm.llama.quantization.network import (
    dequantize_model,
    is_quantized,
    quantization_of,
    quantize_model,
    quantized_linears,
)
from llm.llama.quantization.qat import (
    QATLinear,
    fake_quantize,
    fake_quantize_tokens,
    finish_qat,
    prepare_qat,
    round_adapters,
)
from llm.llama.saving import keep_types

TINY = PRESETS["tiny-random-llama"].replace(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.15,
)
SCHEMES = [("W8", None), ("A8W8", None), ("W4", None), ("W4", 32), ("A8W4", 16)]
IDS = np.random.default_rng(0).integers(0, TINY.vocab_size, [2, 20])


def fresh(**changes):
    network = build_model(TINY.replace(**changes), seed=4)
    network.eval()
    return network


def logits(network):
    network.eval()
    with paddle.no_grad():
        return network(paddle.to_tensor(IDS)).numpy()


def exact_rounding(weight, bits, groups):
    """Return integers and scales in NumPy: largest magnitude at the end of the grid."""
    rows = weight.reshape(len(weight), groups, -1)
    limit = {8: 127, 4: 7}[bits]
    scale = to_bfloat16(np.abs(rows).max(-1) / np.float32(limit))
    integers = np.rint(rows / scale[..., None])
    assert not (np.abs(integers) > limit).any()
    return integers.reshape(weight.shape), scale


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (4, 8), (4, 32)])
def test_rounding_equals_numpy(bits, group):
    weight = np.random.default_rng(bits).standard_normal([24, 64]).astype(np.float32)
    weight[3] = 0  # an output that is switched off
    config = QuantConfig(bits, group_size=group, packed=bits == 4)
    integers, scale = round_to_nearest(paddle.to_tensor(weight), config, "x")
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted, wanted_scale = exact_rounding(weight, bits, 64 // (group or 64))
    wanted[3], wanted_scale[3] = 0, scale[3]
    np.testing.assert_array_equal(integers, wanted)
    np.testing.assert_array_equal(scale, wanted_scale)
    assert integers.dtype == np.int8 and scale.dtype == np.float32
    # At most half a step is lost.
    back = widen(paddle.to_tensor(integers), paddle.to_tensor(scale)).numpy()
    steps = np.repeat(scale, 64 // scale.shape[1], axis=1)
    assert (np.abs(back - weight) <= 0.5001 * steps).all()


def test_bfloat16_rounding_equals_paddles():
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    values[:3] = [1.00390625, 1.01171875, -1.00390625]  # ties
    wanted = paddle.to_tensor(values).astype("bfloat16").astype("float32").numpy()
    np.testing.assert_array_equal(to_bfloat16(values), wanted)


def test_tokens_round_with_a_scale_each():
    x = np.random.default_rng(1).standard_normal([3, 5, 16]).astype(np.float32)
    x *= np.array([1e-3, 1.0, 1e4], np.float32)[:, None, None]
    x[0, 0] = 0
    got = round_tokens(paddle.to_tensor(x)).numpy()
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = np.nan_to_num(np.rint(x / scale) * scale)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_packing_is_two_values_a_byte_low_half_first():
    values = np.array([[-8, 7, 0, -1], [1, 2, 3, 4]], np.int8)
    np.testing.assert_array_equal(pack(values), [[0xF0, 0x78], [0xA9, 0xCB]])
    np.testing.assert_array_equal(unpack(pack(values)), values)


@pytest.mark.parametrize(("kind", "group"), SCHEMES)
def test_layer_equals_numpy_and_really_is_small(kind, group):
    config = QuantConfig.of_type(kind, group)
    rng = np.random.default_rng(2)
    limit = 7 if config.weight_bits == 4 else 127
    integers = rng.integers(-limit, limit + 1, [24, 64]).astype(np.int8)
    scale = rng.uniform(0.01, 0.1, [24, 64 // (group or 64)]).astype(np.float32)
    bias = paddle.to_tensor(rng.standard_normal(24).astype(np.float32))
    layer = QuantizedLinear(64, 24, config, bias)
    layer.fill(integers, scale)
    np.testing.assert_array_equal(layer.integers(), integers)
    assert layer.weight.size * layer.weight.element_size() == 24 * 64 * config.weight_bits // 8
    x = rng.standard_normal([2, 3, 64]).astype(np.float32)
    steps = np.repeat(scale.astype(np.float64), 64 // scale.shape[1], axis=1)
    inputs = x.astype(np.float64)
    if config.activation_bits:
        unit = np.abs(inputs).max(-1, keepdims=True) / 127
        inputs = np.rint(inputs / unit) * unit
    wanted = inputs @ (integers * steps).T + bias.numpy()
    np.testing.assert_allclose(layer(paddle.to_tensor(x)).numpy(), wanted, rtol=1e-4, atol=1e-4)
    # The gradient reaches the input, through rounding, and equals the widened weight's.
    tensor = paddle.to_tensor(x, stop_gradient=False)
    out = layer(tensor)
    upstream = rng.standard_normal(out.shape).astype(np.float32)
    out.backward(paddle.to_tensor(upstream))
    np.testing.assert_allclose(
        tensor.grad.numpy(), upstream @ (integers * steps), rtol=1e-3, atol=1e-4
    )


def test_the_networks_op_takes_the_place_of_the_reference():
    network = quantize_model(fresh(), QuantConfig.of_type("A8W4", 32))
    asked = {}

    def matmul(x, weight, scale, **settings):
        asked.update(settings, weight=weight.dtype, scale=scale.shape)
        return paddle.full([x.shape[0], 24], 5.0)

    layers = [layer for _, layer in quantized_linears(network)]
    assert {layer.matmul for layer in layers} == {network.ops.frozen_matmul}
    layers[0].matmul = matmul
    assert float(layers[0](paddle.ones([2, 64])).sum()) == 240
    assert asked == {"transposed": True, "weight": paddle.uint8, "scale": [64, 2]}


@pytest.mark.parametrize(("kind", "group"), SCHEMES)
@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True, "attention_bias": True}])
def test_saved_and_loaded_without_a_change(tmp_path, kind, group, shape):
    network = quantize_model(fresh(**shape), QuantConfig.of_type(kind, group))
    wanted = logits(network)
    save_model(network, tmp_path, max_shard_bytes=20_000)
    loaded = load_model(tmp_path)
    assert is_quantized(loaded) and quantization_of(loaded) == quantization_of(network)
    np.testing.assert_array_equal(logits(loaded), wanted)
    assert not any("proj" in n and "bias" not in n for n, _ in loaded.named_parameters())
    # Every stored tensor came back as it was.
    again = dict(quantized_linears(loaded))
    for name, layer in quantized_linears(network):
        np.testing.assert_array_equal(again[name].integers(), layer.integers())


@pytest.mark.parametrize(("kind", "group"), [("W8", None), ("W4", 32)])
def test_widened_again(tmp_path, kind, group):
    config = QuantConfig.of_type(kind, group)
    network = quantize_model(fresh(attention_bias=True), config)
    wanted = logits(network)
    save_model(dequantize_model(network), tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = load_model(tmp_path)
    assert not is_quantized(loaded) and not any(p.stop_gradient for p in loaded.parameters())
    assert [p.name for p in network.parameters()] == [n for n, _ in network.named_parameters()]
    np.testing.assert_allclose(logits(loaded), wanted, atol=1e-5)
    np.testing.assert_array_equal(logits(quantize_model(loaded, config)), wanted)


def test_layout_of_the_files(tmp_path):
    """Read back with the safetensors package, the integers are where the documentation says."""
    for kind, group in (("A8W8", None), ("W4", 32)):
        network = quantize_model(fresh(), QuantConfig.of_type(kind, group))
        save_model(network, tmp_path / kind)
        stored = load_file(tmp_path / kind / "model.safetensors")
        config = json.loads((tmp_path / kind / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == "compressed-tensors" and config["ignore"] == ["lm_head"]
        layer = dict(quantized_linears(network))["model.layers.1.mlp.down_proj"]
        name = "model.layers.1.mlp.down_proj."
        np.testing.assert_array_equal(stored[name + "weight_scale"], layer.weight_scale.numpy())
        if kind == "A8W8":
            assert config["format"] == "int-quantized" and stored[name + "weight"].dtype == np.int8
            np.testing.assert_array_equal(stored[name + "weight"], layer.integers())
            continue
        assert config["format"] == "pack-quantized"
        words = stored[name + "weight_packed"].astype(np.int64) & 0xFFFFFFFF
        values = np.stack([(words >> (4 * n)) & 15 for n in range(8)], -1).reshape(64, 96) - 8
        np.testing.assert_array_equal(values, layer.integers())
        np.testing.assert_array_equal(stored[name + "weight_shape"], [64, 96])


def test_full_precision_weights_never_come_to_be(tmp_path, monkeypatch):
    save_model(quantize_model(fresh(), QuantConfig.of_type("W8")), tmp_path)
    seen = []
    inner = build.install

    def watched(network, config):
        layers = [n for n in network.sublayers() if isinstance(n, paddle.nn.Linear)]
        seen.extend(layer.weight._is_initialized() for layer in layers)
        inner(network, config)

    monkeypatch.setattr(build, "install", watched)
    network = load_model(tmp_path)
    assert len(seen) == 15 and not any(seen)
    assert all(p._is_initialized() for p in network.parameters())


def test_eight_bits_in_words_are_read_and_written(tmp_path):
    """Weight-only 8-bit checkpoints of others come packed."""
    network = quantize_model(fresh(), QuantConfig(8, packed=True))
    wanted = logits(network)
    save_model(network, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    words = stored["model.layers.0.self_attn.q_proj.weight_packed"]
    first = dict(quantized_linears(network))["model.layers.0.self_attn.q_proj"].integers()[0, :4]
    assert [(int(words[0, 0]) >> (8 * n)) % 256 - 128 for n in range(4)] == first.tolist()
    np.testing.assert_array_equal(logits(load_model(tmp_path)), wanted)


def test_quantizing_stays_near_the_network():
    wanted = logits(fresh())
    errors = [
        np.abs(logits(quantize_model(fresh(), QuantConfig.of_type(k, g))) - wanted).mean()
        for k, g in (("W8", None), ("W4", 16), ("W4", None))
    ]
    assert errors[0] < 0.1 * errors[1] < 0.1 * errors[2]
    assert errors[0] < 0.05 * np.abs(wanted).mean()


@pytest.mark.parametrize(("kind", "group"), [("A8W8", None), ("W4", 32)])
def test_export_of_a_quantized_model_gives_its_logits(tmp_path, kind, group):
    network = quantize_model(fresh(), QuantConfig.of_type(kind, group))
    output = tmp_path / "llama"
    manifest = export_program(network, output, model_name="tiny", block_size=8)
    assert verify_program(network, output, manifest, 1, "cpu").positions > 0
    assert manifest.weights_bytes < 0.6 * 4 * network.config.num_parameters


def test_cached_generation_equals_uncached():
    network = quantize_model(fresh(), QuantConfig.of_type("W4", 32))
    prompt = IDS[0, :7].tolist()
    engine = Engine(DygraphRunner(network, block_size=4), max_sequences=1, max_tokens=32)
    params = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)
    ids = list(prompt)
    with paddle.no_grad():
        for _ in range(8):
            ids.append(int(network(paddle.to_tensor([ids]))[0, -1].argmax()))
    assert engine.generate([Request(prompt, params)])[0].ids == ids[7:]


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_pass_straight_through_inside_the_range(bits):
    limit = {8: 127, 4: 7}[bits]
    rng = np.random.default_rng(3)
    weight = rng.standard_normal([6, 16]).astype(np.float32)
    scale = np.full([6, 2], 0.8 / limit, np.float32)  # half of the weights are outside
    tensor = paddle.to_tensor(weight, stop_gradient=False)
    out = fake_quantize(tensor, paddle.to_tensor(scale), bits)
    steps = 0.8 / limit
    wanted = np.clip(np.rint(weight / steps), -limit, limit) * steps
    np.testing.assert_allclose(out.numpy(), wanted, atol=1e-6)
    upstream = rng.standard_normal([6, 16]).astype(np.float32)
    out.backward(paddle.to_tensor(upstream))
    inside = np.abs(weight) <= steps * (limit + 0.5)
    assert 0.2 < inside.mean() < 0.8
    np.testing.assert_array_equal(tensor.grad.numpy(), upstream * inside)
    x = paddle.to_tensor(weight, stop_gradient=False)
    fake_quantize_tokens(x).backward(paddle.to_tensor(upstream))
    np.testing.assert_array_equal(x.grad.numpy(), upstream)


def test_gradients_of_a_rounding_linear_equal_those_by_hand():
    rng = np.random.default_rng(5)
    plain = paddle.nn.Linear(32, 8, bias_attr=False)
    plain.weight.set_value(rng.standard_normal([32, 8]).astype(np.float32))
    layer = QATLinear(plain, QuantConfig.of_type("A8W4", 16), "x")
    x = rng.standard_normal([5, 32]).astype(np.float32)
    tensor = paddle.to_tensor(x, stop_gradient=False)
    upstream = rng.standard_normal([5, 8]).astype(np.float32)
    layer(tensor).backward(paddle.to_tensor(upstream))
    integers, scale = exact_rounding(plain.weight.numpy().T, 4, 2)
    rounded = (integers.reshape(8, 2, -1) * scale[..., None]).reshape(8, 32)
    unit = np.abs(x).max(-1, keepdims=True) / 127
    np.testing.assert_allclose(tensor.grad.numpy(), upstream @ rounded, rtol=1e-4, atol=1e-4)
    wanted = (np.rint(x / unit) * unit).T @ upstream
    np.testing.assert_allclose(plain.weight.grad.numpy(), wanted, rtol=1e-4, atol=1e-4)


def train(network, steps=3):
    network.train()
    trained = [p for p in network.parameters() if not p.stop_gradient]
    optimizer = paddle.optimizer.AdamW(5e-3, parameters=trained, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        out = network(paddle.to_tensor(IDS[:, :-1]))
        labels = paddle.to_tensor(IDS[:, 1:].copy())
        loss = paddle.nn.functional.cross_entropy(out.reshape([-1, 96]), labels.reshape([-1]))
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    return network


@pytest.mark.parametrize(("kind", "group"), SCHEMES)
def test_trained_with_rounding_then_quantized_keeps_every_bit(tmp_path, kind, group):
    network = fresh()
    names = [p.name for p in network.parameters()]
    prepare_qat(network, kind, group)
    assert sorted(p.name for p in network.parameters()) == sorted(names)
    train(network)
    wanted = logits(network)
    # A checkpoint in between is that of the plain network, and goes on where it was.
    save_model(network, tmp_path / "step")
    assert not is_quantized(load_model(tmp_path / "step"))
    np.testing.assert_array_equal(
        logits(prepare_qat(load_model(tmp_path / "step"), kind, group)), wanted
    )
    # On the grid in full precision, saved, loaded, quantized by another process.
    save_model(finish_qat(prepare_qat(load_model(tmp_path / "step"), kind, group)), tmp_path / "fp")
    plain = load_model(tmp_path / "fp")
    if not kind.startswith("A8"):
        np.testing.assert_allclose(logits(plain), wanted, rtol=1e-5, atol=1e-5)
    config = QuantConfig.of_type(kind, group)
    np.testing.assert_array_equal(logits(quantize_model(plain, config)), wanted)
    # Directly.
    quantize_model(network, config)
    np.testing.assert_array_equal(logits(network), wanted)
    save_model(network, tmp_path / "int")
    np.testing.assert_array_equal(logits(load_model(tmp_path / "int")), wanted)


@pytest.mark.parametrize("adapter_first", [True, False])
def test_rounding_a_network_with_an_adapter_rounds_what_merging_stores(adapter_first):
    config = LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear")
    network = fresh()
    if adapter_first:
        prepare_qat(add_lora(network, config, seed=1), "A8W4", 32)
    else:
        round_adapters(add_lora(prepare_qat(network, "A8W4", 32), config, seed=1))
    base = network.model.layers[0].mlp.up_proj.base.weight.numpy().copy()
    train(network)
    np.testing.assert_array_equal(network.model.layers[0].mlp.up_proj.base.weight.numpy(), base)
    wanted = logits(network)
    merge_lora(network)
    np.testing.assert_array_equal(logits(network), wanted)
    np.testing.assert_array_equal(
        logits(quantize_model(network, QuantConfig.of_type("A8W4", 32))), wanted
    )


def test_an_adapter_trains_on_integer_weights():
    network = quantize_model(fresh(), QuantConfig.of_type("W4", 32))
    before = dict(quantized_linears(network))["model.layers.0.mlp.up_proj"].integers()
    add_lora(network, LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear"), seed=1)
    train(network, 4)
    layers = dict(quantized_linears(network))
    np.testing.assert_array_equal(layers["model.layers.0.mlp.up_proj.base"].integers(), before)


def test_an_adapter_of_a_rounding_network_is_saved_and_filled_again(tmp_path):
    """What a run that stops and goes on does."""
    config = LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear")

    def start(seed):
        return round_adapters(add_lora(prepare_qat(fresh(), "A8W4", 32), config, seed=seed))

    network = start(1)
    train(network, 4)
    save_lora(network, tmp_path)
    again = load_lora(start(2), tmp_path, trainable=True)
    np.testing.assert_array_equal(logits(again), logits(network))


@pytest.mark.parametrize("kind", ["W8", "A8W4"])
def test_a_tied_embedding_in_8_bits(kind, tmp_path):
    """It lies once, in bytes; rows and logits are those of the widened numbers."""
    shape = TINY.replace(tie_word_embeddings=True)
    save_model(build_model(shape, seed=3, dtype="bfloat16", to_pack=True), tmp_path / "source")
    model = load_model(tmp_path / "source")
    table = model.model.embed_tokens.weight.numpy()
    quantize_model(model, QuantConfig.of_type(kind, 16 if kind == "A8W4" else None, 8))
    keep_types(model, tmp_path / "source")
    save_model(model, tmp_path / "made")
    stored = read_header(tmp_path / "made" / "model.safetensors", TYPES)
    assert stored["model.embed_tokens.weight"].dtype == "I8"
    assert "lm_head.weight" not in stored
    source = read_header(tmp_path / "source" / "model.safetensors")
    kept = [name for name in source if "norm" in name]
    assert all(np.array_equal(stored[name].read(), source[name].read()) for name in kept)
    assert {one.dtype for one in stored.values() if len(one.shape) == 1} <= {"BF16", "I64"}

    read = load_model(tmp_path / "made")
    embedding = read.model.embed_tokens
    scale = np.maximum(np.abs(table).max(1, keepdims=True) / 127, 1e-30)
    assert np.abs(embedding.widened().numpy() - table).max() <= 0.51 * scale.max() + 1e-3
    ids = paddle.to_tensor([[5, 0, 7]])
    rows = embedding(ids).numpy()
    assert np.array_equal(rows, embedding.widened().numpy()[ids.numpy()])
    with paddle.no_grad():
        logits = read(ids).numpy()
        hidden = read.hidden(ids).numpy().astype(np.float64)
    expected = hidden @ embedding.widened().numpy().T.astype(np.float64)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    losses, _ = read.token_losses(ids, paddle.to_tensor([0, 7, 1]))
    chance = np.exp(expected - expected.max(-1, keepdims=True))
    chance /= chance.sum(-1, keepdims=True)
    wanted = -np.log(chance[0, [0, 1, 2], [0, 7, 1]])
    np.testing.assert_allclose(losses.numpy(), wanted, rtol=1e-5)
    assert not isinstance(dequantize_model(read).model.embed_tokens, QuantizedEmbedding)
