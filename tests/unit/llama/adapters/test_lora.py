"""LoRA: which layers, how much, what is trained, what is on disk, and merging."""

import json
import math

import numpy as np
import paddle
import pytest
from paddle import nn
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from llm.llama.adapters.lora import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    has_lora,
    load_lora,
    lora_disabled,
    save_lora,
    trainable_parameters,
)
from llm.llama.build import load_model
from llm.llama.files import peft
from llm.llama.layers import Linear
from llm.llama.merging import merge_lora
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.network import quantize_model
from llm.llama.saving import save_merged
from tests.unit.llama.adapters.adapter_models import (
    LINEARS,
    TINY,
    base,
    draw_ids,
    gradients,
    logits,
    with_lora,
)

IDS = draw_ids(2, 11)


def adapted(model):
    return {name for name, layer in model.named_sublayers() if isinstance(layer, LoRALinear)}


def every(*names, layers=(0, 1)):
    parts = {name: "mlp" if name in LINEARS[4:] else "self_attn" for name in names}
    return {f"model.layers.{i}.{part}.{name}" for i in layers for name, part in parts.items()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, every(*LINEARS)),
        ({"target_modules": ["all-linear"]}, every(*LINEARS)),
        ({"target_modules": ["q_proj", "v_proj"]}, every("q_proj", "v_proj")),
        ({"target_modules": ["layers.1.mlp.up_proj"]}, every("up_proj", layers=(1,))),
        ({"target_modules": ["lm_head", "k_proj"]}, every("k_proj") | {"lm_head"}),
        ({"target_modules": r".*layers\.0\..*_proj"}, every(*LINEARS, layers=(0,))),
        ({"exclude_modules": LINEARS[:5]}, every("up_proj", "down_proj")),
        ({"exclude_modules": r".*layers\.1\..*"}, every(*LINEARS, layers=(0,))),
    ],
)
def test_targets(options, expected):
    assert adapted(add_lora(base(), LoRAConfig(**options))) == expected


def test_a_tied_output_matrix_stays_as_it_is():
    model = add_lora(base(TINY.replace(tie_word_embeddings=True)), LoRAConfig())
    assert adapted(model) == every(*LINEARS)


def test_scaling():
    assert LoRAConfig(r=16, lora_alpha=32).scaling("x.q_proj") == 2
    assert LoRAConfig(r=16, lora_alpha=32, use_rslora=True).scaling("x.q_proj") == 8
    config = LoRAConfig(r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"v_.*": 4})
    names = ("a.q_proj", "a.v_proj", "a.k_proj", "a.not_q_proj_really")
    assert [config.rank(name) for name in names] == [2, 4, 4, 4]
    assert [config.scaling(name) for name in names] == [4, 1, 2, 2]
    model = add_lora(base(), config)
    attention = model.model.layers[1].self_attn
    assert attention.q_proj.lora_A.shape == [32, 2] and attention.k_proj.lora_B.shape == [4, 16]


@pytest.mark.parametrize("rslora", [False, True])
def test_the_layer_adds_the_scaled_product(rslora):
    model = with_lora(config=LoRAConfig(r=4, lora_alpha=6, use_rslora=rslora))
    layer = model.model.layers[0].mlp.down_proj
    x = np.random.default_rng(0).standard_normal([3, 40])
    product = x @ layer.lora_A.numpy() @ layer.lora_B.numpy() * (6 / (2 if rslora else 4))
    out = layer(paddle.to_tensor(x, "float32")).numpy()
    np.testing.assert_allclose(out, x @ layer.base.weight.numpy() + product, atol=1e-5)


def test_a_new_adapter_changes_nothing_and_starts_as_peft_starts():
    model = base()
    before = logits(model, IDS)
    add_lora(model, LoRAConfig(r=64), seed=5)
    np.testing.assert_array_equal(logits(model, IDS), before)
    values = model.model.layers[0].mlp.down_proj.lora_A.numpy()  # uniform within 1/sqrt(40)
    bound = 1 / math.sqrt(40)
    assert 0.98 * bound < np.abs(values).max() <= bound
    assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_equal_seeds_give_equal_starts_whatever_paddle_drew_before():
    starts = []
    for seed in (5, 5, 6):
        model = base()
        paddle.rand([seed * 10])
        add_lora(model, LoRAConfig(), seed=seed)
        starts.append(model.model.layers[1].self_attn.o_proj.lora_A.numpy())
    np.testing.assert_array_equal(starts[0], starts[1])
    assert (starts[0] != starts[2]).all()


def test_dropout_in_training_only():
    model = with_lora(config=LoRAConfig(r=4, lora_dropout=0.5))
    plain = with_lora(config=LoRAConfig(r=4))
    np.testing.assert_array_equal(logits(model, IDS), logits(plain, IDS))
    model.train()
    one, two = logits(model, IDS), logits(model, IDS)
    assert np.abs(one - two).max() > 1e-3
    model.eval()
    np.testing.assert_array_equal(logits(model, IDS), logits(plain, IDS))


