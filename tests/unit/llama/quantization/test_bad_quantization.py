"""Every refusal of quantization: files, settings, weights and flags."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from common.flags import load
from llm.config.tools import QuantizeArguments
from llm.evaluation import quantized
from llm.evaluation.perplexity import Document
from llm.llama.adapters.lora import LoRAConfig, add_lora
from llm.llama.build import build_model, load_model, save_model
from llm.llama.config import PRESETS
from llm.llama.layers import Linear
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization import post_training
from llm.llama.quantization.network import (
    check_trainable,
    dequantize_model,
    is_quantized,
    linears,
    quantize_model,
)
from llm.llama.quantization.qat import finish_qat, prepare_qat, round_adapters
from llm.llama.saving import save_directory

TINY = PRESETS["tiny-random-llama"].replace(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1
)
NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Return directories of an 8-bit and of a 4-bit model."""
    root = tmp_path_factory.mktemp("quantized")
    for kind, group in (("A8W8", None), ("W4", 32)):
        model = quantize_model(build_model(TINY, seed=1), QuantConfig.of_type(kind, group))
        save_model(model, root / kind)
    return root


def _tensor(**changes):
    def damage(directory):
        file = directory / "model.safetensors"
        tensors = load_file(file)
        for ending, change in changes.items():
            tensors[f"{NAME}.{ending}"] = change(tensors[f"{NAME}.{ending}"])
        save_file(tensors, file)

    return damage


def _without(ending):
    def damage(directory):
        file = directory / "model.safetensors"
        tensors = load_file(file)
        del tensors[f"{NAME}.{ending}"]
        save_file(tensors, file)

    return damage


def _config(change):
    def damage(directory):
        file = directory / "config.json"
        raw = json.loads(file.read_text())
        change(raw)
        file.write_text(json.dumps(raw))

    return damage


def _section(**changes):
    return _config(lambda raw: raw["quantization_config"].update(changes))


def _group(part, **changes):
    return _config(
        lambda raw: raw["quantization_config"]["config_groups"]["group_0"][part].update(changes)
    )


def _set(place, value):
    def change(array):
        array = array.copy()
        array[place] = value
        return array

    return change


FILES = [
    ("A8W8", _tensor(weight_scale=_set((3, 0), np.nan)), r"1 scales are not positive numbers.*\[3"),
    ("A8W8", _tensor(weight_scale=_set((3, 0), np.inf)), "first at .3, 0. is inf"),
    ("W4", _tensor(weight_scale=_set((0, 1), 0.0)), "1 scales are zero or no.* is 0.0"),
    ("W4", _tensor(weight_scale=_set((0, 1), np.nan)), "1 scales are zero or no numbers"),
    ("A8W8", _tensor(weight_scale=lambda a: -a), "scales are not positive"),
    (
        "W4",
        _tensor(weight_scale=lambda a: a[:, :1].copy()),
        r"shape \[96, 1\].* asks for \[96, 2\]",
    ),
    (
        "W4",
        _tensor(weight_shape=lambda a: a[::-1].copy()),
        r"says \[64, 96\].* asks for \[96, 64\]",
    ),
    ("W4", _tensor(weight_packed=lambda a: a.view(np.uint8).copy()), r"shape \[96, 32\]"),
    ("A8W8", _tensor(weight=lambda a: a.astype(np.float32)), "type F32, the config asks for I8"),
    ("A8W8", _tensor(weight=lambda a: a.view(np.uint8)), "type U8, the config asks for I8"),
    ("A8W8", _tensor(weight_scale=lambda a: a.astype(np.int32)), "type I32, the config asks for F"),
    ("A8W8", _without("weight_scale"), "lacks model.layers.0.mlp.up_proj.weight_scale"),
    ("W4", _without("weight_packed"), "lacks model.layers.0.mlp.up_proj.weight_packed"),
    ("A8W8", _config(lambda raw: raw.pop("quantization_config")), "has type I8; supported: F32"),
    ("A8W8", _section(quant_method="awq"), r"weights are quantized \(awq\).*compressed-tensors"),
    ("A8W8", _section(format="marlin-24"), "format='marlin-24'; supported: int-quantized, pack"),
    ("A8W8", _section(format="pack-quantized"), "lacks .*down_proj.weight_packed"),
    ("A8W8", _section(config_groups={}), "only one group of settings"),
    ("A8W8", _section(config_groups=None), "damaged quantization_config"),
    ("A8W8", _section(ignore=["re:("]), "damaged quantization_config"),
    ("A8W8", _section(ignore=[]), "lacks lm_head.weight_scale"),
    ("A8W8", _group("weights", type="float"), "type='float' of weights; supported: 'int'"),
    ("A8W8", _group("weights", symmetric=False), "symmetric=False of weights"),
    ("A8W8", _group("weights", strategy="tensor"), "strategy='tensor' of weights"),
    ("A8W8", _group("weights", num_bits=6), "weights of 6 bits are not supported: 8 or 4"),
    ("A8W8", _group("weights", num_bits=4), "4-bit weights have to be packed"),
    ("A8W8", _group("weights", actorder="group"), "actorder=group"),
    ("A8W8", _group("input_activations", num_bits=4), "activations of 4 bits"),
    ("A8W8", _group("input_activations", dynamic=False), "dynamic=False of activations"),
    ("A8W8", _group("input_activations", strategy="tensor"), "strategy='tensor' of activations"),
    (
        "W4",
        _group("weights", group_size=40),
        "group_size=40 does not divide the 64 inputs .* is 32",
    ),
    ("W4", _group("weights", group_size=12), "group_size=12 has to be a positive multiple of 8"),
    ("W4", _group("weights", group_size="32"), "group_size='32' has to be a positive multiple"),
]


