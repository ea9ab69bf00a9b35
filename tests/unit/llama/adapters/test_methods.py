"""DoRA, PiSSA, layers that train whole, LoRA+ and NEFTune: what they compute, train and store."""

import json

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from external_ops.adamw import FusedAdamW
from llm.llama.adapters.lora import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    load_lora,
    lora_disabled,
    save_lora,
)
from llm.llama.adapters.per_request import RequestAdapters
from llm.llama.adapters.pissa import principal_factors
from llm.llama.build import load_model, save_model
from llm.llama.merging import merge_lora
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.network import quantize_model
from llm.llama.quantization.qat import prepare_qat, round_adapters
from llm.parallel.topology import single
from llm.train.finetune import add_noise, set_rates
from tests.unit.llama.adapters.adapter_models import (
    TINY,
    base,
    draw_ids,
    gradients,
    logits,
    with_lora,
)

IDS = draw_ids(2, 11)
BIASED = TINY.replace(attention_bias=True, mlp_bias=True)
WHOLE = ("embed_tokens", "lm_head", "model.norm", "1.mlp.up_proj")
METHODS = {
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa", "lora_alpha": 6},
    "rough pissa": {"init_lora_weights": "pissa_niter_3", "use_rslora": True},
    "both": {"use_dora": True, "init_lora_weights": "pissa"},
    "whole": {"modules_to_save": WHOLE, "target_modules": ["q_proj", "down_proj"]},
    "all": {"use_dora": True, "init_lora_weights": "pissa", "modules_to_save": WHOLE},
}


def learned(model=None, **options):
    """Return a network whose adapter has learned something in everything that trains."""
    model = add_lora(model or base(), LoRAConfig(r=4, **options), seed=1)
    rng = np.random.default_rng(2)
    for parameter in model.parameters():
        if not parameter.stop_gradient:
            noise = rng.standard_normal(parameter.shape, dtype=np.float32)
            parameter.set_value(parameter.numpy() + 0.05 * noise)
    return model


def near(got, wanted, limit=2e-6):
    return np.abs(got - wanted).max() <= limit * max(1, np.abs(wanted).max())