def test_frozen_weights_have_no_gradients_and_no_optimizer_state():
    model = with_lora(config=LoRAConfig(r=2, target_modules=["q_proj", "down_proj"]))
    frozen = {n: p.numpy() for n, p in model.named_parameters() if p.stop_gradient}
    optimizer = paddle.optimizer.AdamW(0.1, parameters=model.parameters(), weight_decay=0.1)
    model.train()
    model(IDS).square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    expected = every("q_proj", "down_proj")
    assert trained == {f"{name}.lora_{kind}" for name in expected for kind in "AB"}
    optimizer.step()
    state = {key for key in optimizer.state_dict() if key != "LR_Scheduler"}
    assert {key.rsplit(".", 1)[0] + "." + key.rsplit(".", 1)[1][:6] for key in state} == trained
    for name, value in frozen.items():
        np.testing.assert_array_equal(dict(model.named_parameters())[name].numpy(), value)


def test_counts():
    model = add_lora(base(), LoRAConfig(r=2, target_modules=["q_proj", "v_proj"]))
    extra = 2 * 2 * ((32 + 32) + (32 + 16))
    assert trainable_parameters(model) == (extra, TINY.num_parameters + extra)
    assert trainable_parameters(base()) == (TINY.num_parameters, TINY.num_parameters)


def test_parameters_carry_their_own_names_before_and_after():
    nn.Linear(3, 3)  # moves Paddle's counters
    model = with_lora()
    names = [name for name, _ in model.named_parameters()]
    assert [p.name for p in model.parameters()] == names
    assert "model.layers.0.self_attn.q_proj.lora_A" in names
    merge_lora(model)
    assert [p.name for p in model.parameters()] == [n for n, _ in base().named_parameters()]


@pytest.mark.parametrize("flash", [False, True])
def test_recomputed_layers_give_adapters_the_same_gradients(flash):
    """Below a frozen embedding Paddle's recompute would see nothing to do."""
    config = LoRAConfig(r=4, lora_dropout=0.3)
    found = []
    for recompute in (False, True):
        model = with_lora(base(recompute=recompute, use_flash_attention=flash), config)
        paddle.seed(7)
        found.append(gradients(model, IDS))
    assert len(found[0]) == 2 * len(every(*LINEARS))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        np.testing.assert_array_equal(found[1][name], value)
        assert np.abs(value).max() > 0, name


def test_disabled_is_the_base_model_until_the_end_of_the_block():
    plain, model = logits(base(), IDS), with_lora()
    adapted_logits = logits(model, IDS)
    with lora_disabled(model):
        np.testing.assert_array_equal(logits(model, IDS), plain)
        with lora_disabled(model):
            pass
        np.testing.assert_array_equal(logits(model, IDS), plain)
    with pytest.raises(KeyError), lora_disabled(model):
        raise KeyError
    np.testing.assert_array_equal(logits(model, IDS), adapted_logits)
    assert np.abs(adapted_logits - plain).max() > 0.1


def test_files_are_peft_s(tmp_path):
    config = LoRAConfig(r=4, lora_alpha=8, use_rslora=True, base_model_name_or_path="some/llama")
    model = with_lora(config=config)
    save_lora(model, tmp_path / "new" / "adapter")
    tensors = load_file(tmp_path / "new" / "adapter" / "adapter_model.safetensors")
    kinds = {f"base_model.model.{n}.lora_{k}.weight" for n in every(*LINEARS) for k in "AB"}
    assert tensors.keys() == kinds
    layer = model.model.layers[1].mlp.gate_proj
    stem = "base_model.model.model.layers.1.mlp.gate_proj"
    np.testing.assert_array_equal(tensors[f"{stem}.lora_A.weight"], layer.lora_A.numpy().T)
    np.testing.assert_array_equal(tensors[f"{stem}.lora_B.weight"], layer.lora_B.numpy().T)
    raw = json.loads((tmp_path / "new" / "adapter" / "adapter_config.json").read_text())
    assert raw["peft_type"] == "LORA" and raw["task_type"] == "CAUSAL_LM"
    assert raw["target_modules"] == sorted(LINEARS) and raw["use_rslora"] is True
    assert raw["r"] == 4 and raw["lora_alpha"] == 8 and raw["bias"] == "none"
    assert raw["base_model_name_or_path"] == "some/llama"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj", "lm_head"], "use_rslora": True, "lora_alpha": 3.5},
        {"target_modules": r".*\.1\..*_proj", "rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"mlp.*": 1}, "exclude_modules": ["k_proj"]},
    ],
)
def test_round_trip(tmp_path, options):
    model = with_lora(config=LoRAConfig(r=4, **options))
    save_lora(model, tmp_path)
    again = load_lora(base(), tmp_path)
    np.testing.assert_array_equal(logits(again, IDS), logits(model, IDS))
    assert trainable_parameters(again)[0] == 0
    again = load_lora(base(), tmp_path, trainable=True)
    assert trainable_parameters(again) == trainable_parameters(model)
    assert gradients(again, IDS).keys() == gradients(model, IDS).keys()


