"""Prompts of pairs stand once, pairs differ as ids, and bad records are left out on demand."""

import re
from pathlib import Path
from typing import Any

import pytest

from common.errors import DataError
from data.conversations.instruct import OnBad
from data.conversations.instruct_dataset import InstructDataset, Limits
from data.conversations.instruct_store import (
    open_instruct,
    write_instruct_store,
)
from data.conversations.preference import PreferenceDataset, read_pairs
from data.prepare import main as prepare_main
from data.tokenizer import Tokenizer, load_tokenizer
from tests.unit.data.commands import status
from tests.unit.data.records import ASK, CALL, SIMPLE, TOOLS, W, answer, write


@pytest.fixture
def chat(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model, chat_template=TOOLS)


ANSWERS = ("Hi there", "Go away")
SYSTEM = {"role": "system", "content": "Be kind."}
HELLO = {"role": "user", "content": "Hello"}
EARLIER = [{"role": "user", "content": "Hey"}, answer("Yes?")]
# The record but for its answers; what stands before them in both; the prompt once.
REPEATED: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {
    "system beside": ({"system": "Be kind.", "prompt": [HELLO]}, [HELLO], [SYSTEM, HELLO]),
    "system in the prompt": ({"prompt": [SYSTEM, HELLO]}, [HELLO], [SYSTEM, HELLO]),
    "system in the answers": ({"prompt": [HELLO]}, [SYSTEM, HELLO], [SYSTEM, HELLO]),
    "system everywhere": (
        {"system": "Be kind. ", "prompt": [HELLO]},
        [SYSTEM, HELLO],
        [{**SYSTEM, "content": "Be kind. "}, HELLO],
    ),
    "space": ({"prompt": "Hello "}, [HELLO], [{**HELLO, "content": "Hello "}]),
    "the last turn": ({"prompt": [*EARLIER, HELLO]}, [HELLO], [*EARLIER, HELLO]),
    "all turns": ({"prompt": [*EARLIER, HELLO]}, [*EARLIER, HELLO], [*EARLIER, HELLO]),
    "answers only": ({"prompt": [*EARLIER, HELLO]}, [], [*EARLIER, HELLO]),
    "system is all": ({"prompt": [SYSTEM]}, [SYSTEM, HELLO], [SYSTEM, HELLO]),
}


@pytest.mark.parametrize("case", REPEATED)
def test_a_repeated_prompt_stands_once(case: str, tmp_path: Path) -> None:
    record, before, once = REPEATED[case]
    good, bad = ([*before, answer(text)] for text in ANSWERS)
    path = write(tmp_path / "a.jsonl", {**record, "chosen": good, "rejected": bad})
    (pair,) = read_pairs([path])
    assert list(pair.chosen) == [*once, answer(ANSWERS[0])]
    assert list(pair.rejected) == [*once, answer(ANSWERS[1])]


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ([{"role": "user", "content": "Other"}], "user's turn that is not the prompt's last one"),
        (
            [{**SYSTEM, "content": "Be rude."}, HELLO],
            "it has two system messages, 'Be kind.' and 'Be rude.'",
        ),
    ],
)
def test_another_prompt_is_refused(before: list[Any], message: str, tmp_path: Path) -> None:
    good, bad = ([*before, answer(text)] for text in ANSWERS)
    record = {"system": "Be kind.", "prompt": [HELLO], "chosen": good, "rejected": bad}
    with pytest.raises(DataError, match=message):
        read_pairs([write(tmp_path / "a.jsonl", record)])


def test_pairs_with_calls_and_tools(chat: Tokenizer, tmp_path: Path) -> None:
    record = {
        "prompt": [ASK],
        "chosen": [answer(None, tool_calls=[CALL])],
        "rejected": [answer("No idea.")],
        "tools": [W],
    }
    dataset = PreferenceDataset(read_pairs([write(tmp_path / "a.jsonl", record)]), chat)
    labels = dataset[0]["chosen_labels"]
    assert chat.decode(labels[labels >= 0].tolist(), skip_special=True).strip() == (
        'call weather {"town": "Ulm"}'
    )
    assert "tells it" in chat.decode(dataset.prompt_ids(0), skip_special=True)


