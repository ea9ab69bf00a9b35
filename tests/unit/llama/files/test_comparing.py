"""The comparison of two checkpoints: silent on rounding, and it finds errors that were planted."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from llm.llama.files.checkpoint import open_checkpoint
from llm.llama.files.comparing import compare, report
from llm.llama.files.conversion import convert
from llm.llama.files.rank_layout import RankLayout
from tests.unit.llama.files.models import SHAPES, write_model

CONFIG = SHAPES["llama-2-gqa"]
LAYER = "model.layers.2"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("comparing") / "hf", CONFIG)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_rounding_is_no_difference(tmp_path, name, dtype):
    source = open_checkpoint(write_model(tmp_path / "hf", SHAPES[name]))
    convert(source, tmp_path / "ranks", layout=RankLayout(2, 2), dtype=dtype)
    found = compare(source, open_checkpoint(tmp_path / "ranks"))
    assert [d.place for d in found] == ["embedding", *(f"layer {n}" for n in range(4)), "logits"]
    assert report(found).count("\n") == 6
    assert max(d.error for d in found) < 1e-6


def swapped_head(tensors):
    """Exchange two query heads, as a wrong split does."""
    weight = tensors[f"{LAYER}.self_attn.q_proj.weight"].reshape(8, 6, 48)
    weight[[2, 5]] = weight[[5, 2]]


def transposed(tensors):
    """Transpose a square matrix, which no shape gives away."""
    name = f"{LAYER}.self_attn.o_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def swapped_gate(tensors):
    gate, up = (f"{LAYER}.mlp.{part}_proj.weight" for part in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def shifted_vocabulary(tensors):
    tensors["lm_head.weight"] = np.roll(tensors["lm_head.weight"], 1, axis=0)


def one_number(tensors):
    tensors["model.embed_tokens.weight"][:, 3] *= 1.01


PLANTED = {
    swapped_head: "layer 2",
    transposed: "layer 2",
    swapped_gate: "layer 2",
    shifted_vocabulary: "logits",
    one_number: "embedding",
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_planted_errors_are_found_where_they_are(source, tmp_path, plant):
    wrong = write_model(tmp_path / "wrong", CONFIG)
    tensors = load_file(wrong / "model.safetensors")
    plant(tensors)
    save_file(tensors, wrong / "model.safetensors")
    found = compare(open_checkpoint(source), open_checkpoint(wrong))
    assert [d.place for d in found if d.error] == [PLANTED[plant]]
    with pytest.raises(UserError, match=rf"{PLANTED[plant]} is off by .* of its size; rounding"):
        report(found)
