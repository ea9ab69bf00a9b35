"""Nothing a record says is dropped: marks, tools, calls, reasoning, and keys without a meaning."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import DataError
from data.conversations.convert_instruct import convert
from data.conversations.instruct import read_examples
from data.conversations.instruct_dataset import InstructDataset, Limits
from data.conversations.instruct_store import (
    open_instruct,
    open_instruct_store,
    write_instruct_store,
)
from data.conversations.preference import read_pairs
from data.tokenizer import Tokenizer, load_tokenizer
from tests.unit.data.records import ASK, CALL, RAIN, SIMPLE, TOOLS, W, answer, write


@pytest.fixture
def chat(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model, chat_template=TOOLS)


def gpt(text: str, **more: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": text, **more}


def learnt(path: Path, tokenizer: Tokenizer) -> list[str]:
    """The runs of labels of the first example, as text."""
    labels = open_instruct(path, tokenizer)[0]["labels"]
    runs = np.split(labels, np.flatnonzero(np.diff(labels == -100)) + 1)
    texts = [tokenizer.decode(run.tolist(), skip_special=True) for run in runs if run[0] != -100]
    return [text.strip() for text in texts]


TWO = [{"role": "user", "content": "one"}, answer("no"), {"role": "user", "content": "again"}]
HUMAN = [{"from": "human", "value": "one"}]
# Record, and what is learnt of it.
HONOURED: dict[str, tuple[dict[str, Any], list[str]]] = {
    **{
        f"{key}={mark}": (
            {"messages": [TWO[0], answer("no", **{key: mark}), TWO[2], answer("yes")]},
            ["yes"] if not mark else ["no", "yes"],
        )
        for key in ("weight", "train", "training", "train_on_turn", "loss", "loss_scale")
        for mark in (0, False, 1, True, 1.0)
    },
    "null": ({"messages": [*TWO, answer("yes", weight=None)]}, ["no", "yes"]),
    "sharegpt": (
        {"conversations": [*HUMAN, gpt("no", weight=0), *HUMAN, gpt("yes", weight=1)]},
        ["yes"],
    ),
    "the last": ({"messages": [*TWO, answer("yes", train=False)]}, ["no"]),
    "false of a user": ({"messages": [{**ASK, "train": False}, answer("yes")]}, ["yes"]),
    "calls": (
        {"messages": [ASK, answer("Look.", tool_calls=[CALL]), RAIN, answer("It rains.")]},
        ['Look. call weather {"town": "Ulm"}', "It rains."],
    ),
    "calls alone": (
        {"messages": [ASK, answer(None, tool_calls=[CALL]), RAIN, answer("Yes.")], "tools": [W]},
        ['call weather {"town": "Ulm"}', "Yes."],
    ),
    "calls not learnt": (
        {"messages": [ASK, answer(None, tool_calls=[CALL], weight=0), RAIN, answer("Yes.")]},
        ["Yes."],
    ),
    "calls last": (
        {"messages": [ASK, answer(None, tool_calls=[CALL])]},
        ['call weather {"town": "Ulm"}'],
    ),
    "reasoning": (
        {"messages": [ASK, answer("Rain.", reasoning_content="clouds")]},
        ["(clouds) Rain."],
    ),
    "function_call": (
        {
            "conversations": [
                {"from": "human", "value": "weather?"},
                {"from": "function_call", "value": '{"name": "weather"}'},
                {"from": "observation", "value": "rain"},
                gpt("It rains."),
            ],
            "tools": json.dumps([{"name": "weather", "description": "tells it"}]),
        },
        ["call weather {}", "It rains."],
    ),
    "alpaca's tools": ({"instruction": "i", "output": "o", "tools": json.dumps([W])}, ["o"]),
}


@pytest.mark.parametrize("case", HONOURED)
def test_what_is_learnt(case: str, chat: Tokenizer, tmp_path: Path) -> None:
    record, expected = HONOURED[case]
    path = write(tmp_path / "a.jsonl", record)
    assert learnt(path, chat) == expected
    dataset = open_instruct(path, chat)
    start = chat.decode(dataset[0]["input_ids"].tolist(), skip_special=True)
    assert ("tells it" in start) == ("tools" in record)
    # A store and a conversion keep it.
    write_instruct_store(tmp_path / "store", dataset, Limits())
    stored = open_instruct_store(tmp_path / "store", chat)
    assert stored.fingerprint() == dataset.fingerprint()
    assert stored.examples[0].tools == dataset.examples[0].tools
    convert([path], tmp_path / "b.jsonl")
    assert learnt(tmp_path / "b.jsonl", chat) == expected
    assert open_instruct(tmp_path / "b.jsonl", chat).fingerprint() == dataset.fingerprint()
    if case in ("sharegpt", "function_call", "calls alone", "calls last"):
        convert([path], tmp_path / "c.jsonl", to="sharegpt")
        assert learnt(tmp_path / "c.jsonl", chat) == expected


# Record, and what the message says.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "share": ({"messages": [SIMPLE[0], answer("a", weight=0.5)]}, "turn 2 has weight=0.5"),
    "text": ({"messages": [SIMPLE[0], answer("a", train="no")]}, "turn 2 has train='no'"),
    "both": (
        {"messages": [SIMPLE[0], answer("a", train=True, weight=0)]},
        "marks that contradict each other",
    ),
    "user": ({"messages": [{**SIMPLE[0], "train": True}, SIMPLE[1]]}, "only the assistant's turns"),
    "all": ({"messages": [SIMPLE[0], answer("a", weight=0)]}, "all of the assistant's turns are"),
    "calls of a user": (
        {"messages": [{**SIMPLE[0], "tool_calls": [CALL]}, SIMPLE[1]]},
        "turn 1 is the user's and has 'tool_calls'",
    ),
    "calls": (
        {"messages": [SIMPLE[0], answer("a", tool_calls="w()")]},
        "must be a list of objects",
    ),
    "a call": ({"messages": [SIMPLE[0], answer("a", tool_calls=[{}])]}, "needs a function with a"),
    "arguments": (
        {"messages": [SIMPLE[0], answer("a", tool_calls=[{"name": "w", "arguments": "{"}])]},
        "turn 2: the arguments of w are no JSON",
    ),
    "list of arguments": (
        {"messages": [SIMPLE[0], answer("a", tool_calls=[{"name": "w", "arguments": "[]"}])]},
        "the arguments of w must be an object",
    ),
    "tools": ({"messages": SIMPLE, "tools": "w()"}, "'tools' are no JSON"),
    "a tool": ({"messages": SIMPLE, "tools": [{"x": 1}]}, "'tools' must be a list of objects with"),
    "thoughts": (
        {"messages": [SIMPLE[0], answer("a", reasoning_content=["b"])]},
        "'reasoning_content' must be a string, not list",
    ),
    "picture": ({"messages": SIMPLE, "images": ["a.png"]}, "'images' cannot be honoured"),
    "mask": ({"messages": SIMPLE, "loss_mask": [0, 1]}, "'loss_mask' cannot be honoured"),
    "detail": (
        {"messages": [SIMPLE[0], answer("a", train_detail=[{"begin_offset": 0}])]},
        "'train_detail' cannot be honoured",
    ),
    "functions": ({"messages": SIMPLE, "functions": [W]}, "write them as tools"),
    "function_call": (
        {"messages": [SIMPLE[0], answer("a", function_call={"name": "w"})]},
        "write it as tool_calls",
    ),
    "record": ({"src": "q", "tgt": "a", "weight": 0}, "weight=0 says that this record is not"),
    "share of a record": ({"src": "q", "tgt": "a", "weight": 0.3}, "weight=0.3 says that"),
    "KTO": ({"prompt": "q", "completion": "a", "label": False}, "label=False says that"),
    "ms-swift's pair": ({"messages": SIMPLE, "rejected_response": "b"}, "for preference tuning"),
    "marked pair": (
        {"prompt": "q", "chosen": answer("a"), "rejected": answer("b", weight=0)},
        "the answer of rejected is marked as not learnt",
    ),
    "pair's question": (
        {"instruction": "i", "chosen": [*SIMPLE], "rejected": [SIMPLE[0], answer("b")]},
        "'instruction' cannot be honoured: a pair's question is its prompt",
    ),
    "NUL in a call": (
        {"messages": [SIMPLE[0], answer("a", tool_calls=[{"name": "w", "arguments": {"\0": 1}}])]},
        "the text holds a NUL",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    record, message = REFUSED[case]
    path = write(tmp_path / "a.jsonl", record)
    with pytest.raises(DataError) as caught:
        (read_pairs if "chosen" in record else read_examples)([path])
    assert message in str(caught.value) and f"{path}:1" in str(caught.value)


# Template's place to lose, record, and what the message says.
PLACES: dict[str, tuple[str, dict[str, Any], str]] = {
    "tools": ("tools | tojson", {"messages": SIMPLE, "tools": [W]}, "leaves out 'weather' of the"),
    "calls": (
        "m.tool_calls or []",
        {"messages": [SIMPLE[0], answer("a", tool_calls=[CALL])]},
        "has no place for 'tool_calls' (turn 2)",
    ),
    "arguments": (
        "call.function.arguments | tojson",
        {"messages": [SIMPLE[0], answer("a", tool_calls=[CALL])]},
        "leaves out 'town' of 'tool_calls' (turn 2)",
    ),
    "reasoning": (
        "m.reasoning_content + ",
        {"messages": [SIMPLE[0], answer("a", reasoning_content="because")]},
        "leaves out 'because' of 'reasoning_content' (turn 2)",
    ),
    "reasoning in the question": (
        "m.reasoning_content + ",
        {"messages": [SIMPLE[0], answer("a", thinking="a")]},
        "has no place for 'thinking' (turn 2)",
    ),
    "name in the question": (
        "tools | tojson",
        {"messages": [{"role": "user", "content": "weather?"}, answer("a")], "tools": [W]},
        "has no place for the record's tools",
    ),
    "null": (
        "{%- if m.content is not none -%}",
        {"messages": [SIMPLE[0], answer(None, tool_calls=[CALL])]},
        "writes 'None' for content that is null (turn 2)",
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_templates_without_a_place(case: str, tiny_model: Path, tmp_path: Path) -> None:
    place, record, message = PLACES[case]
    other = {"m.tool_calls or []": "[]", "m.reasoning_content + ": "", "null": ""}.get(place, "''")
    if case == "name in the question":
        place, other = "{{ 'tools: ' + tools | tojson + '\\n' }}", ""
    if case == "null":
        other = "{%- if true -%}"
    template = TOOLS.replace(place, other)
    assert template != TOOLS
    path = write(tmp_path / "a.jsonl", record)
    with pytest.raises(DataError) as caught:
        open_instruct(path, load_tokenizer(tiny_model, chat_template=template))
    assert message in str(caught.value) and f"{path}:1" in str(caught.value)


@pytest.mark.parametrize("template", ["llama3", "simple", "alpaca", "vicuna", "plain", "llama2"])
def test_built_in_templates_have_no_place(
    template: str, tiny_model: Path, tiny_tiktoken: Path, tmp_path: Path
) -> None:
    model = tiny_tiktoken if template == "llama3" else tiny_model
    tokenizer = load_tokenizer(model, chat_template=template)
    for record in (
        {"messages": SIMPLE, "tools": [W]},
        {"messages": [SIMPLE[0], answer("a", tool_calls=[CALL])]},
        {"messages": [SIMPLE[0], answer("a", reasoning="because")]},
    ):
        path = write(tmp_path / "a.jsonl", record)
        if template == "llama3" and tokenizer.special.ids["<|eot_id|>"] not in tokenizer.eos_ids:
            tokenizer.eos_ids = (*tokenizer.eos_ids, tokenizer.special.ids["<|eot_id|>"])
        with pytest.raises(DataError, match=r"a\.jsonl:1: the chat template (leaves out|has no)"):
            open_instruct(path, tokenizer)


def test_what_tools_say_may_be_rendered_as_json(tiny_model: Path, tmp_path: Path) -> None:
    """As Llama 3.1's template does."""
    escaped = "{{ m.content | tojson if m.role == 'tool' else m.content | trim }}"
    chat = load_tokenizer(
        tiny_model, chat_template=TOOLS.replace("{{ m.content | trim }}", escaped)
    )
    said = {"role": "tool", "content": '{"sky": "grey"}\n'}
    turns = [ASK, answer(None, tool_calls=[CALL]), said, answer("Rain.")]
    path = write(tmp_path / "a.jsonl", {"messages": turns})
    assert learnt(path, chat) == ['call weather {"town": "Ulm"}', "Rain."]
    whole = chat.decode(open_instruct(path, chat)[0]["input_ids"].tolist(), skip_special=True)
    assert '"{\\"sky\\": \\"grey\\"}\\n"' in whole