def test_half_precision_files_load(tmp_path):
    model = with_lora()
    save_lora(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: value.astype(np.float16) for name, value in load_file(file).items()}, file)
    again = load_lora(base(), tmp_path)
    assert again.model.layers[0].mlp.up_proj.lora_A.dtype == paddle.float32
    np.testing.assert_allclose(logits(again, IDS), logits(model, IDS), atol=0.05)


def test_loading_fills_an_adapter_that_is_there(tmp_path):
    model = with_lora(seed=1)
    save_lora(model, tmp_path)
    other = with_lora(seed=2)
    parameters = [id(p) for p in other.parameters()]
    load_lora(other, tmp_path, trainable=True)
    np.testing.assert_array_equal(logits(other, IDS), logits(model, IDS))
    assert [id(p) for p in other.parameters()] == parameters  # an optimizer still holds them


@pytest.mark.parametrize("load_into", [base, with_lora])
def test_files_are_float32_whatever_mixed_precision_made_of_the_matrices(tmp_path, load_into):
    model = with_lora()
    model.to(dtype="bfloat16")
    save_lora(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {str(value.dtype) for value in stored.values()} == {"float32"}
    other = load_into()
    other.to(dtype="bfloat16")
    load_lora(other, tmp_path)
    for name, layer in other.named_sublayers():
        if isinstance(layer, LoRALinear):
            value = layer.lora_A.astype("float32").numpy()
            np.testing.assert_array_equal(value.T, stored[f"base_model.model.{name}.lora_A.weight"])


def test_a_failed_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = with_lora()
    save_lora(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(file, *_):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft, "write_file", fail)
    with pytest.raises(OSError, match="No space"):
        save_lora(with_lora(seed=9), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "target_modules": ["lm_head"]}])
def test_merged_is_unmerged(tmp_path, options, record_property):
    model = with_lora(config=LoRAConfig(r=4, **options))
    unmerged = logits(model, IDS)
    merge_lora(model)
    error = np.abs(logits(model, IDS) - unmerged).max()
    record_property("error", float(error))
    assert error <= 2e-6 * max(1, np.abs(unmerged).max())
    assert not has_lora(model) and trainable_parameters(model) == (TINY.num_parameters,) * 2
    assert all(type(layer) is Linear for n, layer in model.named_sublayers() if "_proj" in n)


class _Tokenizer:
    def save(self, directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_merged_model_is_complete(tmp_path, dtype):
    model = with_lora()
    unmerged = logits(model, IDS)
    save_merged(model, tmp_path / "a" / "merged", _Tokenizer(), dtype=dtype)
    names = {path.name for path in (tmp_path / "a" / "merged").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    }
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["merged"]
    again = load_model(tmp_path / "a" / "merged")
    again.eval()
    limit = 1e-5 if dtype is None else 0.2
    np.testing.assert_allclose(logits(again, IDS), unmerged, atol=limit)
    with pytest.raises(UserError, match="merged is not empty; give a new directory"):
        save_merged(model, tmp_path / "a" / "merged", _Tokenizer())


class _Doubling(Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_merge_that_changes_logits_is_an_error():
    model = with_lora(config=LoRAConfig(r=4, target_modules=["up_proj"]))
    for layer in model.model.layers:
        layer.mlp.up_proj.base.__class__ = _Doubling
    with pytest.raises(UserError, match="merging changed a logit by"):
        merge_lora(model)


class _Halves(nn.Layer):
    """A base in another format: two float16 halves, as a quantized layer might keep codes."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.weight.shape
        self.codes = linear.weight.astype("float16")

    def forward(self, x):
        return paddle.matmul(x, self.codes.astype("float32"))


def test_any_linear_like_base_will_do_except_for_merging():
    model = base()
    for layer in model.model.layers:
        layer.mlp.up_proj = _Halves(layer.mlp.up_proj)
    add_lora(model, LoRAConfig(r=2), seed=0)
    assert adapted(model) == every(*LINEARS)
    found = gradients(model, IDS)
    assert all(np.abs(v).max() > 0 for n, v in found.items() if n.endswith("lora_B"))
    with pytest.raises(UserError, match=r"up_proj, a _Halves: load the base model in full"):
        merge_lora(model)
    assert has_lora(model)


@pytest.mark.parametrize("kind", ["W8", "W4"])
def test_a_quantized_base_learns_through_its_adapter(tmp_path, kind):
    """QLoRA: integer weights stay, gradients pass through them to earlier adapters."""
    config = QuantConfig.of_type(kind, 8 if kind == "W4" else None)
    model = with_lora(quantize_model(base(), config), LoRAConfig(r=4))
    found = gradients(model, IDS)
    assert {name.rsplit(".", 1)[0] for name in found} == every(*LINEARS)
    assert all(np.abs(value).max() > 0 for value in found.values())
    save_lora(model, tmp_path)
    again = load_lora(quantize_model(base(), config), tmp_path)
    np.testing.assert_array_equal(logits(again, IDS), logits(model, IDS))
    wanted = logits(model, IDS)
    np.testing.assert_allclose(logits(merge_lora(model), IDS), wanted, atol=1e-4)
