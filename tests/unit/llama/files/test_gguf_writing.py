"""GGUF files of ours, read by the ``gguf`` package and back by ourselves."""

import gguf
import numpy as np
import pytest

from common.errors import UserError
from data.tokenization.training import train_sentencepiece
from data.tokenizer import load_tokenizer
from llm.llama.config import load_config
from llm.llama.files.checkpoint import open_checkpoint
from llm.llama.files.conversion import convert
from llm.llama.files.gguf_writing import FILE_NAME, GGUFForm
from tests.unit.data.hard_texts import HARD_CHARACTERS
from tests.unit.llama.files.gguf_files import permuted
from tests.unit.llama.files.models import SHAPES, as_arrays, write_model

CORPUS = [f"word{n} It's {n * n} times 你好 {n}" for n in range(300)]
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ROWS = 512


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return load_tokenizer(train_sentencepiece(CORPUS, 300, file))


def written(tmp_path, tokenizer, shape="llama-2-gqa", dtype="float32", blocks=None, **changes):
    """A directory converted to GGUF: the source and the file."""
    config = SHAPES[shape].replace(vocab_size=ROWS, **changes)
    source = write_model(tmp_path / "source", config, dtype)
    form = GGUFForm(tokenizer, "small", blocks)
    convert(open_checkpoint(source), tmp_path / "made", layout=form)
    return source, tmp_path / "made" / FILE_NAME


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", KINDS)
def test_the_package_reads_names_rows_and_types(shape, dtype, tmp_path, tokenizer):
    source, file = written(tmp_path, tokenizer, shape, dtype)
    config, weights = load_config(source), as_arrays(source)
    reader = gguf.GGUFReader(file)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, values in weights.items():
        count = next((n for inner, n in heads.items() if f".{inner}." in name), None)
        rows = values if count is None else permuted(values, count)
        found = theirs.pop(names.get_name(name, try_suffixes=(".weight", ".bias")))
        assert found.tensor_type.name == (KINDS[dtype] if values.ndim > 1 else "F32"), name
        wide = gguf.quants.dequantize(found.data, found.tensor_type).reshape(rows.shape)
        np.testing.assert_array_equal(wide, rows.astype(np.float32), err_msg=name)
    scaled = config.rope_scaling.rope_type == "llama3"
    assert list(theirs) == (["rope_freqs.weight"] if scaled else [])
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["llama.attention.head_count_kv"] == config.num_key_value_heads
    assert said["llama.rope.freq_base"] == config.rope_theta
    assert len(said["tokenizer.ggml.tokens"]) == ROWS == said["llama.vocab_size"]
    assert said["tokenizer.ggml.tokens"][-1] == f"[PAD{ROWS - 1}]"
    convert(open_checkpoint(file), tmp_path / "back", dtype=dtype)
    for name, values in as_arrays(tmp_path / "back").items():
        assert values.tobytes() == weights[name].tobytes(), name
    again = load_config(tmp_path / "back")
    assert again == config.replace(bos_token_id=1, eos_token_id=(2,), pad_token_id=None)


def test_blocks_are_those_of_the_package(tmp_path, tokenizer):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 8}
    source, file = written(tmp_path, tokenizer, blocks="Q8_0", **sizes)
    weights = as_arrays(source)
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name == "blk.1.ffn_down.weight":
            wanted = gguf.quants.quantize(
                weights["model.layers.1.mlp.down_proj.weight"], gguf.GGMLQuantizationType.Q8_0
            )
            assert tensor.data.tobytes() == wanted.tobytes()
        kinds = {1: "F32", 2: "Q8_0"}
        assert tensor.tensor_type.name == kinds[len(tensor.shape)], tensor.name


def test_tokenizer_and_template_come_back(tmp_path, tokenizer):
    _, file = written(tmp_path, tokenizer)
    again = load_tokenizer(file)
    for text in ["", " a  b", "".join(HARD_CHARACTERS), *CORPUS[:5]]:
        assert again.encode(text) == tokenizer.encode(text)
    assert (again.bos_id, again.eos_ids) == (tokenizer.bos_id, tokenizer.eos_ids)


def test_byte_level_tokenizers_come_back(tmp_path):
    built_in = load_tokenizer("__internal_testing__/tiny-random-llama")
    config = SHAPES["llama-2-gqa"].replace(vocab_size=built_in.vocab_size)
    source = write_model(tmp_path / "source", config)
    convert(open_checkpoint(source), tmp_path / "made", layout=GGUFForm(built_in, "small"))
    again = load_tokenizer(tmp_path / "made")
    for text in ["", " a  b", "".join(HARD_CHARACTERS), *CORPUS[:5]]:
        assert again.encode(text) == built_in.encode(text)
    assert again.chat_template == built_in.chat_template
    assert again.special.ids == built_in.special.ids


def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"blocks of 32 numbers.*48 columns.*--dtype float16"):
        written(tmp_path, tokenizer, blocks="Q8_0")
    assert not (tmp_path / "made").exists()
    small = write_model(tmp_path / "small", SHAPES["llama-2-gqa"])
    with pytest.raises(UserError, match="300"):
        convert(open_checkpoint(small), tmp_path / "made", layout=GGUFForm(tokenizer, "x"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small", "source"]
