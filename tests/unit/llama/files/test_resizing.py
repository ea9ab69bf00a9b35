"""More rows for added tokens: the old ones as they were, the new ones their mean; then it opens."""

import json
import re

import numpy as np
import pytest

from common.errors import UserError
from common.flags import load
from llm.config.tools import ConvertArguments
from llm.engine.finding import find_weights
from llm.llama.config import load_config
from llm.llama.files.checkpoint import open_checkpoint
from llm.llama.files.conversion import convert
from llm.llama.files.rank_layout import EMBEDDING, HEAD, RankLayout
from llm.llama.files.resizing import resized
from tests.unit.llama.files.models import SHAPES, TYPES, as_arrays, write_model


def grown(source, target, size, **options):
    with resized(open_checkpoint(source), size) as larger:
        assert convert(larger, target, **options) == []
    return target


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", ["llama-2-gqa", "llama-3.2-tied"])
def test_rows_are_added_and_nothing_else_changes(tmp_path, shape, dtype):
    source = write_model(tmp_path / "hf", SHAPES[shape], dtype, files=2)
    before, after = as_arrays(source), as_arrays(grown(source, tmp_path / "new", 99))
    assert load_config(tmp_path / "new").vocab_size == 99
    assert before.keys() == after.keys()
    for name, values in before.items():
        if name not in (EMBEDDING, HEAD):
            assert values.tobytes() == after[name].tobytes()
            continue
        assert after[name].shape == (99, 48)
        assert after[name][:96].tobytes() == values.tobytes()
        mean = values.astype(np.float64).mean(axis=0).astype(np.float32).astype(values.dtype)
        for row in after[name][96:]:
            np.testing.assert_array_equal(row, mean)


def test_to_ranks_and_from_them(tmp_path):
    source = write_model(tmp_path / "hf", SHAPES["llama-2-gqa"])
    whole = as_arrays(grown(source, tmp_path / "whole", 100))
    ranks = grown(source, tmp_path / "ranks", 100, layout=RankLayout(2, 2))
    convert(open_checkpoint(ranks), tmp_path / "back")
    back = as_arrays(tmp_path / "back")
    convert(open_checkpoint(source), tmp_path / "cut", layout=RankLayout(2))
    from_ranks = as_arrays(grown(tmp_path / "cut", tmp_path / "joined", 100))
    for name, values in whole.items():
        assert values.tobytes() == back[name].tobytes(), name
        np.testing.assert_allclose(from_ranks[name], values, rtol=0, atol=1e-7, err_msg=name)


def test_rows_are_never_dropped(tmp_path):
    source = open_checkpoint(write_model(tmp_path / "hf", SHAPES["llama-2-gqa"]))
    with pytest.raises(UserError, match=r"vocab_size=95 would drop rows of .* has 96: give that"):
        resized(source, 95).__enter__()
    with resized(source, 96) as same:
        assert same is source
    words = ["--input_dir", "a", "--output_dir", "b", "--vocab_size", "99", "--check"]
    with pytest.raises(UserError, match="--check compares models of one size"):
        load((ConvertArguments,), words, prog="convert_checkpoint.py")


def test_the_command_that_is_named_makes_the_model_open(tmp_path):
    from data.tokenizer import load_tokenizer

    tiny = load_tokenizer("__internal_testing__/tiny-random-llama")
    shape = SHAPES["llama-2-gqa"].replace(vocab_size=tiny.vocab_size, pad_token_id=None)
    source = write_model(tmp_path / "model", shape)
    tiny.save(source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    first = tiny.vocab_size
    config["added_tokens_decoder"] |= {
        str(first): {"content": "<think>", "special": False},
        str(first + 1): {"content": "</think>", "special": False},
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no embedding for '<think>', '</think>'") as caught:
        find_weights(source)
    size = re.search(r"--vocab_size (\d+)`", str(caught.value))[1]
    found = find_weights(grown(source, tmp_path / "new", int(size)))
    assert found.config.vocab_size == found.tokenizer.vocab_size == first + 2
    assert found.tokenizer.encode("a<think>")[-1] == first
