"""Complete model directories: all or nothing, and what the disk got wrong is found."""

import json

import numpy as np
import paddle
import pytest

from common.errors import UserError
from llm.llama import merging, saving
from llm.llama.adapters import lora
from llm.llama.build import build_model, load_model
from llm.llama.config import PRESETS
from llm.llama.files.checkpoint import find_tensors
from llm.llama.merging import merge_lora
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.network import dequantize_model, quantize_model

TINY = PRESETS["tiny-random-llama"]


class Tokenizer:
    def save(self, directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text("{}")


def test_a_directory_holds_model_tokenizer_and_documents(tmp_path):
    model = build_model(TINY, seed=3)
    documents = {"report.json": {"linears": 14}}
    saving.save_directory(model, Tokenizer(), tmp_path / "out", documents=documents, compare=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "report.json"),
    }
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == documents["report.json"]
    again = dict(load_model(tmp_path / "out").named_parameters())
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(again[name].numpy(), parameter.numpy())


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_flipped_bit_leaves_no_directory(tmp_path, monkeypatch, name):
    right = saving.save_model

    def flipped(model, directory):
        right(model, directory)
        tensor = find_tensors(directory)[name]
        with tensor.file.open("r+b") as file:
            file.seek(tensor.offset)
            byte = file.read(1)[0]
            file.seek(tensor.offset)
            file.write(bytes([byte ^ 1]))

    monkeypatch.setattr(saving, "save_model", flipped)
    model = build_model(TINY, seed=3)
    with pytest.raises(UserError, match="does not read back as the model; is the disk"):
        saving.save_directory(model, Tokenizer(), tmp_path / "out", compare=True)
    assert not list(tmp_path.iterdir())


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj"


def stored_as(dtype, value):
    """A network with one number that a type cannot hold, stored in it."""

    def make(target):
        model = build_model(TINY, seed=3)
        set_one(dict(model.named_parameters())[NORM], value)
        saving.save_merged(model, target, Tokenizer(), dtype)

    return make


def set_one(tensor, value):
    numbers = tensor.numpy()
    numbers.reshape(-1)[-2] = value
    tensor.set_value(numbers)


def trained_nan(target):
    model = build_model(TINY, seed=3)
    set_one(dict(model.named_parameters())["model.embed_tokens.weight"], np.nan)
    saving.save_directory(model, Tokenizer(), target)


def scale_too_large(target):
    model = quantize_model(build_model(TINY, seed=3), QuantConfig.of_type("W8", None))
    next(t for n, t in model.state_dict().items() if n.endswith("up_proj.weight_scale")).fill_(3e38)
    saving.save_directory(dequantize_model(model), Tokenizer(), target)


def infinite_scale(target):
    model = quantize_model(build_model(TINY, seed=3), QuantConfig.of_type("W8", None))
    scale = next(t for n, t in model.state_dict().items() if n.endswith("weight_scale"))
    set_one(scale, np.inf)
    saving.save_directory(model, Tokenizer(), target)


def with_adapter_of(value, dtype):
    def make(target):
        model = build_model(TINY, seed=3)
        model.to(dtype=dtype)
        lora.add_lora(model, lora.LoRAConfig(r=2, lora_alpha=2, target_modules=["up_proj"]), seed=0)
        layer = model.model.layers[1].mlp.up_proj
        for matrix in (layer.lora_A, layer.lora_B):
            matrix.set_value(paddle.full_like(matrix, value))
        merge_lora(model)

    return make


# What makes numbers that cannot be stored, and what is said: read back, an inf equals an inf.
NO_NUMBERS = {
    "float16": (stored_as("float16", 7e4), f"{NORM} holds 7e.04, .* use --dtype bfloat16"),
    "float16, negative": (stored_as("float16", -7e4), f"{NORM} holds 7e.04, which does not fit"),
    "bfloat16": (stored_as("bfloat16", 3.4e38), f"{NORM} holds 3.4e.38, .* use --dtype float32"),
    "weights": (trained_nan, "embed_tokens.weight holds 1 numbers that are nan or inf"),
    "scales": (infinite_scale, "weight_scale holds 1 numbers that are nan or inf"),
    "widened": (scale_too_large, r"up_proj.weight holds \d+ numbers that are nan or inf"),
    "a sum": (
        with_adapter_of(1.3036e19, "bfloat16"),
        f"gives {UP} 3.399e.38, which does not fit into bfloat16.* merge in float32",
    ),
    "a product": (
        with_adapter_of(3e38, "float32"),
        rf"merging gives {UP} \d+ numbers that are nan",
    ),
}


@pytest.mark.parametrize("case", NO_NUMBERS)
def test_numbers_that_cannot_be_stored(tmp_path, monkeypatch, case):
    make, message = NO_NUMBERS[case]
    # Logits may hide them; and CPUs compute none in halves.
    monkeypatch.setattr(merging, "_probe", lambda _: paddle.zeros([1]))
    with pytest.raises(UserError, match=message):
        make(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype, value", [("bfloat16", 7e4), ("float32", 3.4e38)])
def test_the_type_that_a_refusal_names_holds_them(tmp_path, dtype, value):
    stored_as(dtype, value)(tmp_path / "out")
    numbers = find_tensors(tmp_path / "out")[NORM].read().astype(np.float32)
    assert np.isfinite(numbers).all() and numbers.max() > 0.99 * value
