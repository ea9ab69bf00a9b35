"""JSON records: every reader of the suite takes the same files and says the same of bad ones."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import jsonl
from common.errors import DataError, Place
from data.conversations.instruct import read_examples
from data.conversations.instruct_store import StoredExamples
from data.conversations.preference import read_pairs
from data.corpus.prepare_worker import find_inputs
from data.corpus.readers import make_reader
from llm.config.generation import PromptArguments
from llm.evaluation import choices
from llm.serving import terminal
from llm.train.logs import read_log

# What `str.splitlines` cuts at and may stand in a JSON string as it is, and a character of Latin-1.
TEXTS = [f"one{separator}two" for separator in ("\u2028", "\u2029", "\x85", "\x7f", "é")]


def prompts(path: Path) -> list[str]:
    return [one.text for one in terminal.read_prompts(PromptArguments(data_file=str(path)))]


def corpus(path: Path) -> list[str]:
    (source,) = find_inputs([str(path)], "auto").sources
    reader = make_reader(source.format, json_key="text", txt_documents="file")
    found = reader.read(path.read_bytes().removeprefix(jsonl.BOM))
    if found.bad:
        line, reason = found.bad[0]
        raise DataError(reason, Place(path, line))
    return found.texts


# The record of a text, and what a reader makes of the file.
READERS: dict[str, tuple[Callable[[str], Any], Callable[[Path], list[Any]]]] = {
    "records": (lambda t: {"t": t}, lambda p: [value["t"] for _, value in jsonl.read(p)]),
    "examples": (
        lambda t: {"src": t, "tgt": "a"},
        lambda p: [one.messages[0]["content"] for one in read_examples([p])],
    ),
    "pairs": (
        lambda t: {"prompt": t, "chosen": "a", "rejected": "b"},
        lambda p: [one.chosen[0]["content"] for one in read_pairs([p])],
    ),
    "store": (
        lambda t: {"messages": [t], "answers": [], "name": ""},
        lambda p: [one.messages[0] for one in StoredExamples(p, len(TEXTS))[:]],
    ),
    "corpus": (lambda t: {"text": t}, corpus),
    "prompts": (lambda t: {"prompt": t}, prompts),
    "bare prompts": (lambda t: t, prompts),
    "choices": (
        lambda t: {"question": t, "choices": ["a", "b"], "answer": 1},
        lambda p: [item.prompt for item in choices.read_items(p)],
    ),
    "log": (lambda t: {"step": 1, "t": t}, lambda p: [one["t"] for one in read_log(p)]),
}


def joined(records: list[Any], end: str = "\n") -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + end for record in records)


FORMS: dict[str, tuple[str, Callable[[list[Any]], str]]] = {
    "lines": ("a.jsonl", joined),
    "CRLF": ("a.jsonl", lambda records: joined(records, "\r\n")),
    "BOM": ("a.jsonl", lambda records: "\ufeff" + joined(records)),
    "two files put together": ("a.jsonl", lambda r: f"\ufeff{joined(r[:2])}\ufeff{joined(r[2:])}"),
    "blank lines": ("a.jsonl", lambda records: "\n \n" + joined(records, "\n\r\n\t\n")),
    "no end": ("a.jsonl", lambda records: joined(records).rstrip("\n")),
    "lines in .json": ("a.json", joined),
    "blank lines in .json": ("a.json", lambda records: "\n" + joined(records, "\n\n")),
    "list": ("a.json", lambda records: json.dumps(records, ensure_ascii=False, indent=1)),
    "list in .jsonl": ("a.jsonl", lambda r: json.dumps(r, ensure_ascii=False, indent=1)),
    "list in a line": ("a.jsonl", lambda r: "\ufeff\n" + json.dumps(r, ensure_ascii=False)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_takes_every_form(reader: str, form: str, tmp_path: Path) -> None:
    record, read = READERS[reader]
    name, write = FORMS[form]
    path = tmp_path / name
    path.write_bytes(write([record(text) for text in TEXTS]).encode())
    assert read(path) == TEXTS


BAD: dict[str, tuple[bytes, str]] = {
    "not UTF-8": (b'{"a": "\xe9"}', r":3: not UTF-8 at byte 7 \(0xe9\): convert"),
    "NUL": (b'{"a": "\0"}', ":3: holds a NUL byte"),
    "cut": (b'{"a": "b', r":3: not JSON: Unterminated string starting at \(column 7\)"),
    "two in a line": (b"{} {}", r":3: not JSON: Extra data \(column 4\)"),
    "deep": (b"[" * 20_000, ":3: not JSON: maximum recursion depth"),
    "long number": (b"1" * 5000, ":3: not JSON: Exceeds the limit"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("reader", READERS)
def test_bad_lines_are_named(reader: str, case: str, tmp_path: Path) -> None:
    record, read = READERS[reader]
    line, message = BAD[case]
    path = tmp_path / "a.jsonl"
    path.write_bytes(joined([record("good"), record("too")]).encode() + line + b"\n")
    if reader == "log":  # a killed run leaves half a line
        assert read(path) == ["good", "too"]
        return
    with pytest.raises(DataError, match=f"a.jsonl{message}"):
        read(path)


WHOLE: dict[str, tuple[bytes, str]] = {
    "cut list": (b'[{"a": 1},\n\n{"a"', r":3: not JSON: Expecting ':' delimiter \(column 5\)"),
    "late list": (b"\n[\n1 2]", r":3: not JSON: Expecting ',' delimiter \(column 3\)"),
    "Latin-1 in a list": (b'[\n"\xe9"]', r":2: not UTF-8 at byte 1 \(0xe9\)"),
    "UTF-16": ("[1]".encode("utf-16"), ":1: holds a NUL byte: binary data, or UTF-16"),
    "cut record": (b'{\n"a": \n}', r":3: not JSON: Expecting value \(column 1\)"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_bad_lists_and_records_are_named(case: str, tmp_path: Path) -> None:
    content, message = WHOLE[case]
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"a.json{message}"):
        list(jsonl.read(path))


def read(path: Path) -> list[tuple[str, object]]:
    return [(str(place).removeprefix(f"{path}"), value) for place, value in jsonl.read(path)]


def test_places(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content, found in {
        "": [],
        "\ufeff\r\n": [],
        "[]": [],
        "[1, [2]]": [(" item 1", 1), (" item 2", [2])],
        "[1]\n\n[2]\n": [(":1", [1]), (":3", [2])],
        '{"a": 1}\n': [("", {"a": 1})],
        '\n{"a":\n1}': [("", {"a": 1})],
        '{"a": 1}\n\n2': [(":1", {"a": 1}), (":3", 2)],
    }.items():
        path.write_text(content, encoding="utf-8")
        assert read(path) == found, content
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"a": 1}')
    assert read(lines) == [(":1", {"a": 1})]


def test_one_may_go_on_after_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'1\n{\n"\xff"\n4')
    found = [(place.line, value) for place, value in jsonl.scan(path)]
    assert [line for line, _ in found] == [1, 2, 3, 4]
    assert (found[0][1], found[3][1]) == (1, 4)
    errors = [value for _, value in found[1:3] if isinstance(value, DataError)]
    assert [error.line for error in errors] == [2, 3]


def test_lines_are_read_one_at_a_time(tmp_path: Path) -> None:
    """A line is handed over before what follows it has been written."""
    path = tmp_path / "pipe.jsonl"
    os.mkfifo(path)
    taken, in_time = threading.Event(), []

    def write() -> None:
        with path.open("wb") as file:
            file.write(b'"first"\n')
            file.flush()
            in_time.append(taken.wait(10))

    writer = threading.Thread(target=write)
    writer.start()
    assert next(jsonl.read(path)) == (Place(path, 1), "first")
    taken.set()
    writer.join()
    assert in_time == [True]


def test_pipes_can_be_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for content, found in ((b"1\n2\n", [1, 2]), (b"\n[1,\n2]", [1, 2]), (b'{"a":\n1}', [{"a": 1}])):
        writer = threading.Thread(target=pipe.write_bytes, args=(content,))
        writer.start()
        assert [value for _, value in jsonl.read(pipe)] == found
        writer.join()


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for call in (lambda p: list(jsonl.read(p)), jsonl.read_document, jsonl.read_text):
        with pytest.raises(DataError, match=r"cannot read .*none: No such file"):
            call(tmp_path / "none")
        with pytest.raises(DataError, match=r"cannot read .*: Is a directory"):
            call(tmp_path)


def test_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "b\r\n"}'.replace(b"\r\n", b"\\r\\n"))
    assert jsonl.read_document(path) == {"a": "b\r\n"}
    path.write_bytes(b"{")
    with pytest.raises(DataError, match=r"a\.json is not valid JSON: Expecting .*line 1 column 2"):
        jsonl.read_document(path)
    path.write_bytes(b"a\r\n\xff")
    with pytest.raises(DataError, match=r"a\.json:2: not UTF-8 at byte 0"):
        jsonl.read_text(path)
