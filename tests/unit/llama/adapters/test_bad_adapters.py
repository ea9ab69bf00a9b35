"""Adapters that cannot be used: what is wrong is said before the network is touched."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from llm.llama.adapters.lora import LoRAConfig, add_lora, load_lora, save_lora
from llm.llama.adapters.opening import load_adapter
from llm.llama.adapters.prefix import PROJECTION_NAME, PrefixConfig, load_prefix, save_prefix
from llm.llama.build import load_model, save_model
from llm.llama.merging import merge_lora
from tests.unit.llama.adapters.adapter_models import (
    TINY,
    base,
    draw_ids,
    logits,
    with_lora,
    with_prefix,
)

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def plain():
    return base()


@pytest.fixture
def lora(tmp_path):
    config = LoRAConfig(r=4, target_modules=["q_proj", "v_proj"], base_model_name_or_path="a/b")
    save_lora(with_lora(config=config), tmp_path)
    return tmp_path


@pytest.fixture
def prefix(tmp_path):
    save_prefix(with_prefix(7), tmp_path)
    return tmp_path


def settings(**changes):
    def change(directory):
        file = directory / "adapter_config.json"
        raw = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in raw.items() if v != "absent"}))

    return change


def tensors(edit):
    def change(directory):
        values = load_file(directory / WEIGHTS)
        edit(values)
        save_file(values, directory / WEIGHTS)

    return change


def write(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def remove(name):
    return lambda directory: (directory / name).unlink()


def cut(directory):
    file = directory / WEIGHTS
    file.write_bytes(file.read_bytes()[:-7])


def refused(model, directory, message, load=load_adapter):
    before = logits(model, draw_ids(1, 5))
    names = [(name, p.stop_gradient) for name, p in model.named_parameters()]
    with pytest.raises(UserError, match=message):
        load(model, directory)
    assert [(name, p.stop_gradient) for name, p in model.named_parameters()] == names
    np.testing.assert_array_equal(logits(model, draw_ids(1, 5)), before)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGED_LORA = {
    "dora": (settings(use_dora=True), "lacks what this model needs: .*lora_magnitude_vector"),
    "odd dora": (settings(use_dora="yes"), "use_dora='yes' has to be true or false"),
    "modules": (
        settings(modules_to_save=["lm_head"]),
        r"lacks what this model needs: base_model\.model\.lm_head\.weight",
    ),
    "no such module": (
        settings(modules_to_save=["wte"]),
        "modules_to_save: this model has no layer wte; it has down_proj, embed_tokens",
    ),
    "odd modules": (settings(modules_to_save="lm_head"), "modules_to_save='lm_head' has to be a"),
    "all modules": (
        settings(modules_to_save=["model", "lm_head"]),
        "modules_to_save takes every linear",
    ),
    "both": (
        settings(modules_to_save=["q_proj", "v_proj"]),
        r"no linear layer q_proj, v_proj \(modules_to_save trains it whole\)",
    ),
    "bias": (settings(bias="all"), "bias='all' is not supported, only 'none'"),
    "transposed": (settings(fan_in_fan_out=True), "fan_in_fan_out=True is not supported"),
    "some layers": (settings(layers_to_transform=[0]), r"layers_to_transform=\[0\] is not"),
    "a new method": (settings(use_magic={"k": 1}), r"use_magic=\{'k': 1\} is not supported"),
    "drawn pissa": (
        settings(init_lora_weights="pissa_niter_4"),
        "'pissa_niter_4' starts from random numbers",
    ),
    "olora": (settings(init_lora_weights="olora"), "'olora' changes the base weights"),
    "a classifier": (settings(task_type="SEQ_CLS"), "task_type='SEQ_CLS'; only CAUSAL_LM"),
    "no targets": (settings(target_modules=None), "target_modules is missing"),
    "empty targets": (settings(target_modules=[]), "target_modules is empty"),
    "foreign targets": (
        settings(target_modules=["c_attn"]),
        r"no linear layer c_attn; it has down_proj, gate_proj, .*v_proj \(or all-linear\)",
    ),
    "embeddings": (settings(target_modules=["embed_tokens"]), "embeddings are not adapted here"),
    "bad regex": (settings(target_modules="q_proj)"), "'q_proj.' is no regular expression"),
    "odd targets": (settings(target_modules=7), "target_modules=7 has to be a list of names"),
    "rank 0": (settings(r=0), "LoRA rank r=0 has to be a whole number of at least 1"),
    "rank 2.5": (settings(r=2.5), "LoRA rank r=2.5"),
    "rank of a pattern": (settings(rank_pattern={"q_proj": 0}), r"rank_pattern\['q_proj'\]=0"),
    "no scale": (settings(lora_alpha=0), "lora_alpha=0 has to be a positive number"),
    "dropout": (settings(lora_dropout=1.0), "lora_dropout=1.0 has to be at least 0 and below 1"),
    "damaged pattern": (settings(rank_pattern=[3]), "is damaged"),
    "other rank": (settings(r=8), r"lora_A.weight has shape \[4, 32\], this model needs \[8, 32\]"),
    "other kind": (settings(peft_type="IA3"), "peft_type='IA3' is not supported; supported: LORA"),
    "no kind": (settings(peft_type="absent"), "peft_type=None is not supported"),
    "cut": (cut, "is cut off"),
    "no weights": (remove(WEIGHTS), f"lacks {WEIGHTS}"),
    "no settings": (remove("adapter_config.json"), "has no adapter_config.json: it is no adapter"),
    "not JSON": (write("adapter_config.json", b"{"), "adapter_config.json is damaged"),
    "not text": (write("adapter_config.json", b"\xff\xfe{"), "adapter_config.json is damaged"),
    "a list": (write("adapter_config.json", b"[]"), "is damaged: not a JSON object"),
    "LFS pointer": (write(WEIGHTS, b"version https://git-lfs"), "Git LFS pointer"),
    "NaN": (
        tensors(lambda t: t[Q0].__setitem__((0, 0), np.nan)),
        "holds 1 numbers that are nan or inf",
    ),
    "lacking": (tensors(lambda t: t.pop(Q0)), f"lacks what this model needs: {Q0}; it is another"),
    "surplus": (
        tensors(lambda t: t.update({Q0.replace("layers.0", "layers.5"): t[Q0]})),
        r"has what this model has no place for: .*layers\.5.*\(it was trained on a/b\)",
    ),
}
DAMAGED_PREFIX = {
    "layers": (settings(num_layers=32), "num_layers=32, this model needs 2; it is another model's"),
    "heads": (settings(num_attention_heads=4), "num_attention_heads=4, this model needs 2"),
    "width": (settings(token_dim="absent"), "token_dim=None, this model needs 16"),
    "length 0": (settings(num_virtual_tokens=0), "num_virtual_tokens=0 has to be a whole number"),
    "no length": (settings(num_virtual_tokens="absent"), "num_virtual_tokens=None has to"),
    "too long": (settings(num_virtual_tokens=128), "=128 leaves no room in the model's context"),
    "other length": (
        settings(num_virtual_tokens=8),
        r"shape \[7, 64\], this model needs \[8, 64\]",
    ),
    "encoder": (settings(num_transformer_submodules=2), "num_transformer_submodules=2 is not"),
    "task": (settings(task_type="SEQ_2_SEQ_LM"), "task_type='SEQ_2_SEQ_LM' is not supported"),
    "projection": (settings(prefix_projection=1), "prefix_projection=1 has to be true or false"),
    "hidden": (settings(encoder_hidden_size=-1), "encoder_hidden_size=-1 has to be a whole number"),
    "cut": (cut, "is cut off"),
    "no weights": (remove(WEIGHTS), f"lacks {WEIGHTS}"),
    "infinite": (
        tensors(lambda t: t["prompt_embeddings"].__setitem__((0, 0), np.inf)),
        "prompt_embeddings holds 1 numbers that are nan or inf",
    ),
}


@pytest.mark.parametrize("case", DAMAGED_LORA)
def test_lora(plain, lora, case):
    damage, message = DAMAGED_LORA[case]
    damage(lora)
    refused(plain, lora, message)


@pytest.mark.parametrize("case", DAMAGED_PREFIX)
def test_prefix(plain, prefix, case):
    damage, message = DAMAGED_PREFIX[case]
    damage(prefix)
    refused(plain, prefix, message)


@pytest.mark.parametrize("load", [load_adapter, load_lora, load_prefix])
def test_places_that_hold_no_adapter(plain, tmp_path, load):
    refused(plain, tmp_path / "absent", "absent' is not a directory with an adapter", load)
    save_model(plain, tmp_path)
    refused(plain, tmp_path, "is a model, not an adapter .* give it as --model_name_or_path", load)


def test_an_adapter_in_place_of_a_model(lora):
    with pytest.raises(UserError, match="is an adapter, not a model; give the model"):
        load_model(lora)


def test_the_other_kind_of_adapter(plain, lora):
    refused(plain, lora, "'LORA' is not 'PREFIX_TUNING'; give it as --lora_path", load_prefix)
    save_prefix(with_prefix(3), lora)
    refused(plain, lora, "'PREFIX_TUNING' is not 'LORA'; give it as --prefix_path", load_lora)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, "has what this model has no place for: .*layers.1"),
        ({"num_hidden_layers": 3}, "lacks what this model needs: .*layers.2"),
        ({"hidden_size": 48}, r"lora_A.weight has shape \[4, 32\], this model needs \[4, 48\]"),
        ({"num_key_value_heads": 4}, r"v_proj.lora_B.weight has shape \[16, 4\], .* \[32, 4\]"),
    ],
)
def test_another_model_s_lora(lora, changes, message):
    refused(base(TINY.replace(**changes)), lora, message + r".*it was trained on a/b\)")


def test_a_pickled_adapter_that_is_none(plain, lora):
    (lora / WEIGHTS).rename(lora / "adapter_model.bin")
    refused(plain, lora, "adapter_model.bin is no file of torch.save")


def test_a_copy_of_the_output_matrix_has_to_be_the_model_s(plain, lora):
    """PEFT adds one when lm_head is adapted."""
    model = with_lora(config=LoRAConfig(r=4, target_modules=["lm_head"]))
    save_lora(model, lora)
    name = "base_model.model.lm_head.base_layer.weight"
    weight = np.ascontiguousarray(model.lm_head.base.weight.numpy().T)
    tensors(lambda t: t.update({name: weight}))(lora)
    np.testing.assert_array_equal(
        logits(load_lora(base(), lora), draw_ids(1, 5)), logits(model, draw_ids(1, 5))
    )
    tensors(lambda t: t.update({name: weight + 1}))(lora)
    refused(plain, lora, f"brings its own {name}, which differs from this model's")


def test_a_projection_that_was_not_kept_cannot_learn_on(plain, tmp_path):
    save_prefix(with_prefix(3, projection=True), tmp_path)
    (tmp_path / PROJECTION_NAME).unlink()
    message = f"lacks {PROJECTION_NAME}: PEFT does not keep the projection"
    refused(plain, tmp_path, message, lambda m, d: load_prefix(m, d, trainable=True))
    load_prefix(base(), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "LoRA rank r=0"),
        ({"r": True}, "LoRA rank r=True"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan has to be a positive number"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"target_modules": ["q_proj", ""]}, "has to be a list of names"),
        ({"target_modules": "("}, "is no regular expression"),
        ({"rank_pattern": {"(": 2}}, "is no regular expression"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        LoRAConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "query"]}, "no linear layer query; it has down_proj"),
        ({"target_modules": ["embed_tokens"]}, "no linear layer embed_tokens"),
        ({"target_modules": "q_proj"}, "no linear layer q_proj"),  # a regex of whole names
        ({"exclude_modules": r".*"}, "exclude_modules='.*' leaves no layer to adapt"),
    ],
)
def test_targets_that_are_not_there(plain, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        add_lora(plain, LoRAConfig(**options))
    assert not any(p.stop_gradient for p in plain.parameters())


def test_steps_in_the_wrong_order(plain, tmp_path):
    with pytest.raises(UserError, match="has no LoRA adapter to save"):
        save_lora(plain, tmp_path)
    with pytest.raises(UserError, match="has no LoRA adapter to merge"):
        merge_lora(plain)
    with pytest.raises(UserError, match="has no prefix to save"):
        save_prefix(plain, tmp_path)
    with pytest.raises(UserError, match="has a LoRA adapter already"):
        add_lora(with_lora(), LoRAConfig())
    with pytest.raises(UserError, match="num_virtual_tokens=128 leaves no room"):
        with_prefix(128)
    with pytest.raises(UserError, match="num_virtual_tokens='7'"):
        PrefixConfig("7")
    for model in (with_lora(), with_prefix(3)):
        with pytest.raises(UserError, match="has an adapter: save that with save_lora or save_pre"):
            save_model(model, tmp_path)
    assert not any(tmp_path.iterdir())
