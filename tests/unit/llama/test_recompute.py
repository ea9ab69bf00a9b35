"""Recomputed activations: same bits, fewer activations, whatever is recomputed."""

import logging

import numpy as np
import paddle
import pytest

from common.errors import UserError
from llm.llama.adapters.lora import LoRAConfig
from llm.llama.recompute import GRANULARITIES, recompute_layers
from tests.unit.llama.adapters.adapter_models import (
    base,
    draw_ids,
    gradients,
    with_lora,
    with_prefix,
)

IDS = draw_ids(3, 12)
SEGMENTS = paddle.to_tensor(np.tile(np.arange(12) // 5, (3, 1)))
POSITIONS = paddle.to_tensor(np.tile(np.arange(12) % 5, (3, 1)))
DROPOUT = LoRAConfig(r=4, lora_dropout=0.4)


def tiled():
    return base(use_flash_attention=True)


NETWORKS = {
    "whole network": tiled,
    "adapters with dropout": lambda: with_lora(tiled(), DROPOUT),
    "adapters of one layer": lambda: with_lora(
        tiled(), LoRAConfig(r=2, target_modules=".*layers.1.*down_proj")
    ),
    "prefix": lambda: with_prefix(4, model=tiled()),
}


def results(make, **options):
    """Gradients of a training step whose dropout starts from one seed."""
    model = make()
    if options:
        recompute_layers(model, **options)
    paddle.seed(11)
    return gradients(model, IDS, POSITIONS, SEGMENTS)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_not_a_bit_changes(granularity, network):
    wanted = results(NETWORKS[network])
    assert wanted
    for options in ({}, {"num_layers": 1}, {"offload": True}):
        got = results(NETWORKS[network], granularity=granularity, **options)
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_array_equal(got[name], value, err_msg=f"{name} {options}")


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_plain_attention_changes_by_rounding_at_most(granularity):
    """The gradients of queries, keys and values may add up in another order."""
    wanted, got = results(base), results(base, granularity=granularity)
    for name, value in wanted.items():
        limit = 0 if granularity != "core_attn" else 1e-6 * np.abs(value).max()
        assert np.abs(got[name] - value).max() <= limit, name


def test_dropout_matters_to_this_test():
    make = NETWORKS["adapters with dropout"]
    other = make()
    paddle.seed(12)
    changed = gradients(other, IDS, POSITIONS, SEGMENTS)
    assert any((changed[name] != value).any() for name, value in results(make).items())


def calls(granularity, num_layers=None, training=True):
    """How often a step calls the layers, their attention and attention itself."""
    model = base()
    counts = {"layer": [0, 0], "attention": [0, 0], "core": 0}
    for number, layer in enumerate(model.model.layers):
        for name, part in (("layer", layer), ("attention", layer.self_attn)):

            def hook(*_, name=name, number=number):
                counts[name][number] += 1

            part.register_forward_post_hook(hook)
    inner = model.seams.attention

    def counted(*inputs):
        counts["core"] += 1
        return inner(*inputs)

    model.seams.attention = counted
    recompute_layers(model, granularity=granularity, num_layers=num_layers)
    if training:
        model.train()
        model(IDS).sum().backward()
    else:
        model.eval()
        model(IDS)
    return counts


def test_what_runs_twice():
    assert calls("full") == {"layer": [2, 2], "attention": [2, 2], "core": 4}
    assert calls("full_attn") == {"layer": [1, 1], "attention": [2, 2], "core": 4}
    assert calls("core_attn") == {"layer": [1, 1], "attention": [1, 1], "core": 4}
    assert calls("full", 1) == {"layer": [2, 1], "attention": [2, 1], "core": 3}
    assert calls("full_attn", 1) == {"layer": [1, 1], "attention": [2, 1], "core": 3}
    assert calls("core_attn", 1) == {"layer": [1, 1], "attention": [1, 1], "core": 3}
    assert calls("full", training=False)["layer"] == [1, 1]


def test_offloading_on_cpu_says_that_it_is_a_rehearsal(caplog):
    with caplog.at_level(logging.INFO):
        recompute_layers(base(), offload=True)
    assert "rehearsal" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "half"}, "'half' is not one of full, full_attn, core_attn"),
        ({"num_layers": 3}, "recompute_num_layers=3 has to be between 1 and the model's 2 layers"),
        ({"num_layers": 0}, "recompute_num_layers=0"),
    ],
)
def test_refused(options, message):
    with pytest.raises(UserError, match=message):
        recompute_layers(base(), **options)
