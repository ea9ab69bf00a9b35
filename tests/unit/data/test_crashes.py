"""A library that ends its process without an exception: the document is named, by file and line."""

import faulthandler
import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from common.errors import DataError
from data.conversations import chat_encoding
from data.conversations.chat_encoding import ConversationEncoder, Named, encode_all
from data.corpus.prepare_worker import Worker
from data.crashes import find_crash
from data.prepare import prepare
from data.tokenizer import load_tokenizer

DEADLY = "DEADLY"


def die_of(item: tuple[str, int]) -> None:
    text, how = item
    if text == DEADLY:
        end(how) if how else os._exit(3)


def end(how: int) -> None:
    faulthandler.disable()  # pytest's would print where
    os.kill(os.getpid(), how)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (signal.SIGSEGV, "SIGSEGV"),
        (signal.SIGABRT, "SIGABRT"),
        (signal.SIGKILL, "SIGKILL"),
        (0, "status 3"),
    ],
)
def test_the_item_is_found(how: int, said: str) -> None:
    items = [("a", how), ("b", how), (DEADLY, how), (DEADLY, how)]
    assert find_crash(die_of, items, "fork") == (2, said)
    assert find_crash(die_of, items[:2], "fork") is None


@pytest.mark.parametrize("form", ["jsonl", "txt"])
def test_preparing_names_file_and_line(
    form: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Worker._encode

    def dying(self: Worker, texts: Sequence[str]) -> Any:
        if any(DEADLY in text for text in texts):
            end(signal.SIGSEGV)
        return encode(self, texts)

    monkeypatch.setattr(Worker, "_encode", dying)
    monkeypatch.setattr("data.prepare.piece_size", lambda total: 90)
    texts = [f"number {n}" for n in range(40)]
    texts[23] = DEADLY
    path = tmp_path / f"a.{form}"
    if form == "jsonl":
        path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    else:
        path.write_text("".join(f"{text}\n\n" for text in texts))
    words = ["--input", str(path), "--tokenizer", str(tiny_model), "--workers", "2"]
    words += ["--output_prefix", str(tmp_path / "out")]
    line = 24 if form == "jsonl" else 47
    with pytest.raises(DataError) as caught:
        prepare(words)
    assert f"{path}:{line}: the tokenizer ended its process (SIGSEGV)" in str(caught.value)
    # What the message says helps.
    path.write_text(path.read_text().replace(DEADLY, "number 23"))
    assert prepare([*words, "--overwrite"]).documents == 40


class Dying(ConversationEncoder):
    """Dies at one conversation, or once in a while as for want of memory."""

    def try_many(self, conversations: Sequence[Named], *, workers: int | None = None) -> Any:
        if any(DEADLY in named.messages[0]["content"] for named in conversations):
            end(signal.SIGABRT)
        return super().try_many(conversations, workers=workers)


def test_conversations_are_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # New interpreters take seconds.
    forking = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: forking)
    monkeypatch.setattr(chat_encoding, "GROUP", 2)
    monkeypatch.setattr(chat_encoding, "WORTH_A_PROCESS", 1)
    monkeypatch.setattr(chat_encoding, "available_cores", lambda: 2)
    encoder = Dying(load_tokenizer(tiny_model, chat_template="simple"))
    talks = [
        Named(f"a.jsonl:{n}", [{"role": "user", "content": DEADLY if n == 4 else "q"},
                               {"role": "assistant", "content": "a"}])
        for n in range(1, 7)
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"a\.jsonl:4: the tokenizer ended its process \(SIGABRT\)"):
        list(encode_all(encoder, talks))
