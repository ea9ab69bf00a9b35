"""Prepared instruction data: equal to encoding on the fly, and refused where it does not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import status

from common.errors import DataError
from data.conversations.instruct import Example, read_examples
from data.conversations.instruct_dataset import InstructDataset, Limits
from data.conversations.instruct_store import (
    StoredExamples,
    labels_prefix,
    open_instruct,
    write_instruct_store,
)
from data.corpus.pretrain_dataset import build_pretrain_datasets
from data.corpus.token_store import find_stores
from data.prepare import main as prepare_main
from data.tokenizer import load_tokenizer

GOOD = '{"src": "q", "tgt": "a"}\n'


def talk(*turns: str) -> Example:
    """Turns of user and assistant in alternation."""
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(turns)
    ]
    return Example(tuple(messages), (turns[-1],), "here:1")


SHORT = talk("Who are you?", "A llama.")
LONG = talk("Hi", "Hello there.", "Who are you?", "A llama\nfrom Peru.", "Bye", "See you!")


@pytest.mark.parametrize("layout", ["bin", "npy"])
def test_store_equals_encoding_on_the_fly(
    layout: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        {"messages": list(example.messages), "answers": ["Llama", "a llama"]}
        for example in (SHORT, LONG, talk("Hi", "Hello."))
    ]
    source = tmp_path / "a.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    source.write_text("\n".join([*lines, '{"messages": 1}']))
    arguments = ["--task", "instruct", "--input", str(source), "--tokenizer", str(tiny_model)]
    arguments += ["--chat_template", "simple", "--src_length", "60", "--on_long", "truncate"]
    arguments += ["--on_bad_line", "skip", "--output_prefix", str(tmp_path / "out" / "made")]
    assert status(prepare_main, [*arguments, "--format", layout]) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 bad records were left out, listed in ")
    bad = (tmp_path / "out" / "made.bad_lines.txt").read_text()
    assert bad == f"{source}:4: 'messages' must be a list, not int\n"
    tokenizer = load_tokenizer(tiny_model, chat_template="simple")
    fly = open_instruct(
        source, tokenizer, src_length=60, on_long="truncate", on_bad="skip", raw=True
    )
    store = open_instruct(tmp_path / "out" / "made", tokenizer)
    assert isinstance(store.examples, StoredExamples) and len(store) == len(fly) == 3
    assert f"3 examples, {fly.lengths.sum() + 3} tokens" in said
    for index in range(3):
        for key in ("input_ids", "labels"):
            assert np.array_equal(store[index][key], fly[index][key])
            assert store[index][key].dtype == np.int64
        assert store.prompt_ids(index) == fly.prompt_ids(index)
        assert store.answers(index) == fly.answers(index) == ("Llama", "a llama")
    assert list(store.examples) == list(fly.examples)
    assert np.array_equal(store.lengths, fly.lengths)
    assert np.array_equal(store.label_counts, fly.label_counts)
    assert store.fingerprint() == fly.fingerprint()
    # Making it again needs a word, and then gives the same.
    assert status(prepare_main, [*arguments, "--format", layout]) == 2
    assert status(prepare_main, [*arguments, "--format", layout, "--overwrite"]) == 0
    assert open_instruct(tmp_path / "out" / "made", tokenizer).fingerprint() == fly.fingerprint()


def test_a_write_broken_off_leaves_no_store(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(tiny_model, chat_template="simple")
    dataset = InstructDataset.from_examples([SHORT, LONG], tokenizer)
    place = write_instruct_store(tmp_path / "made", dataset, Limits())
    assert open_instruct(place, tokenizer).fingerprint() == dataset.fingerprint()
    expected = dataset.fingerprint()
    calls = 0

    def failing(index: int) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise KeyboardInterrupt
        return InstructDataset.document(dataset, index)

    monkeypatch.setattr(dataset, "document", failing)
    with pytest.raises(KeyboardInterrupt):
        write_instruct_store(tmp_path / "other", dataset, Limits())
    with pytest.raises(ValueError, match=r"is there but|no token store"):
        open_instruct(tmp_path / "other", tokenizer, raw=False)
    # An older store stays until the new one is whole.
    calls = 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        write_instruct_store(place, dataset, Limits())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert open_instruct(place, tokenizer).fingerprint() == expected


@pytest.fixture
def store(tiny_model: Path, tmp_path: Path) -> Path:
    """A store of two examples, made with the template simple and src_length 100."""
    tokenizer = load_tokenizer(tiny_model, chat_template="simple")
    path = tmp_path / "a.jsonl"
    path.write_text(2 * GOOD)
    limits = Limits(src_length=100)
    dataset = InstructDataset.from_examples(read_examples([path]), tokenizer, limits=limits)
    return write_instruct_store(tmp_path / "made", dataset, limits)


def _edit_meta(store: Path, **changes: Any) -> None:
    path = store.with_name("made.meta.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another tokenizer": (
        lambda s: _edit_meta(s, tokenizer_fingerprint="0"),
        "was made with another tokenizer (tokenizer.model) than sentencepiece model",
    ),
    "another template": (
        lambda s: _edit_meta(s, chat_template="{{ 1 }}"),
        "was made with another chat template than",
    ),
    "for pretraining": (lambda s: _edit_meta(s, task=None), "holds text for pretraining"),
    "labels missing": (
        lambda s: s.with_name("made.labels.idx").unlink(),
        "made.labels.bin is there but",
    ),
    "examples missing": (
        lambda s: s.with_name("made.examples.jsonl").unlink(),
        "made.examples.jsonl is missing",
    ),
    "tokens cut": (
        lambda s: s.with_name("made.bin").write_bytes(b"\0\0"),
        "made.bin has 2 bytes, but",
    ),
}


@pytest.mark.parametrize("case", BREAKS)
def test_stores(case: str, store: Path, tiny_model: Path) -> None:
    change, message = BREAKS[case]
    change(store)
    with pytest.raises(DataError) as caught:
        open_instruct(store, load_tokenizer(tiny_model, chat_template="simple"))
    assert message in str(caught.value)


def test_no_pretraining_on_examples(store: Path, tmp_path: Path) -> None:
    for prefix, what in ((store, "ids"), (labels_prefix(store), "labels")):
        with pytest.raises(DataError, match=f"holds {what} of examples for finetuning, not text"):
            build_pretrain_datasets(prefix, seq_length=2, num_samples=(1, 0, 0))
    assert find_stores(tmp_path) == [store]


def test_stores_of_other_runs(store: Path, tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model, chat_template="simple")
    with pytest.raises(DataError, match="was made with src_length=100, not 50: leave src_length"):
        open_instruct(store, tokenizer, src_length=50)
    with pytest.raises(DataError, match="is a prepared store, not a file of examples: raw=False"):
        open_instruct(store, tokenizer, raw=True)
    with pytest.raises(DataError, match=r"a\.jsonl is a file of examples, not the prefix"):
        open_instruct(tmp_path / "a.jsonl", tokenizer, raw=False)
    with pytest.raises(DataError, match=r"no token store at .*nothing"):
        open_instruct(tmp_path / "nothing", tokenizer, raw=False)
    with pytest.raises(DataError, match="one store is opened at a time, not 2"):
        open_instruct([store, store], tokenizer)
    dataset = open_instruct(store, tokenizer, src_length=100)
    examples = store.with_name("made.examples.jsonl")
    examples.write_text(examples.read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match="holds 1 examples, the store 2"):
        dataset.answers(0)
    one = InstructDataset.from_examples(
        read_examples([tmp_path / "a.jsonl"])[:1], tokenizer, limits=Limits()
    )
    write_instruct_store(tmp_path / "other", one, Limits())
    for part in ("bin", "idx"):
        (tmp_path / f"other.labels.{part}").replace(f"{labels_prefix(store)}.{part}")
    with pytest.raises(DataError, match="does not describe the examples of"):
        open_instruct(store, tokenizer)
