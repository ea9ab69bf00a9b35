"""GPTQ's directories beside networks of the numbers that their integers stand for."""

import json

import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file

from common.errors import UserError
from llm.llama.build import load_model
from llm.llama.config import PRESETS

CONFIG = PRESETS["tiny-random-llama"].replace(vocab_size=96, intermediate_size=128)
QUANT = {"quant_method": "gptq", "sym": True, "desc_act": False, "lm_head": False}


def words(values, bits, axis):
    """Pack small numbers into 32-bit words along an axis, the first in the lowest bits."""
    count = 32 // bits
    moved = np.moveaxis(values.astype(np.uint64), axis, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, count)
    packed = (groups << (np.arange(count, dtype=np.uint64) * bits)).sum(-1)
    return np.ascontiguousarray(np.moveaxis(packed, -1, axis)).astype(np.uint32).view(np.int32)


def write(directory, bits=4, group=32, newer=False, biases=False, **changes):
    """Write integers; return the network's weights as numbers."""
    rng, tensors, numbers = np.random.default_rng(0), {}, {}
    middle = 1 << (bits - 1)
    tensors["model.embed_tokens.weight"] = rng.standard_normal((96, 64)).astype(np.float16)
    tensors["lm_head.weight"] = (rng.standard_normal((96, 64)) / 8).astype(np.float16)
    tensors["model.norm.weight"] = np.ones(64, np.float16)
    for layer in range(CONFIG.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = np.ones(64, np.float16)
        for name, (inputs, outputs) in CONFIG.linears.items():
            groups = 1 if group is None else inputs // group
            q = rng.integers(0, 1 << bits, (inputs, outputs))
            scales = rng.uniform(1, 2, (groups, outputs)) / middle / np.sqrt(inputs)
            scales = scales.astype(np.float16)
            zeros = np.full((groups, outputs), middle - (not newer))
            order = np.arange(inputs) // (group or inputs)
            tensors |= {
                f"{prefix}{name}.qweight": words(q, bits, 0),
                f"{prefix}{name}.qzeros": words(zeros, bits, 1),
                f"{prefix}{name}.scales": scales,
                f"{prefix}{name}.g_idx": order.astype(np.int32),
            }
            if biases:
                tensors[f"{prefix}{name}.bias"] = np.zeros(outputs, np.float16)
            wide = scales.astype(np.float32)[order] * (q - middle)
            numbers[f"{prefix}{name}.weight"] = np.ascontiguousarray(wide.T, np.float32)
    directory.mkdir()
    floats = {n: v for n, v in tensors.items() if v.dtype == np.float16 and "scales" not in n}
    floats = {n: v.astype(np.float32) for n, v in floats.items() if not n.endswith(".bias")}
    format_ = "gptq_v2" if newer else "gptq"
    quant = {**QUANT, "bits": bits, "group_size": group or -1, "checkpoint_format": format_}
    raw = CONFIG.to_hf("float16") | {"quantization_config": {**quant, **changes}}
    (directory / "config.json").write_text(json.dumps(raw))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return floats | numbers, tensors


@pytest.mark.parametrize(
    "options",
    [{}, {"newer": True}, {"group": None}, {"bits": 8, "group": None}, {"biases": True}],
    ids=["groups", "v2", "one scale", "8 bits", "zero biases"],
)
def test_networks_of_integers_are_those_of_the_numbers(options, tmp_path):
    numbers, _ = write(tmp_path / "q", **options)
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    save_file(numbers, tmp_path / "wide" / "model.safetensors")
    ids = paddle.to_tensor(np.random.default_rng(1).integers(0, 96, [2, 20]))
    rows = []
    for place in ("q", "wide"):
        with paddle.no_grad():
            rows.append(load_model(tmp_path / place).eval()(ids).numpy())
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-5)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"sym": False}, "sym=False"),
        ({"desc_act": True}, "desc_act=True"),
        ({"bits": 8, "group": 32}, "bits=8 with group_size=32"),
    ],
)
def test_settings_that_the_kernels_do_not_have(options, said, tmp_path):
    write(tmp_path / "q", **options)
    with pytest.raises(UserError, match=said):
        load_model(tmp_path / "q")


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("qzeros", lambda values: values + 1, "zero points off the middle.*sym=True"),
        ("g_idx", lambda values: values[::-1].copy(), "out of order.*desc_act=False"),
        ("scales", None, r"lacks model.layers.1.mlp.up_proj.scales"),
        ("scales", lambda values: values * np.float16("nan"), "scales are zero or no numbers"),
    ],
)
def test_files_that_the_kernels_do_not_have(name, change, said, tmp_path):
    _, tensors = write(tmp_path / "q")
    name = f"model.layers.1.mlp.up_proj.{name}"
    values = tensors.pop(name)
    if change is not None:
        tensors[name] = change(values)
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    with pytest.raises(UserError, match=said):
        load_model(tmp_path / "q")
