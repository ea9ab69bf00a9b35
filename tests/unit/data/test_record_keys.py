"""Nothing a record says is dropped: marks, tools, calls, reasoning, and keys without a meaning."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import DataError
from data.conversations.convert_instruct import convert
from data.conversations.instruct import OnBad, read_examples
from data.conversations.instruct_dataset import InstructDataset, Limits
from data.conversations.instruct_store import (
    open_instruct,
    open_instruct_store,
    write_instruct_store,
)
from data.conversations.preference import PreferenceDataset, read_pairs
from data.prepare import main as prepare_main
from data.tokenizer import Tokenizer, load_tokenizer
from tests.unit.data.commands import status

# With a place for everything, as the templates of instruct models have.
TOOLS = """\
{{- bos_token -}}
{%- if tools -%}{{ 'tools: ' + tools | tojson + '\\n' }}{%- endif -%}
{%- for m in messages -%}
    {{- m.role + ': ' -}}
    {%- if m.reasoning_content -%}{{ '(' + m.reasoning_content + ') ' }}{%- endif -%}
    {%- if m.content is not none -%}{{ m.content | trim }}{%- endif -%}
    {%- for call in m.tool_calls or [] -%}
        {{- ' call ' + call.function.name + ' ' + call.function.arguments | tojson -}}
    {%- endfor -%}
    {{- eos_token if m.role == 'assistant' else '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}
"""
W = {"type": "function", "function": {"name": "weather", "description": "tells it"}}
CALL = {"function": {"name": "weather", "arguments": '{"town": "Ulm"}'}}
ASK = {"role": "user", "content": "weather?"}
RAIN = {"role": "tool", "content": "rain"}


@pytest.fixture
def chat(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model, chat_template=TOOLS)


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def answer(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


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
        for key in ("weight", "train", "training", "loss")
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


SIMPLE = [{"role": "user", "content": "q"}, answer("a")]
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
        ([{**SYSTEM, "content": "Be rude."}, HELLO], "another system message than the prompt"),
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
