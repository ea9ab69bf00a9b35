"""Tokenizers that do not belong to a model, a store or an export: one check, whoever asks."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data.conversations.instruct import Example
from data.conversations.instruct_dataset import InstructDataset, Limits
from data.conversations.instruct_store import open_instruct_store, write_instruct_store
from data.corpus.token_store import TokenStore
from data.corpus.token_store_writer import TokenStoreWriter
from data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from llm.llama.config import load_config
from llm.llama.manifest import Manifest
from llm.train.checks import check_tokenizer

TINY = "__internal_testing__/tiny-random-llama"


@pytest.mark.parametrize("check", ["data", "train"])
def test_both_sizes_are_named(check: str, tiny: Tokenizer) -> None:
    def fits(size: int) -> None:
        if check == "data":
            check_vocabulary(tiny, size)
        else:
            assert check_tokenizer(tiny, load_config(TINY).replace(vocab_size=size)) is tiny

    fits(700)
    with pytest.raises(UserError) as caught:
        fits(699)
    assert str(caught.value) == (
        f"the tokenizer {tiny.name} has 700 tokens, the model's vocab_size is 699; give the "
        "model's own with --tokenizer_name_or_path"
    )


def with_config(model: Path, directory: Path, config: dict[str, object]) -> Tokenizer:
    (directory / "tokenizer.model").write_bytes((model / "tokenizer.model").read_bytes())
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(directory, chat_template="{{ pad_token }}<s>[PAD]{{ eos_token }}")


@pytest.mark.parametrize("way", ["named", "declared"])
def test_a_pad_token_beyond_the_model_is_left_out(
    way: str, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pad = {"content": "[PAD]", "special": True}
    config: dict[str, object] = {"pad_token": "[PAD]"}
    if way == "declared":
        config["added_tokens_decoder"] = {"700": pad}
    tokenizer = with_config(tiny_model, tmp_path, config)
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (701, 700)
    check_vocabulary(tokenizer, 701)
    check_vocabulary(tokenizer, 700)
    assert (
        "has a pad token with id 700, the model's vocab_size is 700: it is left out" in caplog.text
    )
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (700, None)
    # Its text is characters now, wherever it stands.
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a"}])
    assert max(ids) < 700
    with pytest.raises(UserError, match="token id 700 is not in the vocabulary"):
        tokenizer.encode("[PAD]", allow_special=True)
    assert pickle.loads(pickle.dumps(tokenizer)).vocab_size == 700
    # What is saved has it still, and fits as before.
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.pad_id == 700
    assert check_tokenizer(again, load_config(TINY).replace(vocab_size=700)).pad_id is None


def test_other_tokens_beyond_the_model_are_named(tiny_model: Path, tmp_path: Path) -> None:
    config: dict[str, object] = {
        "pad_token": "[PAD]",
        "added_tokens_decoder": {"700": {"content": "<think>"}, "701": {"content": "[PAD]"}},
    }
    tokenizer = with_config(tiny_model, tmp_path, config)
    message = (
        r"has 702 tokens, the model's vocab_size is 700, so it has no embedding for '<think>', "
        r"'\[PAD\]'; make some with .*--vocab_size 702` and give NEW, or give the model's own"
    )
    with pytest.raises(UserError, match=message):
        check_vocabulary(tokenizer, 700)


def corpus(root: Path, maker: Tokenizer) -> Callable[[Tokenizer], object]:
    meta = {"tokenizer": maker.source.name, "tokenizer_fingerprint": maker.fingerprint}
    with TokenStoreWriter(root / "made", np.uint16, meta=meta) as writer:
        writer.add_document([1, 2, 3])
    store = TokenStore.open(root / "made")
    return lambda given: store.check_vocab(4, fingerprint=given.fingerprint)


def examples(root: Path, maker: Tokenizer) -> Callable[[Tokenizer], object]:
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    example = Example(turns, ("b",), "a.jsonl:1")
    write_instruct_store(root / "made", InstructDataset.from_examples([example], maker), Limits())
    return lambda given: open_instruct_store(root / "made", given)


def export(root: Path, maker: Tokenizer) -> Callable[[Tokenizer], object]:
    manifest = Manifest("made", {}, 16, 64, "float32", (2,), maker.fingerprint, "3.0")
    manifest.save(root / "made.manifest.json")
    assert json.loads((root / "made.manifest.json").read_text())["model_name"] == "made"
    return lambda given: manifest.check_tokenizer(given.name, given.fingerprint)


@pytest.mark.parametrize("make", [corpus, examples, export])
def test_another_tokenizer_is_named(
    make: Callable[[Path, Tokenizer], Callable[[Tokenizer], object]],
    tmp_path: Path,
    tiny_model: Path,
) -> None:
    maker = load_tokenizer(tiny_model, chat_template="simple")
    check = make(tmp_path, maker)
    check(maker)
    message = r"made was (made|exported) with another tokenizer \(.+: use that one, or (prep|expo)"
    with pytest.raises(UserError, match=message):
        check(load_tokenizer(TINY, chat_template="simple"))


def test_a_store_knows_the_template_for_tools(tmp_path: Path, tiny_model: Path) -> None:
    maker = load_tokenizer(tiny_model, chat_template="simple")
    check = examples(tmp_path, maker)
    check(maker)
    maker.templates = {**maker.templates, "tool_use": "{{ 'T' }}"}
    with pytest.raises(UserError, match="made was made with another chat template"):
        check(maker)