@pytest.mark.parametrize(("kind", "damage", "message"), FILES, ids=[case[2] for case in FILES])
def test_damaged_checkpoints(stored, tmp_path, kind, damage, message):
    directory = tmp_path / "model"
    shutil.copytree(stored / kind, directory)
    load_model(directory)
    damage(directory)
    with pytest.raises(UserError, match=message):
        load_model(directory)


def broken(value):
    model = build_model(TINY, seed=1)
    weight = dict(model.named_parameters())[f"{NAME}.weight"]
    values = weight.numpy().copy()
    values[2, 3] = value
    weight.set_value(values)
    return model


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "apply",
    [lambda m: quantize_model(m, QuantConfig.of_type("W8")), lambda m: prepare_qat(m, "W4")],
)
def test_weights_that_no_scale_holds(value, apply):
    model = broken(value)
    with pytest.raises(UserError, match=r"up_proj\.weight holds 1 values that are NaN or infinite"):
        apply(model)
    assert not is_quantized(model) and len(linears(model, QuantConfig.of_type("W8"))) == 7
    assert all(type(layer) is Linear for layer in linears(model, QuantConfig(8)).values())


@pytest.mark.parametrize(
    ("kind", "group", "message"),
    [
        ("W3", None, "'W3' is not one of W8, W4, A8W8, A8W4"),
        ("W8", 128, "group_size=128 is for 4-bit weights"),
        ("W4", 12, "group_size=12 has to be a positive multiple of 8"),
        ("W4", -8, "group_size=-8 has to be a positive multiple of 8"),
        (
            "W4",
            128,
            "group_size=128 does not divide the 64 inputs of model.layers.0.self_attn.q_pro",
        ),
        ("W4", 48, "group_size=48 does not divide the 64 inputs .* the largest that does is 32"),
    ],
)
def test_bad_settings(kind, group, message):
    for apply in (
        lambda m: quantize_model(m, QuantConfig.of_type(kind, group)),
        lambda m: prepare_qat(m, kind, group),
    ):
        model = build_model(TINY, seed=1)
        with pytest.raises(UserError, match=message):
            apply(model)
        assert not is_quantized(model)


def test_widths_that_cannot_be_packed():
    odd = build_model(TINY.replace(intermediate_size=92), seed=1)
    with pytest.raises(UserError, match="down_proj has 92 inputs, which 4-bit weights cannot pack"):
        quantize_model(odd, QuantConfig.of_type("W4"))


def test_wrong_order_of_steps():
    config = QuantConfig.of_type("A8W8")
    model = build_model(TINY, seed=1)
    with pytest.raises(UserError, match="no quantization-aware linears"):
        finish_qat(model)
    with pytest.raises(UserError, match="dequantize: the model has no integer weights to widen"):
        dequantize_model(model)
    prepare_qat(model, "A8W4", 32)
    with pytest.raises(UserError, match="trained for A8W4 with group size 32, not for A8W8"):
        quantize_model(model, config)
    check_trainable(model)
    add_lora(model, LoRAConfig(r=2, lora_alpha=2, target_modules="all-linear"), seed=1)
    round_adapters(model)
    with pytest.raises(UserError, match="merge the LoRA adapter before"):
        finish_qat(model)
    quantized = quantize_model(build_model(TINY, seed=1), config)
    for again in (
        lambda: quantize_model(quantized, config),
        lambda: prepare_qat(quantized, "A8W8"),
        lambda: check_trainable(quantized),
    ):
        with pytest.raises(UserError, match=r"quantized already|are integers"):
            again()


