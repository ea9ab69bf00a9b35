"""What others reach into the network through: all of it is declared, and enough for new kinds."""

import ast
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn

from llm.llama.build import build_model
from llm.llama.cache import new_caches
from llm.llama.config import PRESETS
from llm.llama.layers import Linear, is_plain
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.network import quantize_model
from llm.llama.quantization.qat import prepare_qat
from tests.unit.llama.adapters.adapter_models import with_lora

REPO = Path(__file__).resolve().parents[3]
TINY = PRESETS["tiny-random-llama"]
IDS = paddle.to_tensor(np.random.default_rng(0).integers(0, TINY.vocab_size, [2, 9]))
LABELS = IDS.flatten()
# Layers of the network that a packed one takes the place of, and a mark on a parameter.
ALLOWED = {
    *("model.lm_head", "model.model.norm", "model.model.embed_tokens"),
    *("model.model.embed_tokens.weight", "model.model.embed_tokens.weight.stage_shared"),
}


def set_from_outside(source: str) -> set[str]:
    """Return what a module sets on networks that it was given, but for seams."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in (t for one in targets for t in ast.walk(one)):
            if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store):
                path = ast.unparse(target)
                if path.split(".")[0] in ("model", "network"):
                    found.add(path)
    return {path for path in found if path.split(".")[-2] != "seams"}


@pytest.mark.parametrize("room", ["llm", "paddlenlp_ext"])
def test_nothing_but_seams_is_set_from_outside(room):
    files = sorted((REPO / room).rglob("*.py"))
    found = {str(f): set_from_outside(f.read_text("utf-8")) - ALLOWED for f in files}
    assert not {file: paths for file, paths in found.items() if paths}
    assert set_from_outside("model.ops = 1\nmodel.seams.prefix, network.shard = 2, 3\n") == {
        *("model.ops", "network.shard")
    }


def test_all_parts_of_a_network_share_its_seams():
    model = build_model(TINY, seed=0)
    layers = model.model.layers
    assert all(part.seams is model.seams for part in (model.model, *layers))
    calls = []

    def seen(layer, x, *others):
        calls.append(type(layer).__name__)
        return layer(x, *others)

    model.seams.run_layer = model.seams.run_attention = seen
    model(IDS)
    assert calls == ["LlamaDecoderLayer", "LlamaAttention"] * len(layers)


class Scaled(nn.Layer):
    """A kind of linear that the network has never seen: half of a weight's product, twice."""

    plain_weight = None

    def __init__(self, linear):
        super().__init__()
        self.part = self.create_parameter(linear.weight.shape)
        self.part.set_value(linear.weight / 2)

    def forward(self, x):
        return 2 * paddle.matmul(x, self.part)


class Counted(nn.Layer):
    """A kind of embedding that the network has never seen."""

    def __init__(self, embedding):
        super().__init__()
        self.weight, self.looked_up = embedding.weight, 0

    def forward(self, ids):
        return nn.functional.embedding(ids, self.weight)

    def lookup(self, ids_T):
        self.looked_up += len(ids_T)
        return paddle.gather(self.weight, ids_T)


def test_a_new_kind_of_linear_scores():
    model, other = build_model(TINY, seed=0), build_model(TINY, seed=0)
    other.lm_head = Scaled(other.lm_head)
    wanted, got = (m.token_losses(IDS, LABELS)[0].numpy() for m in (model, other))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    np.testing.assert_array_equal(other(IDS).numpy(), model(IDS).numpy())


def test_kernels_read_a_plain_weight_instead_of_calling_the_layer():
    class Uncalled(Linear):
        def forward(self, input):
            raise AssertionError("called")

    model = build_model(TINY, seed=0)
    wanted = model.token_losses(IDS, LABELS)[0].numpy()
    model.lm_head.__class__ = Uncalled
    np.testing.assert_array_equal(model.token_losses(IDS, LABELS)[0].numpy(), wanted)


def step_logits(model):
    """Return the logits of one packed step: a prompt of five tokens."""
    places = [np.zeros(5, np.int32), np.arange(5, dtype=np.int32), np.zeros([1, 1], np.int32)]
    step = [np.array([5, 6, 7, 5, 9]), *places, np.arange(5)]
    caches = new_caches(TINY, 1, 16, "float32")
    with paddle.no_grad():
        return model.forward_paged(*map(paddle.to_tensor, step), caches, 16).numpy()


def test_a_new_kind_of_embedding_steps():
    model = build_model(TINY, seed=0)
    wanted = step_logits(model)
    model.model.embed_tokens = Counted(model.model.embed_tokens)
    np.testing.assert_array_equal(step_logits(model), wanted)
    assert model.model.embed_tokens.looked_up == 5


def test_only_untouched_linears_are_plain():
    def plain(model):
        layers = dict(model.named_sublayers())
        return {n for n in layers if n.endswith("_proj") and is_plain(layers[n])}

    assert len(plain(build_model(TINY, seed=0))) == 7 * TINY.num_hidden_layers
    assert not plain(quantize_model(build_model(TINY, seed=0), QuantConfig.of_type("W8")))
    assert not plain(prepare_qat(build_model(TINY, seed=0), "W8"))
    assert not plain(with_lora())
    assert not is_plain(None) and not is_plain(nn.Embedding(2, 2))
