"""Every format, in every container, gives the conversation that its record says."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from commands import status

from data.conversations.convert_instruct import convert, stanford_prompt
from data.conversations.convert_instruct import main as convert_main
from data.conversations.instruct import FORMATS, read_examples, squad_prompt
from data.tokenization.chat import BUILT_IN, render

ASKED = {"role": "user", "content": "Translate.\nchat"}
SAID = {"role": "assistant", "content": "cat"}
MORE = ({"role": "user", "content": "And chien?"}, {"role": "assistant", "content": "dog"})
SYSTEM = {"role": "system", "content": "Be brief."}

RECORDS: dict[str, tuple[dict[str, Any], tuple[dict[str, str], ...]]] = {
    "alpaca": ({"instruction": "Translate.", "input": "chat", "output": "cat"}, (ASKED, SAID)),
    "alpaca without input": (
        {"instruction": "Translate.\nchat", "output": "cat"},
        (ASKED, SAID),
    ),
    "alpaca with history": (
        {
            "instruction": "And chien?",
            "input": "",
            "output": "dog",
            "system": "Be brief.",
            "history": [["Translate.\nchat", "cat"]],
        },
        (SYSTEM, ASKED, SAID, *MORE),
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Translate.\nchat"},
                {"from": "gpt", "value": "cat"},
                {"from": "user", "value": "And chien?"},
                {"from": "assistant", "value": "dog"},
            ]
        },
        (SYSTEM, ASKED, SAID, *MORE),
    ),
    "sharegpt with tools": (
        {
            "conversations": [
                {"from": "human", "value": "Translate.\nchat"},
                {"from": "function_call", "value": "look(chat)"},
                {"from": "observation", "value": "cat"},
                {"from": "gpt", "value": "cat"},
            ]
        },
        (
            ASKED,
            {"role": "assistant", "content": "look(chat)"},
            {"role": "tool", "content": "cat"},
            SAID,
        ),
    ),
    "messages": ({"messages": [SYSTEM, ASKED, SAID, *MORE]}, (SYSTEM, ASKED, SAID, *MORE)),
    "messages in parts": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "Translate.\n"},
                        {"type": "text", "text": "chat"},
                    ],
                },
                SAID,
            ]
        },
        (ASKED, SAID),
    ),
    "messages as conversations": ({"conversations": [ASKED, SAID]}, (ASKED, SAID)),
    "src_tgt": ({"src": "Translate.\nchat", "tgt": "cat"}, (ASKED, SAID)),
    "src_tgt of several turns": (
        {
            "src": ["Translate.\nchat", "And chien?"],
            "tgt": ["cat", "dog"],
            "context": {"system": "Be brief."},
        },
        (SYSTEM, ASKED, SAID, *MORE),
    ),
    "prompt and completion": (
        {"prompt": "Translate.\nchat", "completion": "cat"},
        (ASKED, SAID),
    ),
    "prompt and response": ({"prompt": "Translate.\nchat", "response": "cat"}, (ASKED, SAID)),
}
FLAT = ["alpaca", "alpaca without input", "src_tgt", "prompt and completion"]


@pytest.mark.parametrize("case", RECORDS)
def test_json_lines_and_array(case: str, tmp_path: Path) -> None:
    record, expected = RECORDS[case]
    lines, array = tmp_path / "lines.jsonl", tmp_path / "array.json"
    text = json.dumps(record, ensure_ascii=False)
    lines.write_text(f"{text}\n\n{text}\n")
    array.write_text(json.dumps([record, record], indent=2))
    (tmp_path / "misnamed.json").write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n{text}".encode())
    for name in ("lines.jsonl", "array.json", "misnamed.json"):
        examples = read_examples([tmp_path / name])
        assert [example.messages for example in examples] == [expected, expected], name
        assert examples[0].answers == (expected[-1]["content"],)
    assert [e.name for e in read_examples([lines])] == [f"{lines}:1", f"{lines}:3"]
    assert [e.name for e in read_examples([array])] == [f"{array} item 1", f"{array} item 2"]
    kind = case.split(maxsplit=1)[0]
    if kind in FORMATS:
        assert read_examples([lines], format=kind)[0].messages == expected


@pytest.mark.parametrize("case", RECORDS)
def test_parquet(case: str, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    record, expected = RECORDS[case]
    if case == "messages in parts":
        # A column has one type: parts in every turn.
        said = {"role": "assistant", "content": [{"type": "text", "text": "cat"}]}
        record = {"messages": [record["messages"][0], said]}
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([record, record]), path)
    examples = read_examples([path])
    assert [example.messages for example in examples] == [expected, expected]
    assert examples[1].name == f"{path} row 2"


@pytest.mark.parametrize("case", FLAT)
@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("b.csv", ";"), ("c.tsv", "\t")])
def test_csv(case: str, name: str, delimiter: str, tmp_path: Path) -> None:
    record, expected = RECORDS[case]
    path = tmp_path / name
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(record), delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows([record, record])
    examples = read_examples([path])
    assert [example.messages for example in examples] == [expected, expected]
    # The first row begins on line 2 and has a line break in it.
    breaks = sum(text.count("\n") for text in record.values())
    assert [e.name for e in examples] == [f"{path}:2", f"{path}:{3 + breaks}"]


SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "Ann has two dogs. ",
                    "qas": [
                        {
                            "id": "q1",
                            "question": "How many?",
                            "answers": [
                                {"text": "two", "answer_start": 8},
                                {"text": "two dogs", "answer_start": 8},
                                {"text": "two", "answer_start": 8},
                            ],
                        },
                        {
                            "id": "q2",
                            "question": "Who?",
                            "answers": [{"text": "Ann", "answer_start": 0}],
                        },
                    ],
                }
            ],
        }
    ],
}


def test_squad(tmp_path: Path) -> None:
    path = tmp_path / "dev-v1.1.json"
    path.write_text(json.dumps(SQUAD, indent=1))
    first, second = read_examples([path])
    prompt = "Text: Ann has two dogs.\n\nQuestion: How many?\n\nAnswer:"
    assert first.messages == (
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": "two"},
    )
    assert prompt == squad_prompt("Ann has two dogs.", "How many?")
    assert first.answers == ("two", "two dogs")
    assert (second.answers, second.name) == (("Ann",), f"{path} question q2")
    # Hugging Face's rows of the same.
    rows = tmp_path / "rows.jsonl"
    row = {
        "id": "q1",
        "title": "T",
        "context": "Ann has two dogs. ",
        "question": "How many?",
        "answers": {"text": ["two", "two dogs"], "answer_start": [8, 8]},
    }
    rows.write_text(json.dumps(row))
    assert read_examples([rows])[0].messages == first.messages
    assert read_examples([rows])[0].answers == first.answers


def test_real_files(shared_data: Path) -> None:
    path = shared_data / "alpaca_en_1k.json"
    raw = json.loads(path.read_text())
    examples = read_examples([path])
    assert len(examples) == len(raw) == 999
    for item, example in zip(raw, examples, strict=True):
        assert example.messages[-1]["content"] == item["output"]
        assert example.messages[0]["content"].startswith(item["instruction"])
        assert example.messages[0]["content"].endswith(item["input"])
    squad = shared_data / "squad_v1.1_fixture.json"
    paragraphs = [p for a in json.loads(squad.read_text())["data"] for p in a["paragraphs"]]
    expected = [(p["context"], qa) for p in paragraphs for qa in p["qas"]]
    found = read_examples([squad])
    assert len(found) == len(expected) > 0
    for (context, qa), example in zip(expected, found, strict=True):
        assert context in example.messages[0]["content"]
        assert qa["question"] in example.messages[0]["content"]
        assert example.messages[1]["content"] == qa["answers"][0]["text"]
        assert set(example.answers) == {answer["text"] for answer in qa["answers"]}


def test_directories_and_several_files(tmp_path: Path) -> None:
    for number in range(3):
        record = {"src": f"q{number}", "tgt": f"a{number}"}
        (tmp_path / f"part{number}.jsonl").write_text(json.dumps(record))
    (tmp_path / "notes.txt").write_text("no data")
    assert [e.answers[0] for e in read_examples([tmp_path])] == ["a0", "a1", "a2"]
    again = read_examples([tmp_path / "part2.jsonl", tmp_path])
    assert [e.answers[0] for e in again] == ["a2", "a0", "a1"]


def test_bad_records_are_left_out_only_when_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    lines = ['{"src": "q", "tgt": "a"}', '{"src": "q"', '{"src": "q"}', "[1]"]
    path.write_text("\n".join([*lines, lines[0]]))
    assert len(read_examples([path], on_bad="skip")) == 2
    assert f"left out 3 bad records: {path}:2: not JSON: Expecting" in caplog.text
    assert f"{path}:3: no 'tgt'" in caplog.text and f"{path}:4: a record must be" in caplog.text
    squad = json.loads(json.dumps(SQUAD))
    squad["data"][0]["paragraphs"][0]["qas"][0]["answers"] = []
    (tmp_path / "b.json").write_text(json.dumps(squad))
    assert [e.answers for e in read_examples([tmp_path / "b.json"], on_bad="skip")] == [("Ann",)]


@pytest.mark.parametrize("to", ["messages", "sharegpt"])
def test_conversion_keeps_every_conversation(to: str, tmp_path: Path) -> None:
    source = tmp_path / "mixed"
    source.mkdir()
    for number, (record, _) in enumerate(RECORDS.values()):
        (source / f"{number:02d}.jsonl").write_text(json.dumps(record))
    (source / "squad.json").write_text(json.dumps(SQUAD))
    out = tmp_path / "deep" / "out.jsonl"
    assert convert([source], out, to=to) == len(RECORDS) + 2
    before, after = read_examples([source]), read_examples([out])
    assert [(e.messages, e.answers) for e in before] == [(e.messages, e.answers) for e in after]
    keys = {key for line in out.read_text().splitlines() for key in json.loads(line)}
    assert keys == {"messages" if to == "messages" else "conversations", "answers"}


def test_stanfords_prompt_is_what_the_alpaca_template_gives(tmp_path: Path) -> None:
    """Without an input, the converter's prompt through `plain` and the bare instruction through
    `alpaca` are the same text, but for the line break before the answer.
    """
    path, out = tmp_path / "a.json", tmp_path / "b.jsonl"
    path.write_text(json.dumps([{"instruction": "Sing.", "input": "", "output": "La."}]))
    arguments = ["--input", str(path), "--output", str(out), "--to", "messages"]
    assert status(convert_main, [*arguments, "--prompt", "alpaca"]) == 0
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    plain = render(BUILT_IN["plain"], read_examples([out])[0].messages[:1], tokens)
    framed = render(
        BUILT_IN["alpaca"],
        read_examples([path])[0].messages[:1],
        {**tokens, "add_generation_prompt": True},
    )
    assert framed == plain + "\n"
    assert "### Input:\nC minor\n\n### Response:" in stanford_prompt("Sing.", "C minor")
