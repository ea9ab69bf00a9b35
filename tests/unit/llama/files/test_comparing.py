"""The comparison of two checkpoints: silent on rounding, and it finds errors that were planted."""

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from data.tokenization.training import train_sentencepiece
from data.tokenizer import load_tokenizer
from llm.llama.files.checkpoint import open_checkpoint
from llm.llama.files.comparing import COSTS, compare, report
from llm.llama.files.conversion import convert
from llm.llama.files.gguf_writing import FILE_NAME, GGUFForm
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


def test_settings_are_compared_as_files_hold_them(tmp_path):
    """1e-05 read from a float32 and written as JSON is 9.999999747378752e-06."""
    near = CONFIG.replace(rms_norm_eps=float(np.float32(1e-5)))
    sides = [
        open_checkpoint(write_model(tmp_path / str(n), one))
        for n, one in enumerate((near, CONFIG.replace(rms_norm_eps=1e-5)))
    ]
    assert report(compare(*sides)).count("\n") == 6
    other = open_checkpoint(write_model(tmp_path / "other", CONFIG.replace(rms_norm_eps=2e-5)))
    with pytest.raises(UserError, match=r"rms_norm_eps is .* not the same model"):
        compare(sides[0], other)


def swapped_head(tensors):
    """Exchange two query heads, as a wrong split does."""
    weight = tensors[f"{LAYER}.self_attn.q_proj.weight"]
    weight = weight.reshape(8, -1, weight.shape[-1])
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


# Rounding that is looked at itself

WIDE = CONFIG.replace(vocab_size=512, hidden_size=256, intermediate_size=256, head_dim=32)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    root = tmp_path_factory.mktemp("wide")
    file = train_sentencepiece(
        [f"word{n} It is {n}" for n in range(300)], 290, root / "tokenizer.model"
    )
    return open_checkpoint(write_model(root / "hf", WIDE)), load_tokenizer(file)


def in_blocks(wide, tmp_path, kind):
    """A model in llama.cpp's blocks; those that we do not write are the package's."""
    source, tokenizer = wide
    form = GGUFForm(tokenizer, "small", None if kind == "F16" else "Q8_0")
    convert(source, tmp_path / "made", layout=form, dtype="float16" if kind == "F16" else None)
    if kind in ("F16", "Q8_0"):
        return open_checkpoint(tmp_path / "made")
    reader = gguf.GGUFReader(tmp_path / "made" / FILE_NAME)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        of = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_checkpoint(tmp_path / "other.gguf")


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q5_1", "Q4_0"])
def test_what_blocks_cost_is_said_and_within_its_limit(wide, tmp_path, kind):
    found = compare(wide[0], in_blocks(wide, tmp_path, kind))
    assert {one.dtype for one in found} == {kind}
    # Of numbers of one size some tenths of the limit are lost, and not next to nothing.
    assert all(COSTS[kind] / 200 < one.cost < COSTS[kind] / 3 for one in found)
    if kind in ("F16", "Q8_0"):
        assert max(one.error for one in found) < 1e-6
    else:
        assert [one.error for one in found] == [one.cost for one in found]
    lines = report(found).splitlines()
    assert all(f"{kind} costs" in line and f"of {COSTS[kind]:g} at most" in line for line in lines)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_planted_errors_are_found_below_the_rounding(wide, tmp_path, plant):
    wrong = write_model(tmp_path / "wrong", WIDE)
    tensors = load_file(wrong / "model.safetensors")
    plant(tensors)
    save_file(tensors, wrong / "model.safetensors")
    made = in_blocks((open_checkpoint(wrong), wide[1]), tmp_path, "Q8_0")
    with pytest.raises(UserError, match=rf"{PLANTED[plant]} is off by .* of its size; rounding"):
        report(compare(wide[0], made))


@pytest.mark.parametrize(("kind", "factor"), [("Q8_0", 1e-8), ("F16", 1e-8)])
def test_weights_that_a_type_has_no_numbers_for_are_refused(wide, tmp_path, kind, factor):
    small = write_model(tmp_path / "small", WIDE)
    tensors = load_file(small / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= factor
    save_file(tensors, small / "model.safetensors")
    source = open_checkpoint(small)
    found = compare(source, in_blocks((source, wide[1]), tmp_path, kind))
    with pytest.raises(UserError, match=rf"embedding is off by .*{kind} costs .* a wider one"):
        report(found)


def test_another_model_in_blocks_that_cannot_be_repeated_is_refused(wide, tmp_path):
    other = open_checkpoint(write_model(tmp_path / "other", WIDE, seed=1))
    with pytest.raises(UserError, match=r"Q4_0 costs 1 at most; it is of another model"):
        report(compare(other, in_blocks(wide, tmp_path, "Q4_0")))
