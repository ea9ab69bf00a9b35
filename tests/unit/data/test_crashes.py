"""A library that ends its process without an exception: the document is named, by file and line."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import time
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
from tests.unit.data.conftest import REPO

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


# Work of ten seconds and more for each of two processes, whose speed no machine changes; pieces and
# results are larger than what a pipe holds.
CONVERSATIONS = """
from data.conversations import chat_encoding
class Encoder:
    def try_many(self, conversations, workers):
        print("working", flush=True)
        time.sleep(0.002 * len(conversations))
        return [one.name * 1000 for one in conversations]
def main():
    chat_encoding.available_cores = lambda: 2
    turns = [{"role": "user", "content": "c" * 700}]
    list(chat_encoding.encode_all(Encoder(), [chat_encoding.Named("n", turns)] * 12000))
"""
TEXTS = """
from data.tokenization import batch
class Encoder:
    def encode(self, texts):
        print("working", flush=True)
        time.sleep(sum(map(len, texts)) / 2e6)
        return numpy.zeros(200000), numpy.ones(len(texts))
class Tokenizer:
    def packed_encoder(self, dtype, characters):
        return Encoder()
    def affixes(self, **_):
        return [], []
def main():
    batch.encode_batch(Tokenizer(), ["t" * 50000] * 800, workers=2)
"""
PROGRAM = """
import sys, time, numpy
from common.ending import run_script
{}
if __name__ == "__main__":
    run_script(main)
"""


@pytest.mark.parametrize("work", [CONVERSATIONS, TEXTS], ids=["conversations", "texts"])
def test_a_signal_waits_for_pieces_alone(work: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM.format(work))
    running = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    assert running.stdout.read(7) == "working"
    begin = time.monotonic()
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=60)[1]
    assert (running.returncode, said) == (128 + signal.SIGTERM, "")
    assert time.monotonic() - begin < 5