def test_dora_scales_columns_of_the_sum():
    """Result and gradients of one linear against NumPy in float64; lengths count as constants."""
    model = learned(base(BIASED), use_dora=True)
    layer = model.model.layers[0].mlp.down_proj
    bias = np.random.default_rng(1).standard_normal(32)
    layer.base.bias.set_value(bias.astype(np.float32))
    weight, a, b, magnitude = (
        one.numpy().astype(np.float64)
        for one in (layer.base.weight, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    )
    x, grad = (
        np.random.default_rng(n).standard_normal([5, size]) for n, size in ((0, 40), (3, 32))
    )
    merged = weight + 2 * a @ b
    scale = magnitude / np.sqrt((merged**2).sum(0))
    layer.train()
    out = layer(paddle.to_tensor(x, "float32"))
    (out * paddle.to_tensor(grad, "float32")).sum().backward()
    assert near(out.numpy(), x @ merged * scale + bias)
    inner = grad * scale
    assert near(layer.lora_B.grad.numpy(), 2 * (x @ a).T @ inner)
    assert near(layer.lora_A.grad.numpy(), 2 * x.T @ (inner @ b.T))
    assert near(
        layer.lora_magnitude_vector.grad.numpy(), (grad * (x @ merged)).sum(0) * scale / magnitude
    )


def test_dora_refuses_outputs_without_weights():
    model = base()
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.set_value(weight.numpy() * (np.arange(40) != 7))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj has outputs whose weights are"):
        add_lora(model, LoRAConfig(use_dora=True))
    assert not any(isinstance(layer, LoRALinear) for layer in model.sublayers())
    assert not any(parameter.stop_gradient for parameter in model.parameters())


@pytest.mark.parametrize("iterations", [None, 12])
def test_pissa_takes_the_nearest_product(iterations):
    """No product of that rank is nearer (Eckart and Young 1936), and both factors are as large."""
    weight = np.random.default_rng(0).standard_normal([24, 40]).astype(np.float32)
    options = {"iterations": iterations, "rng": np.random.default_rng(1), "name": "x"}
    found = principal_factors(weight, 5, 0.5, **options)
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    wanted = left[:, :5] * values[:5] @ right[:5]
    assert near(0.5 * found.a @ found.b, wanted, 1e-5 if iterations is None else 1e-3)
    np.testing.assert_allclose((found.a**2).sum(0), (found.b**2).sum(1), rtol=1e-4)
    with pytest.raises(UserError, match="rank 30 is more than the 24 singular values of x; lower"):
        principal_factors(weight, 30, 1.0, **options)


@pytest.mark.parametrize("name", METHODS)
def test_a_new_adapter_changes_nothing(name):
    model = base(BIASED)
    before = logits(model, IDS)
    add_lora(model, LoRAConfig(r=4, **METHODS[name]), seed=5)
    assert near(logits(model, IDS), before, 5e-6)


@pytest.mark.parametrize("name", METHODS)
def test_round_trip(tmp_path, name):
    """What is loaded answers alike; what goes on has the same numbers, and learns the same."""
    model = learned(**METHODS[name])
    save_lora(model, tmp_path)
    again = load_lora(base(), tmp_path)
    assert near(logits(again, IDS), logits(model, IDS), 5e-6)
    assert all(parameter.stop_gradient for parameter in again.parameters())
    started = "pissa" in str(METHODS[name])
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["init_lora_weights"] is True and raw["r"] == (8 if started else 4)
    assert (tmp_path / "pissa.json").exists() == started
    on = load_lora(base(), tmp_path, trainable=True)
    for (one, parameter), (other, value) in zip(
        model.named_parameters(), on.named_parameters(), strict=True
    ):
        assert one == other == value.name and parameter.stop_gradient == value.stop_gradient
        np.testing.assert_array_equal(value.numpy(), parameter.numpy())
    wanted, found = gradients(model, IDS), gradients(on, IDS)
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value)
        assert np.abs(value).max() > 0, key
    # Filled in place, as the best checkpoint is; an optimizer still holds the parameters.
    held = [id(p) for p in on.parameters()]
    for parameter in on.parameters():
        if not parameter.stop_gradient:
            parameter.set_value(parameter.numpy() * 2)
    load_lora(on, tmp_path, trainable=True)
    assert [id(p) for p in on.parameters()] == held
    np.testing.assert_array_equal(logits(on, IDS), logits(model, IDS))
    save_lora(with_lora(), tmp_path)
    assert not (tmp_path / "pissa.json").exists()


@pytest.mark.parametrize("kind", ["float32", "W8", "W4"])
@pytest.mark.parametrize("name", METHODS)
def test_merged_is_unmerged(name, kind):
    model = base(BIASED)
    if kind != "float32":
        if "modules_to_save" in METHODS[name]:
            with pytest.raises(UserError, match="up_proj holds integers, which do not train"):
                add_lora(
                    quantize_model(model, QuantConfig.of_type("W8", None)),
                    LoRAConfig(modules_to_save=WHOLE),
                )
            return
        quantize_model(model, QuantConfig.of_type(kind, 8 if kind == "W4" else None))
    model = learned(model, **METHODS[name])
    unmerged = logits(model, IDS)
    assert near(logits(merge_lora(model), IDS), unmerged, 1e-5)


@pytest.mark.parametrize("options", [METHODS["both"], METHODS["all"]])
def test_a_base_that_lies_in_bfloat16(tmp_path, options):
    """Layers that train whole become float32; merging widens the others."""
    save_model(base(), tmp_path / "base")
    model = load_model(tmp_path / "base", dtype="bfloat16", frozen=True)
    model.eval()
    before = logits(model, IDS)
    add_lora(model, LoRAConfig(r=4, **options), seed=1)
    assert near(logits(model, IDS), before, 1e-5)
    if "modules_to_save" in options:
        assert model.model.embed_tokens.weight.dtype == paddle.float32
        assert "model.embed_tokens.weight" in gradients(model, IDS)
    learned_logits = logits(model, IDS)
    assert near(logits(merge_lora(model), IDS), learned_logits, 1e-5)


