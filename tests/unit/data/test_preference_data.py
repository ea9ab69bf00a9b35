"""Preference pairs: every layout gives the same samples, made as instruction data is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import DataError
from data.conversations.instruct import Example
from data.conversations.instruct_dataset import InstructDataset, Limits
from data.conversations.preference import PreferenceDataset, collate_preference, read_pairs
from data.tokenizer import Tokenizer, load_tokenizer

ASK = {"role": "user", "content": "Who are you?"}
GOOD = {"role": "assistant", "content": "A llama."}
BAD = {"role": "assistant", "content": "None of your business, whoever you are."}
SYSTEM = {"role": "system", "content": "Be kind."}

LAYOUTS: dict[str, dict[str, Any]] = {
    "strings": {
        "prompt": ASK["content"],
        "system": "Be kind.",
        "chosen": GOOD["content"],
        "rejected": BAD["content"],
    },
    "messages": {"prompt": [SYSTEM, ASK], "chosen": [GOOD], "rejected": [BAD]},
    "implicit prompt": {"chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]},
    "prompt repeated": {
        "prompt": [SYSTEM, ASK],
        "chosen": [SYSTEM, ASK, GOOD],
        "rejected": [SYSTEM, ASK, BAD],
    },
    "prompt and strings": {
        "prompt": [SYSTEM, ASK],
        "chosen": GOOD["content"],
        "rejected": BAD["content"],
    },
    "paddlenlp": {
        "system": "Be kind.",
        "src": [ASK["content"]],
        "tgt": [],
        "response": [BAD["content"], GOOD["content"]],
        "sort": [0, 1],
    },
    "paddlenlp, the better one first": {
        "system": "Be kind.",
        "src": ASK["content"],
        "tgt": [],
        "response": [GOOD["content"], BAD["content"]],
        "sort": [1, 0],
    },
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "Be kind."},
            {"from": "human", "value": ASK["content"]},
        ],
        "chosen": {"from": "gpt", "value": GOOD["content"]},
        "rejected": {"from": "gpt", "value": BAD["content"]},
    },
}


@pytest.fixture
def chat(tiny_model: Path) -> Tokenizer:
    """A tokenizer with a template."""
    return load_tokenizer(tiny_model, chat_template="simple")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(LAYOUTS[layout]) + "\n")
    (pair,) = read_pairs([path])
    assert pair.chosen == (SYSTEM, ASK, GOOD) and pair.rejected == (SYSTEM, ASK, BAD)
    assert pair.name == f"{path}:1"


def test_turns_before_the_question_of_paddlenlp(tmp_path: Path) -> None:
    record = {"src": ["Hi", "And?"], "tgt": ["Hello"], "response": ["No", "Yes"], "sort": [2, 7]}
    (pair,) = read_pairs([write(tmp_path / "a.jsonl", record)])
    assert [turn["content"] for turn in pair.chosen] == ["Hi", "Hello", "And?", "Yes"]
    assert [turn["content"] for turn in pair.rejected] == ["Hi", "Hello", "And?", "No"]


SORTED = {"src": ["q"], "tgt": [], "response": ["a", "b"], "sort": [0, 1]}
UNSORTED: list[tuple[dict[str, Any], str]] = [
    ({"src": ["q", "r"]}, "'src' has 2 texts and 'tgt' 0: .* has one more"),
    ({"response": ["a"]}, "have to be lists of two"),
    ({"response": "a"}, "have to be lists of two"),
    ({"sort": [1, 1]}, "'sort' is 1 for both"),
    ({"sort": [True, False]}, "'sort' has to be two numbers"),
    ({"sort": None}, "have to be lists of two"),
    ({"src": [3]}, "'src' has to be a text or a list of texts"),
    ({"chosen": "a"}, "answers twice: under 'response' and under 'chosen'"),
    ({"response": ["a", "a"]}, "chosen and rejected are the same"),
    ({"response": ["a", ""]}, "chosen is an empty answer"),
]


@pytest.mark.parametrize(("change", "message"), UNSORTED)
def test_bad_records_of_paddlenlp(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_pairs([write(tmp_path / "a.jsonl", SORTED | change)])


# Records that are no pairs: what is said is that dpo reads pairs, not what their keys are about.
OTHERS: list[dict[str, Any]] = [
    {"question": "q", "context": "c", "answers": {"text": ["a"], "answer_start": [0]}},
    {"instruction": "q", "context": "", "response": "a", "category": "x"},
    {"instruction": "q", "input": "", "output": "a"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"src": ["q"], "tgt": ["a"]},
    {"text": "a"},
    {"prompt": "q", "completion": "a", "label": True},
    {"chosen": "a", "instruction": "q"},
]


@pytest.mark.parametrize("record", OTHERS, ids=" ".join)
def test_records_of_other_data_are_refused_as_such(record: dict[str, Any], tmp_path: Path) -> None:
    wanted = "a preference pair, which dpo learns from, has prompt, chosen, rejected"
    with pytest.raises(DataError, match=rf"a.jsonl:1: no '(chosen|rejected)' .its keys.*{wanted}"):
        read_pairs([write(tmp_path / "a.jsonl", record)])


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([LAYOUTS["messages"]] * 2), path)
    assert [pair.chosen for pair in read_pairs([path])] == [(SYSTEM, ASK, GOOD)] * 2


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_samples(chat: Tokenizer, tmp_path: Path) -> None:
    """Each side is the instruction sample of that conversation, its last answer alone learnt."""
    many = {"prompt": [ASK, GOOD, ASK], "chosen": [GOOD], "rejected": [BAD]}
    pairs = read_pairs([write(tmp_path / "a.jsonl", LAYOUTS["messages"], many)])
    dataset = PreferenceDataset(pairs, chat)
    assert len(dataset) == 2
    for index, prompt in enumerate(([SYSTEM, ASK], [ASK, GOOD, ASK])):
        sample = dataset[index]
        for side, answer in (("chosen", GOOD), ("rejected", BAD)):
            example = Example((*prompt, answer), (answer["content"],), "")
            alone = InstructDataset.from_examples([example], chat)[0]
            labels = alone["labels"].copy()
            # The prompt's ids are known from serving; labels are shifted by one.
            labels[: len(chat.apply_chat_template(prompt)) - 1] = -100
            assert sample[f"{side}_ids"].tolist() == alone["input_ids"].tolist()
            assert sample[f"{side}_labels"].tolist() == labels.tolist()
            assert labels[-1] == chat.eos_id
        assert dataset.prompt_ids(index) == chat.apply_chat_template(prompt)
        sizes = [len(sample["chosen_ids"]), len(sample["rejected_ids"])]
        assert dataset.lengths[index] == max(sizes)
        counts = [(sample[f"{side}_labels"] != -100).sum() for side in ("chosen", "rejected")]
        assert dataset.label_counts[index] == sum(counts)
    again = PreferenceDataset(pairs, chat)
    assert dataset.fingerprint() == again.fingerprint()
    assert PreferenceDataset(pairs[:1], chat).fingerprint() != dataset.fingerprint()


def test_collate(chat: Tokenizer, tmp_path: Path) -> None:
    many = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."}
    pairs = read_pairs([write(tmp_path / "a.jsonl", LAYOUTS["messages"], many)])
    dataset = PreferenceDataset(pairs, chat)
    samples = [dataset[0], dataset[1]]
    batch = collate_preference(samples, pad_id=5)
    width = -(-int(dataset.lengths.max()) // 8) * 8
    assert batch["input_ids"].shape == batch["labels"].shape == (4, width)
    rows = [(s, side) for side in ("chosen", "rejected") for s in samples]
    for row, (sample, side) in enumerate(rows):
        size = len(sample[f"{side}_ids"])
        assert batch["input_ids"][row].tolist() == [
            *sample[f"{side}_ids"].tolist(),
            *[5] * (width - size),
        ]
        assert batch["labels"][row, :size].tolist() == sample[f"{side}_labels"].tolist()
        assert (batch["labels"][row, size:] == -100).all()


def test_both_sides_of_a_pair_stay_or_go_together(chat: Tokenizer, tmp_path: Path) -> None:
    def pair(prompt: int, chosen: int, rejected: int) -> dict[str, str]:
        return {
            "prompt": "why " * prompt,
            "chosen": "so " * chosen,
            "rejected": "no " * rejected,
        }

    path = write(
        tmp_path / "a.jsonl", pair(2, 2, 30), pair(2, 2, 3), pair(2, 30, 2), pair(40, 1, 2)
    )
    pairs = read_pairs([path])
    kept = PreferenceDataset(pairs, chat, limits=Limits(60, 20, "skip"))
    assert [p.name for p in kept.pairs] == [f"{path}:2"]
    assert np.array_equal(kept[0]["chosen_ids"], PreferenceDataset(pairs, chat)[1]["chosen_ids"])
    cut = PreferenceDataset(pairs, chat, limits=Limits(60, 20, "truncate"))
    assert len(cut) == 4
    prompt = cut.prompt_ids(3)
    assert len(prompt) == 60 and cut.chosen.prompt_ids(3) == cut.rejected.prompt_ids(3)
