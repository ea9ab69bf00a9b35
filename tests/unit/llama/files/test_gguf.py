"""GGUF files of the ``gguf`` package: weights, configuration, networks; damaged ones refused."""

import dataclasses
import math
import struct

import numpy as np
import paddle
import pytest

from common.errors import UserError
from common.gguf import BLOCKS, read_gguf
from llm.llama.build import load_model
from llm.llama.config import PRESETS, load_config
from llm.llama.files.checkpoint import find_tensors, open_checkpoint
from llm.llama.files.conversion import convert
from tests.unit.llama.files.gguf_files import permuted, random_weights, write_gguf
from tests.unit.llama.files.models import SHAPES, as_arrays

# Rows of 256 numbers, which every type divides.
WIDE = PRESETS["tiny-random-llama"].replace(
    vocab_size=40, hidden_size=256, intermediate_size=256, num_hidden_layers=1
)
SMALL = SHAPES["llama-2-gqa"]


@pytest.mark.parametrize("kind", BLOCKS)
def test_numbers_of_every_type_are_those_of_the_package(kind, tmp_path):
    config = dataclasses.replace(WIDE, head_dim=64)
    weights = random_weights(config)
    wide = write_gguf(tmp_path / "model.gguf", config, weights, kind)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = find_tensors(tmp_path / "model.gguf")
    assert found.keys() == weights.keys()
    for name, tensor in found.items():
        values = tensor.read().astype(np.float32)
        count = next((n for inner, n in heads.items() if f".{inner}." in name), None)
        rows = values if count is None else permuted(values, count)
        np.testing.assert_array_equal(rows, wide[name], err_msg=name)
        if kind in ("F32", "F16", "BF16"):
            assert np.allclose(values, weights[name], rtol=1e-2, atol=1e-3), name
        part = (slice(1, 3),)
        np.testing.assert_array_equal(tensor.read(part), tensor.read()[part], err_msg=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_networks_compute_what_the_directory_s_do(shape, tmp_path):
    config = SHAPES[shape].replace(max_position_embeddings=64)
    weights = random_weights(config)
    metadata = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.bos_token_id": 1}
    extra = {}
    if config.rope_scaling.rope_type == "llama3":
        extra["rope_freqs.weight"] = _factors(config).astype(np.float32)
    write_gguf(tmp_path / "model.gguf", config, weights | extra, metadata=metadata)
    convert(open_checkpoint(tmp_path), tmp_path / "hf")  # by the directory's one file
    for name, values in as_arrays(tmp_path / "hf").items():
        assert values.tobytes() == weights[name].tobytes(), name
    ids = paddle.to_tensor(np.random.default_rng(0).integers(0, 96, [2, 20]))
    rows = []
    for place in (tmp_path / "model.gguf", tmp_path / "hf"):
        config_read = load_config(place)
        for field in ("rope_scaling", "rope_theta", "rms_norm_eps", "head_dim", "vocab_size"):
            assert getattr(config_read, field) == getattr(config, field), field
        with paddle.no_grad():
            rows.append(load_model(place).eval()(ids).numpy())
    assert rows[0].tobytes() == rows[1].tobytes()


def _factors(config):
    """What the paper's formula divides each frequency by, pair after pair."""
    scaling, factors = config.rope_scaling, []
    for pair in range(config.head_dim // 2):
        turns = scaling.original_max_position_embeddings / (
            2 * math.pi * config.rope_theta ** (2 * pair / config.head_dim)
        )
        if turns < scaling.low_freq_factor:
            factors.append(scaling.factor)
        elif turns > scaling.high_freq_factor:
            factors.append(1.0)
        else:
            kept = (turns - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            factors.append(1 / ((1 - kept) / scaling.factor + kept))
    return np.array(factors)


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The bytes of a good file, with a list of texts in it."""
    file = tmp_path_factory.mktemp("good") / "model.gguf"
    write_gguf(file, SMALL, random_weights(SMALL), metadata={"some.texts": ["one", "two"]})
    return file.read_bytes()


def _with(content, before, code, value, *, skip=0):
    """Overwrite the number that stands behind some bytes."""
    at = content.index(before) + len(before) + skip
    packed = struct.pack(f"<{code}", value)
    return content[:at] + packed + content[at + len(packed) :]


NORM = b"output_norm.weight"  # then: a count, a size, a type, an offset
DAMAGES = {
    "nothing": (lambda c: b"", "it has 0 bytes"),
    "another format": (lambda c: b"PK" + c[2:], "no GGUF file"),
    "git lfs": (lambda c: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "version 1": (lambda c: _with(c, b"GGUF", "I", 1), "versions 2 and 3 are read"),
    "version 9": (lambda c: _with(c, b"GGUF", "I", 9), "of version 9"),
    "big-endian": (lambda c: _with(c, b"GGUF", "I", 0x03000000), "big-endian"),
    "tensors": (lambda c: _with(c, b"GGUF", "Q", 1 << 40, skip=4), "states 1099511627776 tensors"),
    "one tensor more": (lambda c: _with(c, b"GGUF", "Q", 40, skip=4), "damaged|cut off"),
    "keys": (lambda c: _with(c, b"GGUF", "Q", 1 << 40, skip=12), "states 1099511627776 keys"),
    "a key's length": (lambda c: _with(c, b"GGUF", "Q", 1 << 62, skip=20), "too short"),
    "a list's length": (lambda c: _with(c, b"some.texts", "Q", 1 << 50, skip=8), "too short"),
    "a list's kind": (lambda c: _with(c, b"some.texts", "I", 9, skip=4), "array of the type 9"),
    "a value's kind": (lambda c: _with(c, b"some.texts", "I", 99), "unknown type 99"),
    "dimensions": (lambda c: _with(c, NORM, "I", 5), "has 5 dimensions"),
    "a size": (lambda c: _with(c, NORM, "Q", 1 << 40, skip=4), "cut off"),
    "no size": (lambda c: _with(c, NORM, "Q", 0, skip=4), "has shape"),
    "a type": (lambda c: _with(c, NORM, "I", 23, skip=12), "IQ4_XS.*llama-quantize"),
    "an unknown type": (lambda c: _with(c, NORM, "I", 777, skip=12), "number 777"),
    "an offset": (lambda c: _with(c, NORM, "Q", 1 << 40, skip=16), "cut off"),
    "off the grid": (lambda c: _with(c, NORM, "Q", 7, skip=16), "off the alignment"),
    "overlap": (lambda c: _with(c, NORM, "Q", 0, skip=16), "overlap"),
    "another model": (lambda c: c.replace(b"llama", b"gemma"), "'gemma' is not llama"),
    "cut": (lambda c: c[:-100], "cut off"),
    "cut in the header": (lambda c: c[:700], "damaged|cut off"),
    "a name twice": (lambda c: c.replace(b"blk.1.attn_q", b"blk.0.attn_q"), "stands twice"),
    "no UTF-8": (lambda c: c.replace(b"one", b"\xff\xfe\xfd"), "not UTF-8"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_refused_before_anything_is_written(name, content, tmp_path):
    change, said = DAMAGES[name]
    file = tmp_path / "bad.gguf"
    file.write_bytes(change(content))
    with pytest.raises(UserError, match=said):
        convert(open_checkpoint(file), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.gguf"]


def test_every_cut_of_the_header_is_an_error_of_ours(content, tmp_path):
    file = tmp_path / "cut.gguf"
    end = content.index(b"output_norm.weight")
    for size in range(0, end, 37):
        file.write_bytes(content[:size])
        with pytest.raises(UserError):
            read_gguf(file)


def test_architectures_and_parts_that_are_not_read(tmp_path):
    weights = random_weights(SMALL)
    for key, value, said in (
        ("llama.expert_count", 8, "expert_count=8"),
        ("llama.rope.scaling.factor", 2.0, None),
        ("split.count", 3, "llama-gguf-split --merge"),
        ("general.alignment", 12, "general.alignment"),
    ):
        write_gguf(tmp_path / "model.gguf", SMALL, weights, metadata={key: value})
        if said is None:
            load_config(tmp_path)
            continue
        with pytest.raises(UserError, match=said):
            load_config(tmp_path / "model.gguf")
    without = {name: values for name, values in weights.items() if "layers.2." not in name}
    write_gguf(tmp_path / "model.gguf", SMALL, without)
    with pytest.raises(UserError, match=r"lacks .*blk\.2"):
        open_checkpoint(tmp_path)
    (tmp_path / "second.gguf").write_bytes(b"")
    with pytest.raises(UserError, match="holds 2 GGUF files"):
        load_config(tmp_path)


def test_files_are_known_by_how_they_begin(content, tmp_path):
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(content)
    assert load_config(blob).vocab_size == SMALL.vocab_size
    assert len(find_tensors(blob)) == 39
    with pytest.raises(UserError, match=r"other\.gguf is not there"):
        load_config(tmp_path / "other.gguf")


def test_a_tokenizer_of_another_kind_keeps_no_weights_back(tmp_path, caplog):
    metadata = {"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a", "b"]}
    write_gguf(tmp_path / "model.gguf", SMALL, random_weights(SMALL), metadata=metadata)
    convert(open_checkpoint(tmp_path / "model.gguf"), tmp_path / "hf")
    assert "the tokenizer is not carried over" in caplog.text and "'bert'" in caplog.text
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_endings_may_be_capitals(content, tmp_path):
    (tmp_path / "MODEL.GGUF").write_bytes(content)
    for place in (tmp_path, tmp_path / "MODEL.GGUF"):
        assert load_config(place).hidden_size == SMALL.hidden_size
        assert len(find_tensors(place)) == 39