@pytest.mark.parametrize("flash", [False, True])
def test_recomputed_layers_give_the_same_gradients(flash):
    found = []
    for recompute in (False, True):
        options = METHODS["all"] | {"lora_dropout": 0.3}
        model = learned(base(recompute=recompute, use_flash_attention=flash), **options)
        paddle.seed(7)
        found.append(gradients(model, IDS))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        np.testing.assert_array_equal(found[1][name], value)


def test_what_trains():
    """Factors, lengths and whole layers; the start does not, nor do whole layers get products."""
    model = add_lora(base(), LoRAConfig(r=4, **METHODS["all"]), seed=0)
    adapters = {n for n, layer in model.named_sublayers() if isinstance(layer, LoRALinear)}
    assert len(adapters) == 13 and "model.layers.1.mlp.up_proj" not in adapters
    kinds = ("lora_A", "lora_B", "lora_magnitude_vector")
    whole = ("model.embed_tokens", "lm_head", "model.norm", "model.layers.1.mlp.up_proj")
    expected = {f"{name}.{kind}" for name in adapters for kind in kinds}
    expected |= {f"{name}.weight" for name in whole}
    assert {n for n, p in model.named_parameters() if not p.stop_gradient} == expected
    assert gradients(model, IDS).keys() == expected


def test_dropout_leaves_what_does_not_train():
    """Dropped are inputs of the trained product, and of all that DoRA adds, as in PEFT."""
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal([64, 40]), "float32")
    for options in (METHODS["pissa"], METHODS["both"]):
        layer = learned(lora_dropout=0.5, **options).model.layers[0].mlp.down_proj
        layer.train()
        paddle.seed(3)
        got = layer(x).numpy()
        paddle.seed(3)
        dropped = paddle.nn.functional.dropout(x, 0.5).numpy().astype(np.float64)
        weight, a, b = (p.numpy() for p in (layer.base.weight, layer.lora_A, layer.lora_B))
        frozen = weight - layer.scaling * layer.start_A.numpy() @ layer.start_B.numpy()
        product = layer.scaling * a @ b
        scale = 1.0
        if layer.lora_magnitude_vector is not None:
            scale = layer.lora_magnitude_vector.numpy() / np.linalg.norm(frozen + product, axis=0)
        wanted = x.numpy() @ frozen + (scale - 1) * (dropped @ frozen) + scale * (dropped @ product)
        assert near(got, wanted, 5e-6)


def test_lengths_are_kept_until_it_trains_again(tmp_path):
    """Also where an adapter is filled from files; the whole network answers as its merged form."""
    model = learned(use_dora=True)
    layer = model.model.layers[0].self_attn.q_proj
    logits(model, IDS)
    kept = layer._known_lengths
    logits(model, IDS)
    assert layer._known_lengths is kept is not None
    gradients(model, IDS)
    assert layer._known_lengths is None
    save_lora(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file(stored | {name: stored[name] * 5}, tmp_path / "adapter_model.safetensors")
    before = logits(model, IDS)
    load_lora(model, tmp_path, trainable=True)
    changed = logits(model, IDS)
    assert not near(changed, before, 1e-3)
    assert near(changed, logits(merge_lora(model), IDS), 1e-5)


@pytest.mark.parametrize("kind", ["W8", "A8W8"])
def test_rounding_training_rounds_what_merging_gives(kind):
    """A network that rounds answers as its merged weights do when they are rounded."""
    rounding = round_adapters(learned(prepare_qat(base(), kind), **METHODS["both"]))
    plain = merge_lora(learned(**METHODS["both"]))
    assert near(logits(rounding, IDS), logits(prepare_qat(plain, kind), IDS), 1e-2)


def test_a_tied_embedding_trains_as_both(tmp_path):
    tied = TINY.replace(tie_word_embeddings=True)
    options = {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}
    with pytest.raises(UserError, match=r"lm_head is the embedding of this model .* embed_tokens"):
        add_lora(base(tied), LoRAConfig(modules_to_save=["lm_head"]))
    model = learned(base(tied), **options)
    save_lora(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    both = [stored[f"base_model.model.{n}.weight"] for n in ("model.embed_tokens", "lm_head")]
    np.testing.assert_array_equal(*both)
    np.testing.assert_array_equal(both[0], model.model.embed_tokens.weight.numpy())
    np.testing.assert_array_equal(logits(load_lora(base(tied), tmp_path), IDS), logits(model, IDS))
    stored["base_model.model.lm_head.weight"] = both[0] * 2
    save_file(stored, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        UserError, match=r"embed_tokens.weight and .*lm_head.weight should be equal"
    ):
        load_lora(base(tied), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"ensure_weight_tying": False})
    )
    with pytest.raises(UserError, match="trained the embedding apart from the output matrix"):
        load_lora(base(tied), tmp_path)


