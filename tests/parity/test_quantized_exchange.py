"""Quantized checkpoints: ours opened by transformers with compressed-tensors, theirs by us."""

import dataclasses

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from llm.llama.build import build_model, load_model, save_model
from llm.llama.config import PRESETS
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.network import (
    quantization_of,
    quantize_model,
    quantized_linears,
)
from tests.parity.ours import LOGIT_LIMIT

CONFIG = PRESETS["tiny-random-llama"].replace(
    vocab_size=96, hidden_size=64, intermediate_size=96, initializer_range=0.15
)
KINDS = {
    "W8": QuantConfig.of_type("W8"),
    "W8 packed": QuantConfig(8, packed=True),
    "W4": QuantConfig.of_type("W4"),
    "W4 groups": QuantConfig.of_type("W4", 32),
    "A8W8": QuantConfig.of_type("A8W8"),
    "A8W4": QuantConfig.of_type("A8W4", 16),
    "A8W8 tied": QuantConfig.of_type("A8W8", embedding_bits=8),
    "W4 and W8": QuantConfig(4, None, 32, packed=True, wide=("model.layers.1.mlp.down_proj",)),
}
TURNED = "model.layers.0.mlp.down_proj"  # has negative scales in the last


@pytest.fixture(scope="module")
def opened(peer, tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")
    ids = np.random.default_rng(1).integers(0, CONFIG.vocab_size, [2, 16])
    models = {}
    for name, config in KINDS.items():
        shape = CONFIG.replace(tie_word_embeddings=config.embedding is not None)
        models[name] = quantize_model(build_model(shape, seed=2), config)
        models[name].eval()
        if config.wide:
            layer = dict(quantized_linears(models[name]))[TURNED]
            layer.fill(-layer.integers(), -layer.weight_scale.numpy())
        save_model(models[name], root / name)
        save_file({"ids": ids}, root / name / "ids.safetensors")
    peer("read", root, module="quantization_side")
    if not (root / "W8" / "hf.safetensors").is_file():
        pytest.skip("compressed-tensors is not installed in the peers' environment")
    return root, models, paddle.to_tensor(ids)


def compare(model, expected, ids):
    """Return the largest error of a logit; the widened weights have to be equal.

    transformers widens the weights and leaves inputs as they are, whatever the file says.
    """
    for name, layer in quantized_linears(model):
        np.testing.assert_array_equal(expected[f"weight.{name}.weight"], layer.widened().numpy())
        layer.config = dataclasses.replace(layer.config, activation_bits=None)
    with paddle.no_grad():
        return float(np.abs(model(ids).numpy() - expected["logits"]).max())


@pytest.mark.parametrize("name", KINDS)
def test_transformers_opens_quantized_models(name, opened, measured):
    root, models, ids = opened
    theirs = load_file(root / name / "hf.safetensors")
    error = compare(models[name], theirs, ids)
    assert measured(f"quantized {name}", "logits", error) <= LOGIT_LIMIT


@pytest.fixture(scope="module")
def theirs(peer, tmp_path_factory):
    root = tmp_path_factory.mktemp("theirs")
    peer("write", root, module="quantization_side")
    if not any(root.iterdir()):
        pytest.skip("compressed-tensors is not installed in the peers' environment")
    return root


@pytest.mark.parametrize(("name", "kind"), [("W4A16", "W4"), ("W8A16", "W8"), ("W8A8", "A8W8")])
def test_models_quantized_by_compressed_tensors_load_here(name, kind, theirs, measured):
    model = load_model(theirs / name)
    model.eval()
    assert quantization_of(model).kind == kind
    expected = load_file(theirs / name / "hf.safetensors")
    ids = paddle.to_tensor(load_file(theirs / name / "ids.safetensors")["ids"])
    error = compare(model, expected, ids)
    assert measured(f"quantized by them, {name}", "logits", error) <= LOGIT_LIMIT