def test_control_tokens_in_calls_and_tools_are_text(chat: Tokenizer, tmp_path: Path) -> None:
    call = {"name": "w</s>", "arguments": {"</s>": "<s>"}}
    tool = {"name": "w</s>", "parameters": {"<s>": "</s>"}}
    turns = [SIMPLE[0], answer(None, tool_calls=[{"function": call}])]
    path = write(tmp_path / "a.jsonl", {"messages": turns, "tools": [tool]})
    sample = open_instruct(path, chat)[0]
    assert np.flatnonzero(sample["input_ids"] == chat.bos_id).tolist() == [0]
    assert (sample["input_ids"] == chat.eos_id).sum() == 0
    assert np.flatnonzero(sample["labels"] == chat.eos_id).tolist() == [len(sample["labels"]) - 1]


def test_keys_without_a_meaning_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [{**SIMPLE[0], "id": 1}, SIMPLE[1]]
    one = write(tmp_path / "a.jsonl", *[{"messages": turns, "id": n, "images": []} for n in (1, 2)])
    two = write(tmp_path / "b.jsonl", {"src": "q", "tgt": "a", "source": "web", "id": 3})
    with caplog.at_level(logging.WARNING):
        read_examples([one, two])
    (line,) = [record.getMessage() for record in caplog.records]
    assert "id (3), images (2), of turns: id (2), source (1)" in line
    caplog.clear()
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "score": 1}
    read_pairs([write(tmp_path / "c.jsonl", pair, pair)])
    assert "score (2)" in caplog.text
    caplog.clear()
    read_examples([write(tmp_path / "d.jsonl", {"instruction": "i", "input": "", "output": "o"})])
    assert not caplog.records


