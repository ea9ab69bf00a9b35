"""Bad tokenizers and texts: each case with the message a user sees."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import DataError
from data.tokenization.batch import encode_batch
from data.tokenization.training import train_sentencepiece
from data.tokenizer import Tokenizer, load_tokenizer


def content(name: str, data: bytes) -> Callable[[Path, Path], Path]:
    def make(directory: Path, model: Path) -> Path:
        del model
        (directory / name).write_bytes(data)
        return directory / name

    return make


def cut(directory: Path, model: Path) -> Path:
    data = (model / "tokenizer.model").read_bytes()
    (directory / "tokenizer.model").write_bytes(data[: len(data) // 2])
    return directory


def with_config(name: str, value: object) -> Callable[[Path, Path], Path]:
    def make(directory: Path, model: Path) -> Path:
        (directory / "tokenizer.model").write_bytes((model / "tokenizer.model").read_bytes())
        text = value if isinstance(value, str) else json.dumps(value)
        (directory / name).write_text(text)
        return directory

    return make


TOKENIZER_CASES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "nothing there": (
        lambda d, _: d / "meta-llama" / "Llama-2-7b",
        r"no tokenizer at .*meta-llama/Llama-2-7b: it must be a local .* \(nothing is downloaded\)",
    ),
    "empty directory": (lambda d, _: d, "holds no tokenizer: none of tokenizer.model"),
    "empty file": (content("tokenizer.model", b""), "tokenizer.model is empty"),
    "git lfs pointer": (
        content("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n"),
        "is a Git LFS pointer",
    ),
    "some other file": (content("x.model", b"\x89PNG"), "is no tokenizer file: it begins with"),
    "sentencepiece cut off": (cut, "is not a sentencepiece model, or is damaged"),
    "tiktoken line": (
        content("t.model", b"IQ== 0\n!!! 1\n"),
        "t.model:2: expected a base64 token and its rank, got b'!!! 1'",
    ),
    "tiktoken ranks": (
        content("t.model", b"IQ== 0\nIg== 2\n"),
        "t.model:2: expected a new token with rank 1",
    ),
    "tiktoken cut off": (content("t.model", b"IQ== 0\nIg== 1\n"), "has no token for byte 0x00"),
    "tokenizer.json": (content("tokenizer.json", b'{"a": 1}'), "is not a tokenizer.json"),
    "config": (
        with_config("tokenizer_config.json", "{"),
        "tokenizer_config.json is not valid JSON",
    ),
    "config is a list": (with_config("tokenizer_config.json", []), "must hold a JSON object"),
    "added tokens": (
        with_config("tokenizer_config.json", {"added_tokens_decoder": {"x": 1}}),
        "added_tokens_decoder must look like",
    ),
    "added token of another model": (
        with_config("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": "<x>"}}}),
        "calls id 9 '<x>', the model file '<0x06>': the two do not belong together",
    ),
    "gap before added tokens": (
        with_config("tokenizer_config.json", {"added_tokens_decoder": {"705": {"content": "<x>"}}}),
        "adds tokens but none with id 700, right after the 700 pieces",
    ),
    "eos id": (
        with_config("generation_config.json", {"eos_token_id": ["a"]}),
        "token ids must be integers, got",
    ),
    "template": (with_config("chat_template.jinja", "{% if %}"), "not valid Jinja, line 1"),
}


@pytest.mark.parametrize("name", TOKENIZER_CASES)
def test_tokenizer_refuses(tmp_path: Path, tiny_model: Path, name: str) -> None:
    make, message = TOKENIZER_CASES[name]
    path = make(tmp_path, tiny_model)
    with pytest.raises(DataError, match=message):
        load_tokenizer(path).render_chat([{"role": "user", "content": "a"}])


TEXT_CASES: dict[str, tuple[Callable[[Tokenizer], object], str]] = {
    "bytes": (lambda t: t.encode(b"a"), "text must be a str, not bytes"),
    "lone surrogate": (lambda t: t.encode("ab\ud800"), r"lone surrogate U\+D800 at character 2"),
    "surrogate in a batch": (lambda t: encode_batch(t, ["a", "\udfff"]), r"U\+DFFF"),
    "no workers": (
        lambda t: encode_batch(t, ["a"], workers=0),
        "workers must be at least 1, got 0",
    ),
    "id too large": (lambda t: t.decode([700]), "token id 700 is not in the vocabulary of"),
    "negative id": (lambda t: t.stream().push(-1), "token id -1 is not in the vocabulary of"),
    "no template": (
        lambda t: t.apply_chat_template([{"role": "user", "content": "a"}]),
        "has no chat template: put a chat_template.jinja beside it, or ask",
    ),
}


@pytest.mark.parametrize("name", TEXT_CASES)
def test_text_is_refused(tiny: Tokenizer, name: str) -> None:
    call, message = TEXT_CASES[name]
    with pytest.raises(DataError, match=message):
        call(tiny)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages must be a list such as"),
        ([], "messages is empty"),
        (["hello"], r"messages\[0\] must be an object, not str"),
        ([{"content": "a"}], r'messages\[0\] needs a "role"'),
        (
            [{"role": "user", "content": 3}],
            r'messages\[0\] needs a "content" \(a string\), got int',
        ),
        ([{"role": "assistant", "content": "a"}], "turns must alternate user, assistant"),
    ],
)
def test_messages_are_refused(tiny_model: Path, messages: object, message: str) -> None:
    chat = load_tokenizer(tiny_model, chat_template="llama2")
    with pytest.raises(DataError, match=message):
        chat.apply_chat_template(messages)


def test_unknown_template_is_refused(tiny_model: Path) -> None:
    with pytest.raises(DataError, match="unknown chat template 'lama2': choose llama2, llama3"):
        load_tokenizer(tiny_model, chat_template="lama2")


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (["a b c"], 259, "vocab_size must be above 259"),
        ([], 300, "there is no text to train a tokenizer on"),
        ([" \n "], 300, "there is no text"),
        (["abc abc"], 4000, "a vocabulary of 4000 pieces cannot be trained on 1 lines of text"),
    ],
)
def test_training_refuses(tmp_path: Path, texts: list[str], size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_sentencepiece(texts, size, tmp_path / "tokenizer.model")
    assert list(tmp_path.iterdir()) == []
