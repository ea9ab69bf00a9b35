"""Adapters over bases of few bits: gradients against NumPy in float64, merging, and what it loses.

The yardstick knows no quantized layer: it is a Llama in float64 on the widened numbers, with each
product already in its weight, and its derivatives are differences.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from common.errors import UserError
from llm.llama.adapters.base_record import BaseRecord, difference
from llm.llama.adapters.lora import LoRAConfig, LoRALinear, adapted
from llm.llama.build import load_model, save_model
from llm.llama.files.checkpoint import find_tensors
from llm.llama.files.dtypes import TYPES
from llm.llama.frozen import FrozenLinear, is_frozen
from llm.llama.merging import Loss, merge_lora, product_of
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.network import is_quantized, quantize_model, quantized_linears
from llm.llama.rope import inverse_frequencies
from llm.llama.saving import save_merged
from tests.parity.float64_llama import float64_logits
from tests.unit.llama.adapters.adapter_models import (
    TINY,
    base,
    draw_ids,
    gradients,
    logits,
    with_lora,
)

BASES = {
    "bfloat16": None,
    "W8": QuantConfig.of_type("W8"),
    "W4": QuantConfig.of_type("W4"),
    "W4 in groups": QuantConfig.of_type("W4", 8),
}
IDS = draw_ids(2, 11)


def opened(place, kind, *, tied=True, dtype="bfloat16", modes=None):
    """Return a network over a base of some type, read from files in float32, with an adapter."""
    config = TINY.replace(tie_word_embeddings=tied, attention_bias=not tied)
    if not (place / "config.json").exists():
        model = base(config)
        for one in model.parameters():
            if one.ndim == 1:
                one.set_value(paddle.rand(one.shape) + 0.5)
        save_model(model, place)
    options = {"frozen": True, "round_to": BASES[kind], "ops": modes}
    model = load_model(place, dtype=dtype, **options)
    return with_lora(model, LoRAConfig(r=4, lora_alpha=8))


def widened(model):
    """Return the numbers that a network stands for, float64, with its products beside them."""
    values, factors = {}, {}
    for name, one in model.named_parameters():
        if ".lora_" not in name:
            values[name.replace(".base.", ".")] = one.astype("float32").numpy().astype("float64")
    for name, layer in adapted(model).items():
        values[f"{name}.weight"] = layer.base.widened().numpy().T.astype("float64")
        factors[name] = [m.numpy().astype("float64") for m in (layer.lora_A, layer.lora_B)]
    return values, factors


def yardstick(config, values, factors, weights, scaling=2.0):
    """Return one number that depends on all logits, in float64."""

    merged = dict(values)
    for name, (a, b) in factors.items():
        merged[f"{name}.weight"] = values[f"{name}.weight"] + scaling * a @ b
    held = SimpleNamespace(config=config)
    held.named_parameters = lambda: (
        (n, SimpleNamespace(numpy=lambda v=v: v)) for n, v in merged.items()
    )
    ids = IDS.numpy()
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    frequencies = np.asarray(inverse_frequencies(config, ids.shape[1]))
    return float((float64_logits(held, ids, positions, frequencies) * weights).sum())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", list(BASES))
def test_gradients_against_float64(tmp_path, kind, tied):
    """Every matrix of the adapter, along a direction of its own; grouped-query attention."""
    model = opened(tmp_path, kind, tied=tied)
    assert is_quantized(model) == (kind != "bfloat16") and is_frozen(model)
    found = gradients(model, IDS)
    assert len(found) == 2 * 7 * TINY.num_hidden_layers
    values, factors = widened(model)
    rng = np.random.default_rng(5)
    weights = np.random.default_rng(9).standard_normal([*IDS.shape, TINY.vocab_size])
    weights = weights.astype(np.float32).astype(np.float64)
    for name, pair in factors.items():
        for index, which in enumerate(("lora_A", "lora_B")):
            direction = rng.standard_normal(pair[index].shape)
            sides = []
            for step in (1e-5, -1e-5):
                moved = list(pair)
                moved[index] = pair[index] + step * direction
                sides.append(yardstick(model.config, values, factors | {name: moved}, weights))
            exact = (sides[0] - sides[1]) / 2e-5
            got = float((found[f"{name}.{which}"] * direction).sum())
            size = np.linalg.norm(found[f"{name}.{which}"])
            assert got == pytest.approx(exact, abs=1e-4 * size), (name, which)


@pytest.mark.parametrize("kind", list(BASES))
def test_native_and_reference_agree(tmp_path, native_ops, kind):
    ours = opened(tmp_path, kind)
    plain = opened(tmp_path, kind, modes={"others": "reference"})
    labels = draw_ids(2, 11, seed=4).flatten()
    sums = []
    for model in (ours, plain):
        model.train()
        loss = model.token_losses(IDS, labels)[0].mean()
        loss.backward()
        sums.append((float(loss), {n: p.grad for n, p in model.named_parameters()}))
    assert sums[0][0] == pytest.approx(sums[1][0], rel=1e-6)
    for name, wanted in sums[1][1].items():
        if wanted is None:
            assert sums[0][1][name] is None
        else:
            near = {"rtol": 0, "atol": 2e-5 * float(wanted.abs().max())}
            np.testing.assert_allclose(sums[0][1][name].numpy(), wanted.numpy(), **near)


@pytest.mark.parametrize("kind", ["bfloat16", "W4 in groups"])
def test_recomputed_layers_give_the_same_bits(tmp_path, kind):
    kept = gradients(opened(tmp_path, kind), IDS)
    model = load_model(
        tmp_path, dtype="bfloat16", frozen=True, round_to=BASES[kind], recompute=True
    )
    again = gradients(with_lora(model, LoRAConfig(r=4, lora_alpha=8)), IDS)
    assert kept.keys() == again.keys()
    for name, value in kept.items():
        np.testing.assert_array_equal(again[name], value)


def test_what_is_read_is_what_rounding_the_network_gives(tmp_path):
    save_model(base(), tmp_path)
    read = load_model(tmp_path, round_to=BASES["W4 in groups"])
    wanted = quantize_model(base(), BASES["W4 in groups"])
    np.testing.assert_array_equal(logits(read, IDS), logits(wanted, IDS))
    with pytest.raises(UserError, match=r"holds integers already \(W4\)"):
        save_model(wanted, tmp_path / "rounded")
        load_model(tmp_path / "rounded", round_to=BASES["W8"])


@pytest.mark.parametrize("kind", list(BASES))
def test_merging_gives_the_function_that_was_trained(tmp_path, kind):
    model = opened(tmp_path, kind)
    wanted, parts = logits(model, IDS), dict(adapted(model))
    exact = {
        name: layer.base.widened().numpy().T + product_of(layer).numpy()
        for name, layer in parts.items()
    }
    merge_lora(model)
    np.testing.assert_allclose(logits(model, IDS), wanted, atol=2e-5)
    assert not is_frozen(model) and not is_quantized(model)
    assert not any(parameter.stop_gradient for parameter in model.parameters())
    held = dict(model.named_parameters())
    assert {str(one.dtype) for one in held.values()} == {"paddle.float32"}
    for name, value in exact.items():
        np.testing.assert_array_equal(held[f"{name}.weight"].numpy(), value)


class Silent:
    def save(self, directory):
        """Write no tokenizer."""


def test_merged_weights_as_integers_again_and_what_that_loses(tmp_path):
    model = opened(tmp_path / "base", "W4 in groups")
    products = {name: product_of(layer).numpy() for name, layer in adapted(model).items()}
    exact = {
        name: layer.base.widened().numpy() + products[name].T
        for name, layer in adapted(model).items()
    }
    said = []
    out = tmp_path / "out"
    save_merged(model, out, Silent(), "bfloat16", quantized=True, say=said.append)
    again = load_model(out)
    assert is_quantized(again)
    assert {t.dtype for n, t in find_tensors(out, TYPES).items() if "proj" not in n} == {"BF16"}
    change = {n: layer.widened().numpy() - exact[n] for n, layer in quantized_linears(again)}
    largest = max(np.abs(one).max() for one in change.values())

    def norm(arrays):
        return np.sqrt(sum(np.square(one, dtype="float64").sum() for one in arrays))

    share = norm(change.values()) / norm(exact.values())
    of_part = norm(change.values()) / norm(products.values())
    assert said == [
        f"merged weights rounded to W4: weights change by {largest:.3g} at most, by {share:.3%} of "
        f"their size and {of_part:.1%} of the adapter's part"
    ]
    with pytest.raises(UserError, match="quantize_merged: the base's weights are no integers"):
        save_merged(opened(tmp_path / "base", "bfloat16"), tmp_path / "x", Silent(), quantized=True)


def test_integers_that_no_adapter_touches_stay_and_others_keep_a_near_grid(tmp_path):
    """As GPTQ leaves them: grids that rounding to the nearest would not choose, and two widths."""
    model = base(TINY)
    wide = ("model.layers.0.self_attn.q_proj",)
    config = replace(QuantConfig.of_type("W4", 8, embedding_bits=8), wide=wide)
    for name, layer in quantized_linears(quantize_model(model, config)):
        if name not in wide:
            layer.fill(np.clip(layer.integers(), -8, 3), -layer.weight_scale.numpy())
    save_model(model, tmp_path / "base")
    lora = LoRAConfig(r=4, lora_alpha=8, target_modules=["v_proj"])
    model = with_lora(load_model(tmp_path / "base"), lora)
    for layer in adapted(model).values():
        layer.lora_B.set_value(layer.lora_B * 1e-3)
    said = []
    options = {"quantized": True, "say": said.append}
    save_merged(model, tmp_path / "out", Silent(), "bfloat16", **options)
    old = dict(quantized_linears(load_model(tmp_path / "base")))
    for name, layer in quantized_linears(load_model(tmp_path / "out")):
        np.testing.assert_array_equal(layer.weight_scale.numpy(), old[name].weight_scale.numpy())
        if "v_proj" not in name:
            np.testing.assert_array_equal(layer.integers(), old[name].integers())
    before, after = (find_tensors(tmp_path / one, TYPES) for one in ("base", "out"))
    for name in ("model.embed_tokens.weight", "model.embed_tokens.weight_scale"):
        np.testing.assert_array_equal(after[name].read(), before[name].read())
    assert said[0].startswith("merged weights rounded to W4: ")


def test_half_precision_loses_and_float32_does_not(tmp_path):
    said = []
    for dtype in (None, "float32", "bfloat16"):
        model = opened(tmp_path / "base", "W8")
        save_merged(model, tmp_path / str(dtype), Silent(), dtype, say=said.append)
    assert len(said) == 1 and said[0].startswith("merged weights stored in bfloat16: ")


def test_the_count_of_losses():
    loss = Loss("rounded")
    exact = paddle.to_tensor([3.0, 4.0])
    loss.add(exact, exact + paddle.to_tensor([0.0, 0.5]), paddle.to_tensor([0.0, 1.0]))
    assert loss.describe() == (
        "rounded: weights change by 0.5 at most, by 10.000% of their size and 50.0% of the "
        "adapter's part"
    )


def test_bases_that_differ_are_named():
    record = BaseRecord(BASES["W4 in groups"], "weight_only_int4")
    assert difference(record, BASES["W4 in groups"]) == "" == difference(None, None)
    assert difference(record, None).endswith("W4 in groups of 8, this one is not quantized")
    assert difference(record, BASES["W8"]).endswith("this one is W8")
    mixed = replace(BASES["W4 in groups"], wide=("a", "b"), embedding_bits=8)
    assert difference(record, mixed).endswith("groups of 8, 2 linears and the embedding in 8 bits")


def test_frozen_weights_lie_in_bfloat16_and_stay(tmp_path):
    model = opened(tmp_path, "bfloat16")
    before = {n: p.clone() for n, p in model.named_parameters() if p.stop_gradient}
    halves = {n for n, p in before.items() if p.dtype == paddle.bfloat16}
    assert halves and all(("proj" in n or "embed" in n) for n in halves)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, LoRALinear) and isinstance(layer.base, FrozenLinear)
    optimizer = paddle.optimizer.AdamW(1e-2, parameters=model.parameters())
    model.train()
    model.token_losses(IDS, IDS.flatten())[0].mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name in before:
            np.testing.assert_array_equal(
                parameter.astype("float32").numpy(), before[name].astype("float32").numpy()
            )