def test_what_cannot_be_switched_off_is_refused():
    model = learned(modules_to_save=["embed_tokens"])
    with pytest.raises(UserError, match="trains embed_tokens whole"), lora_disabled(model):
        pass
    model = learned(**METHODS["both"])
    with lora_disabled(model):
        np.testing.assert_array_equal(logits(model, IDS), logits(base(), IDS))


@pytest.mark.parametrize("name", ["dora", "whole", "pissa"])
def test_requests_share_a_base_that_an_adapter_must_not_change(tmp_path, name):
    save_lora(learned(**METHODS[name]), tmp_path)
    served = RequestAdapters(base())
    if name == "pissa":  # plain over the base as published
        assert served.load("x", tmp_path).low_rank is not None
        return
    with pytest.raises(
        UserError, match=r"changes the base's own weights.*give the adapter as lora_path"
    ):
        served.load("x", tmp_path)


@pytest.mark.parametrize("native", [False, True])
def test_b_and_vectors_learn_faster(native):
    """LoRA+: one step of Adam moves a number by its rate, whatever the gradient."""
    model = learned(use_dora=True, modules_to_save=["norm"])
    set_rates(model, 4.0)
    before = {n: p.numpy() for n, p in model.named_parameters() if not p.stop_gradient}
    kind = FusedAdamW if native else paddle.optimizer.AdamW
    held = [p for p in model.parameters() if not p.stop_gradient]
    optimizer = kind(1e-3, parameters=held, weight_decay=0.0, epsilon=1e-12)
    model.train()
    model(IDS).square().mean().backward()
    optimizer.step()
    moved = {n: np.abs(p.numpy() - before[n]) for n, p in model.named_parameters() if n in before}
    for name, change in moved.items():
        fast = name.endswith(("lora_B", "magnitude_vector")) or "norm" in name
        assert np.median(change) == pytest.approx(4e-3 if fast else 1e-3, rel=1e-3), name


def test_noise_is_added_to_embeddings_in_training_only():
    model = base()
    before = model.model.embed_tokens(IDS).numpy()
    add_noise(model, None, single())
    model.train()
    np.testing.assert_array_equal(model.model.embed_tokens(IDS).numpy(), before)
    add_noise(model, 5.0, single())
    ids = draw_ids(64, 25)
    paddle.seed(1)
    noise = (
        model.model.embed_tokens(ids)
        - model.model.embed_tokens.lookup(ids.flatten()).reshape([64, 25, 32])
    ).numpy()
    bound = 5 / np.sqrt(25 * 32)  # transformers' neftune_post_forward_hook
    assert 0.999 * bound < np.abs(noise).max() <= bound * (1 + 1e-6)
    assert noise.std() == pytest.approx(bound / np.sqrt(3), rel=0.01)
    assert abs(noise.mean()) < 0.01 * bound
    model.eval()
    np.testing.assert_array_equal(model.model.embed_tokens(IDS).numpy(), before)
