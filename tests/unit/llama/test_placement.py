"""The table of what each rank holds, against what the pieces have to add up to."""

import numpy as np
import pytest

from common.errors import UserError
from llm.llama.adapters.lora import LoRAConfig, add_lora
from llm.llama.adapters.prefix import PrefixConfig, add_prefix
from llm.llama.build import build_model
from llm.llama.config import load_config
from llm.llama.placement import is_matrix, split_axis, style

CONFIG = load_config("tiny-random-llama").replace(attention_bias=True, mlp_bias=True)


def test_every_parameter_of_the_network_is_in_the_table():
    networks = [build_model(CONFIG, seed=0) for _ in range(2)]
    add_lora(networks[0], LoRAConfig(target_modules="all-linear"), seed=0)
    add_prefix(networks[1], PrefixConfig(3, prefix_projection=True), seed=0)
    for network in networks:
        for name, parameter in network.named_parameters():
            axis = split_axis(name, transposed=False)
            assert (axis is None) == (style(name) == "replicated")
            assert axis is None or parameter.shape[axis] % 2 == 0, name


@pytest.mark.parametrize(
    ("name", "how", "network", "files"),
    [
        ("model.embed_tokens.weight", "vocab", 0, 0),
        ("lm_head.weight", "column", 1, 0),
        ("lm_head.base.weight", "column", 1, 0),
        ("model.norm.weight", "replicated", None, None),
        ("model.layers.7.input_layernorm.weight", "replicated", None, None),
        ("model.layers.7.self_attn.q_proj.weight", "column", 1, 0),
        ("model.layers.7.self_attn.k_proj.bias", "column", 0, 0),
        ("model.layers.7.self_attn.o_proj.weight", "row", 0, 1),
        ("model.layers.7.self_attn.o_proj.bias", "replicated", None, None),
        ("model.layers.7.mlp.down_proj.base.weight", "row", 0, 1),
        ("model.layers.7.mlp.down_proj.lora_A", "row", 0, 1),
        ("model.layers.7.mlp.down_proj.lora_B", "replicated", None, None),
        ("model.layers.7.mlp.down_proj.start_A", "row", 0, 1),
        ("model.layers.7.mlp.up_proj.start_B", "column", 1, 0),
        ("model.layers.7.mlp.up_proj.lora_magnitude_vector", "column", 0, 0),
        ("model.layers.7.mlp.down_proj.lora_magnitude_vector", "replicated", None, None),
        ("base_model.model.model.layers.7.mlp.up_proj.lora_A.weight", "replicated", None, None),
        ("base_model.model.model.layers.7.mlp.up_proj.lora_B.weight", "column", 1, 0),
        ("prefix.embedding.weight", "replicated", None, None),
        ("prompt_embeddings", "replicated", None, None),
        ("model.layers.3.self_attn.rotary_emb.inv_freq", "replicated", None, None),
    ],
)
def test_styles_and_axes(name, how, network, files):
    assert style(name) == how
    assert split_axis(name, transposed=False) == network
    assert split_axis(name, transposed=True) == files


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.mlp.up_proj.weight_scale",
        "model.layers.0.mlp.up_proj.weight_packed",
        "model.embed_tokens.lora_A",
        "weight",
    ],
)
def test_what_the_table_does_not_know_is_refused(name):
    with pytest.raises(UserError, match="is not in the plan of tensor parallelism"):
        style(name)


def test_pieces_of_a_pair_of_matrices_add_up():
    """Columns then rows: each rank's product is a term of the whole one, in either layout."""
    rng = np.random.default_rng(0)
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"]
    up, down = rng.standard_normal((6, 8)), rng.standard_normal((8, 6))
    x = rng.standard_normal((5, 6))
    for transposed in (False, True):
        stored = [m.T if transposed else m for m in (up, down)]
        axes = [split_axis(name, transposed=transposed) for name in names]
        pieces = [np.split(m, 4, axis) for m, axis in zip(stored, axes, strict=True)]
        total = 0
        for pair in zip(*pieces, strict=True):
            first, second = (m.T if transposed else m for m in pair)
            total = total + x @ first @ second
        np.testing.assert_allclose(total, x @ up @ down)


def test_transposed_are_the_matrices_of_linears():
    network = build_model(CONFIG, seed=0)
    for name, parameter in network.named_parameters():
        assert is_matrix(name) == (parameter.ndim == 2 and "embed" not in name)