def test_pairs_that_become_equal(
    chat: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = "the same long beginning of an answer and then"
    cut = {"prompt": "Hello", "chosen": f"{long} good", "rejected": f"{long} bad"}
    fine = {"prompt": "Hello", "chosen": "good", "rejected": "bad"}
    trimmed = {"prompt": "Hello", "chosen": "good", "rejected": "good "}
    path = write(tmp_path / "a.jsonl", cut, fine, fine)
    pairs = read_pairs([path])
    limits = Limits(None, 5, "truncate")
    kept = PreferenceDataset(pairs, chat, limits=limits)
    assert [pair.name for pair in kept.pairs] == [f"{path}:2", f"{path}:3"]
    assert "1 of 3 pairs are the same ids on both sides" in caplog.text
    assert len(PreferenceDataset(pairs, chat)) == 3
    with pytest.raises(DataError, match="1 of 1 pairs are the same ids"):
        PreferenceDataset(pairs[:1], chat, limits=limits)
    pairs = read_pairs([write(path, fine, trimmed)])
    with pytest.raises(DataError, match=r"1 of 2 pairs are the same ids .*a\.jsonl:2"):
        PreferenceDataset(pairs, chat)
    assert len(PreferenceDataset(pairs, chat, on_bad="skip")) == 1


# Records of which the second alone can be used, and where the first fails.
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "empty output": (
        {"instruction": "2+2", "input": "", "output": ""},
        {"instruction": "2+2", "input": "", "output": "4"},
        "the answer is empty",
    ),
    "refused by the template": (
        {"messages": SIMPLE, "tools": [W]},
        {"messages": SIMPLE},
        "has no place for the record's tools",
    ),
    "mark": ({"messages": [SIMPLE[0], answer("a", weight=2)]}, {"messages": SIMPLE}, "weight=2"),
    "the same": (
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        "nothing to prefer",
    ),
    "the same ids": (
        {"prompt": "p", "chosen": "a", "rejected": "a "},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        "are the same ids on both sides",
    ),
    "a pair with tools": (
        {"prompt": "p", "chosen": "a", "rejected": "b", "tools": [W]},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        "has no place for the record's tools",
    ),
    "no pair": ({"prompt": "p"}, {"prompt": "p", "chosen": "a", "rejected": "b"}, "no 'chosen'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_examples_are_skipped_counted_and_listed(
    case: str, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good, message = BAD[case]
    simple = load_tokenizer(tiny_model, chat_template="simple")

    def opened(path: Path, on_bad: OnBad = "error") -> InstructDataset | PreferenceDataset:
        if "chosen" in good:
            return PreferenceDataset(read_pairs([path], on_bad=on_bad), simple, on_bad=on_bad)
        return open_instruct(path, simple, on_bad=on_bad)

    alone = opened(write(tmp_path / "good.jsonl", good))
    path = write(tmp_path / "a.jsonl", bad, good)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        opened(path)
    assert f"{path}:1" in str(caught.value)
    caplog.clear()
    kept = opened(path, "skip")
    assert kept.fingerprint() == alone.fingerprint()
    assert "left out" in caplog.text and f"{path}:1" in caplog.text and message in caplog.text
    with pytest.raises(DataError):
        opened(write(path, bad), "skip")


def test_a_store_has_no_bad_examples(chat: Tokenizer, tmp_path: Path) -> None:
    dataset = open_instruct(write(tmp_path / "a.jsonl", {"messages": SIMPLE}), chat)
    write_instruct_store(tmp_path / "store", dataset, Limits())
    with pytest.raises(DataError, match=r"prepared store[^$]*drop on_bad_example=skip"):
        open_instruct(tmp_path / "store", chat, on_bad="skip")


def test_a_prepared_store_lists_what_the_template_refuses(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", *BAD["refused by the template"][:2], {"messages": 1})
    words = ["--task", "instruct", "--input", str(path), "--tokenizer", str(tiny_model)]
    words += ["--chat_template", "simple", "--output_prefix", str(tmp_path / "made")]
    assert status(prepare_main, words) == 2
    assert status(prepare_main, [*words, "--on_bad_line", "skip"]) == 0
    assert "2 bad records were left out" in capsys.readouterr().out
    listed = (tmp_path / "made.bad_lines.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [f"{path}:3", f"{path}:1"]
    simple = load_tokenizer(tiny_model, chat_template="simple")
    assert len(open_instruct(tmp_path / "made", simple)) == 1
