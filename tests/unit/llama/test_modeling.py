"""Properties of the network that need no peer."""

import numpy as np
import paddle
import pytest

from common.errors import UserError
from llm.llama.build import build_model
from llm.llama.config import PRESETS, RopeScaling
from llm.llama.quant_config import QuantConfig
from llm.parallel.layout import Layout
from llm.parallel.topology import Topology

TINY = PRESETS["tiny-random-llama"].replace(
    vocab_size=50, hidden_size=32, intermediate_size=40, num_attention_heads=4, head_dim=8
)


def draw_ids(*shape):
    return paddle.to_tensor(np.random.default_rng(0).integers(0, TINY.vocab_size, shape))


@pytest.fixture(scope="module")
def model():
    network = build_model(TINY.replace(initializer_range=0.3), seed=3)
    network.eval()
    return network


def test_equal_seeds_draw_equal_weights():
    one, two, other = (build_model(TINY, seed=seed).state_dict() for seed in (5, 5, 6))
    for name, value in one.items():
        assert paddle.equal_all(value, two[name]), name
    assert not paddle.equal_all(one["lm_head.weight"], other["lm_head.weight"])
    assert float(one["lm_head.weight"].std()) == pytest.approx(0.02, rel=0.1)
    assert {float(value.min()) for name, value in one.items() if "norm" in name} == {1.0}


def test_a_weight_depends_on_seed_and_name_alone():
    small, large = (
        dict(build_model(TINY.replace(num_hidden_layers=n), seed=5).named_parameters())
        for n in (1, 3)
    )
    for name, value in small.items():
        assert paddle.equal_all(value, large[name]), name
    first, second = (large[f"model.layers.{n}.mlp.up_proj.weight"] for n in (0, 1))
    assert not paddle.isclose(first, second).any()


def test_drawing_leaves_the_generator_where_the_seed_puts_it():
    states = []
    for layers in (1, 2):
        build_model(TINY.replace(num_hidden_layers=layers), seed=5)
        states.append(paddle.rand([4]).numpy())
    np.testing.assert_array_equal(*states)
    paddle.seed(9)
    one = build_model(TINY)
    paddle.seed(9)
    two, three = build_model(TINY), build_model(TINY)
    assert paddle.equal_all(one.lm_head.weight, two.lm_head.weight)
    assert not paddle.equal_all(one.lm_head.weight, three.lm_head.weight)


def test_integer_weights_that_are_not_split():
    topology = Topology(Layout(tensor=2))
    described = QuantConfig.of_type("A8W8")
    with pytest.raises(UserError, match="tensor_parallel_degree=2 does not split integer weights"):
        build_model(TINY, quantization=described, topology=topology)
    for one, said in (
        (described, r"o_proj: A8W8 rounds all inputs of a token on one scale.* or W8 or W4"),
        (QuantConfig.of_type("W8", embedding_bits=8), "does not split an embedding of integers"),
        (QuantConfig.of_type("W4", 8), "down_proj: its inputs have 5 groups of scales; use a"),
    ):
        with pytest.raises(UserError, match=said):
            build_model(TINY, quantization=one, topology=topology, to_pack=True)


def test_parameters_carry_their_own_names(model):
    """Optimizer state is found again by these names in another process."""
    assert [p.name for p in model.parameters()] == [name for name, _ in model.named_parameters()]


def test_positions_only_count_relative_to_each_other(model):
    ids = draw_ids(2, 12)
    with paddle.no_grad():
        plain = model(ids).numpy()
        moved = model(ids, paddle.arange(12).unsqueeze(0) + 500).numpy()
    np.testing.assert_allclose(moved, plain, atol=5e-5)


def test_dynamic_scaling_follows_the_positions_in_use():
    """A row of later positions is scaled by them, not by its own length."""
    config = TINY.replace(
        max_position_embeddings=16, rope_scaling=RopeScaling("dynamic", factor=2.0)
    )
    scaled = build_model(config.replace(initializer_range=0.3), seed=3)
    unscaled = build_model(
        config.replace(initializer_range=0.3, rope_scaling=RopeScaling()), seed=3
    )
    ids = draw_ids(1, 12)
    with paddle.no_grad():
        near = [m(ids).numpy() for m in (scaled, unscaled)]
        far = [m(ids, paddle.arange(12).unsqueeze(0) + 40).numpy() for m in (scaled, unscaled)]
    np.testing.assert_array_equal(*near)
    assert np.abs(far[0] - far[1]).max() > 1e-3


def test_unknown_type_is_named():
    with pytest.raises(UserError, match="dtype='fp32' is not one of float32, bfloat16, float16"):
        build_model(TINY, dtype="fp32")