def test_dropout_beside_rounding():
    model = prepare_qat(build_model(TINY, seed=1), "A8W8")
    config = LoRAConfig(r=2, lora_alpha=2, lora_dropout=0.1, target_modules="all-linear")
    with pytest.raises(UserError, match=r"lora_dropout=0.1 drops inputs .* set it to 0 with qat"):
        round_adapters(add_lora(model, config, seed=1))


def flags(*words):
    return load((QuantizeArguments,), list(words), prog="quantize_generation.py")[0]


GIVEN = ("--model_name_or_path", "m", "--output_dir", "o")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--model_name_or_path is needed"),
        (("--model_path", "m"), "--output_dir is needed"),
        ((*GIVEN, "--quant_type", "W2"), "quant_type='W2' is not one of W8, W4, A8W8, A8W4"),
        ((*GIVEN, "--quant_type", "W4"), "W4 with method=gptq needs --calibration_file"),
        ((*GIVEN, "--method", "gptq"), "W8 with method=gptq needs --calibration_file"),
        (
            (*GIVEN, "--quant_type", "W4", "--group_size", "0"),
            "group_size=0: give a multiple of 8, or -1",
        ),
        ((*GIVEN, "--smooth", "0.5"), "smooth=0.5 evens out activations, which quant_type=W8 does"),
        ((*GIVEN, "--quant_type", "A8W8", "--smooth", "0.5"), "smooth=0.5 needs --calibration_f"),
        ((*GIVEN, "--smooth", "2"), "smooth=2.0 but the maximum is 1"),
        ((*GIVEN, "--dequantize", "true", "--eval_file", "x"), "eval_file has no effect beside"),
        ((*GIVEN, "--damping", "0"), "damping=0.0 but the minimum is"),
    ],
)
def test_bad_flags(words, message):
    with pytest.raises(UserError, match=message):
        flags(*words)


def test_paths_are_checked_before_any_work(tmp_path):
    occupied = tmp_path / "full"
    occupied.mkdir()
    (occupied / "file").write_text("x")
    with pytest.raises(UserError, match=r"output_dir=.*full is not empty; give a new directory"):
        quantized.check_paths(flags("--model_path", "m", "--output_dir", str(occupied)))
    new = ("--model_path", "m", "--output_dir", str(tmp_path / "new"))
    with pytest.raises(UserError, match="eval_file=nowhere is neither a text file nor a token"):
        quantized.check_paths(flags(*new, "--eval_file", "nowhere"))
    gptq = (*new, "--quant_type", "W4", "--calibration_file")
    with pytest.raises(UserError, match=r"calibration_file=nowhere\.txt is neither a text file"):
        quantized.check_paths(flags(*gptq, "nowhere.txt"))
    (tmp_path / "store.idx").write_text("x")
    quantized.check_paths(flags(*gptq, str(tmp_path / "store")))


def test_too_little_text():
    short = [Document(np.arange(30)), Document(np.arange(20))]
    with pytest.raises(UserError, match="has 50 tokens, less than one row of 51"):
        quantized.calibration_rows(short, 4, 51)
    rows = quantized.calibration_rows(short, 4, 8)
    assert rows.shape == (4, 8) and rows[0, 0] == 0 and rows[-1].tolist() == [*range(10, 18)]
    assert quantized.calibration_rows(short, 99, 8).shape == (6, 8)


def test_quantizing_twice():
    model = quantize_model(build_model(TINY, seed=1), QuantConfig.of_type("W8"))
    with pytest.raises(UserError, match="m is quantized already; give the model it was made from"):
        post_training.quantize(model, flags(*GIVEN), None)


def test_a_full_disk_leaves_no_directory(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    class Tokenizer:
        save = full

    model = quantize_model(build_model(TINY, seed=1), QuantConfig.of_type("W8"))
    with pytest.raises(OSError, match="No space left"):
        save_directory(model, Tokenizer(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
