"""BOS before a text: what files say, and what a flag says instead."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

from common.errors import DataError
from common.flags import load
from data.tokenizer import BUILT_IN_TOKENIZERS, load_tokenizer
from llm.config.scripts import SCRIPTS
from llm.engine.finding import find_model

TINY = "__internal_testing__/tiny-random-llama"


@pytest.fixture
def directory(tmp_path: Path):
    """Make the built-in tokenizer, whose configuration says more."""

    def make(**said: object) -> Path:
        place = tmp_path / f"made-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(BUILT_IN_TOKENIZERS[TINY], place)
        file = place / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | said))
        return place

    return make


@pytest.mark.parametrize(
    ("said", "flag", "adds"),
    [
        ({}, None, True),
        ({"add_bos_token": True}, None, True),
        ({"add_bos_token": False}, None, False),
        ({"add_bos_token": None}, None, True),
        ({}, False, False),
        ({"add_bos_token": True}, False, False),
        ({"add_bos_token": False}, True, True),
    ],
)
def test_the_flag_goes_before_the_files(directory, tmp_path, said, flag, adds) -> None:
    tokenizer = load_tokenizer(directory(**said), add_bos_token=flag)
    plain = tokenizer.encode("Hello")
    assert tokenizer.encode_prompt("Hello") == ([tokenizer.bos_id] if adds else []) + plain
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode_prompt("Hello") == tokenizer.encode_prompt("Hello")
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").adds_bos is adds


def test_an_empty_prompt_needs_one(directory) -> None:
    assert len(load_tokenizer(TINY).encode_prompt("")) == 1
    with pytest.raises(DataError, match="the prompt is empty and no BOS token stands before it"):
        load_tokenizer(TINY, add_bos_token=False).encode_prompt("")


def test_a_bos_that_is_not_there(directory) -> None:
    place = directory(bos_token=None, add_bos_token=True)
    tokenizer = load_tokenizer(place)
    if tokenizer.bos_id is None:
        with pytest.raises(DataError, match="has no BOS token; leave the flag out, or name one"):
            load_tokenizer(place, add_bos_token=True)


@pytest.mark.parametrize("script", ["predict_generation.py", "server.py", "evaluate_generation.py"])
def test_scripts_open_models_with_the_flag(script: str) -> None:
    more = {
        "server.py": ["--no_ui"],
        "evaluate_generation.py": ["--task", "perplexity", "--data_file", "f"],
    }.get(script, [])
    for words, adds in ([], True), (["--add_bos_token", "false"], False):
        groups = load(SCRIPTS[script], ["--model_path", TINY, *more, *words], prog=script)
        place = next(group for group in groups if hasattr(group, "add_bos_token"))
        assert find_model(place).tokenizer.adds_bos is adds