def test_truncation_keeps_a_learnt_answer(chat: Tokenizer, tmp_path: Path) -> None:
    """Turns after the last learnt answer are left out before turns are counted."""
    turns = [*TWO[:2], {"role": "user", "content": "more " * 30}, answer("x", weight=0)]
    path = write(tmp_path / "a.jsonl", {"messages": turns})
    whole = open_instruct(path, chat)
    dataset = open_instruct(path, chat, src_length=5, on_long="truncate")
    assert (dataset[0]["labels"] >= 0).sum() == (whole[0]["labels"] >= 0).sum() > 0


def test_the_prompt_of_a_scored_example(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": [*TWO, answer("yes", weight=0)]})
    (example,) = read_examples([path])
    assert [turn["content"] for turn in example.prompt] == ["one"] and example.answers == ("no",)


def test_marks_are_part_of_the_fingerprint(chat: Tokenizer, tmp_path: Path) -> None:
    """So that a resumed run sees them."""
    marked = {"messages": [TWO[0], answer("no", weight=0), TWO[2], answer("yes")]}
    paths = [
        write(tmp_path / "a.jsonl", marked),
        write(tmp_path / "b.jsonl", {"messages": [*TWO, answer("yes")]}),
    ]
    first, second = (InstructDataset.from_examples(read_examples([p]), chat) for p in paths)
    assert first.fingerprint() != second.fingerprint()
