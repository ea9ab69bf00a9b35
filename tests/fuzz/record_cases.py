"""Random files of records in every format and container, with extra, missing and mistyped keys."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
from pyarrow import parquet

from tests.fuzz.record_reading import MARKS, NOWHERE, SENDERS, Refused

Record = dict[str, Any]
WORDS = (
    *("rain", "sun", "Ulm", "two", "zwei", "漢字", "🦙", "é", "e\u0301", "שלום", "</s>", "<s>"),
    *("[INST]", "{{ x }}", "{% if %}", '"q"', "\\", "a,b", "a;b", "'", "null", "0", "=1+1"),
    *("\u2028", "\u2029", "\x85", "\x0b", "\t", "\n", "\n\n", "  ", "\r\n", "assistant:", "- "),
)
BROKEN = ("\0", "a\0b", "\ud800", "x\udfff")
ODD = (None, True, False, 0, 1, 2, 0.5, -1, "", " ", "x", [], [1], {}, {"a": 1}, "[]", "{}", 10**20)
MEANINGLESS = ("id", "source", "category", "lang", "score", "prompt_id", "url", "turn", "_x")
CALLS = (
    {"function": {"name": "weather", "arguments": '{"town": "Ulm"}'}},
    {"id": "c1", "type": "function", "function": {"name": "sum", "arguments": {"of": [1, 2]}}},
    {"name": "now", "arguments": {}},
    {"function": {"name": "now"}},
)
TOOLS = ({"type": "function", "function": {"name": "weather", "description": "tells it"}},)


@dataclass(frozen=True)
class Case:
    """A file, the records in it as any reader sees them, their places, and which are as made."""

    kind: str
    path: Path
    records: list[Any]
    names: list[str]
    clean: list[bool]


def words(draw: Random) -> str:
    """A text that is not blank, with all that breaks readers inside it."""
    inner = [draw.choice(WORDS) for _ in range(draw.randint(0, 6))]
    return draw.choice(("", " ")).join([draw.choice(("So", "one", "Ünd", "答")), *inner, "end"])


def turns(draw: Random, style: str) -> list[Record]:
    """A conversation, its turns spelled as sharegpt or as messages."""
    roles = ["system"] * draw.choice((0, 0, 1))
    for _ in range(draw.randint(1, 3)):
        roles += ["user", "assistant"]
        if draw.random() < 0.15:
            roles += ["tool", "assistant"]
    made = []
    for role in roles:
        item: Record = {"content": words(draw)}
        if role == "assistant" and draw.random() < 0.15:
            item["tool_calls"] = [draw.choice(CALLS) for _ in range(draw.randint(1, 2))]
            item["content"] = draw.choice((None, item["content"], ""))
        if role == "assistant" and draw.random() < 0.1:
            item["reasoning_content"] = words(draw)
        if role == "assistant" and draw.random() < 0.2:
            item[draw.choice(MARKS)] = draw.choice((0, 1, True, False, 0.0, 1.0, None))
        if draw.random() < 0.1 and item["content"]:
            half = len(item["content"]) // 2
            item["content"] = [
                {"type": "text", "text": part}
                for part in (item["content"][:half], item["content"][half:])
            ]
        made.append(spelled(draw, role, item, style))
    return made


def spelled(draw: Random, role: str, item: Record, style: str) -> Record:
    if style == "messages":
        return {"role": role, **item}
    names = [name for name, meant in SENDERS.items() if meant == role and name != "function_call"]
    content = item.pop("content")
    if not isinstance(content, str):
        content = words(draw)
    if role == "assistant" and draw.random() < 0.1 and "tool_calls" not in item:
        value = {"name": "weather", "arguments": {"town": words(draw)}}
        return {"from": "function_call", "value": json.dumps(value), **item}
    return {"from": draw.choice(names), "value": content, **item}


def alpaca(draw: Random) -> Record:
    record: Record = {"instruction": words(draw), "output": words(draw)}
    if draw.random() < 0.6:
        record["input"] = draw.choice((words(draw), "", None))
    if draw.random() < 0.2:
        record["history"] = [[words(draw), words(draw)] for _ in range(draw.randint(0, 2))]
    return record


def sharegpt(draw: Random) -> Record:
    return {"conversations": turns(draw, "sharegpt")}


def messages(draw: Random) -> Record:
    return {draw.choice(("messages", "messages", "conversations")): turns(draw, "messages")}


def src_tgt(draw: Random) -> Record:
    keys = draw.choice((("src", "tgt"), ("prompt", "completion"), ("prompt", "response")))
    count = draw.choice((0, 0, 1, 3))
    sides = [[words(draw) for _ in range(count)] if count else words(draw) for _ in keys]
    record: Record = dict(zip(keys, sides, strict=True))
    if draw.random() < 0.2:
        record["context"] = draw.choice(({"system": words(draw)}, {}, None))
    return record


def squad(draw: Random) -> Record:
    answers = [words(draw) for _ in range(draw.randint(1, 3))]
    shape: Any = draw.choice(
        (
            answers,
            answers[0],
            {"text": answers, "answer_start": [0] * len(answers)},
            [{"text": one, "answer_start": 0} for one in answers],
        )
    )
    key = draw.choice(("answers", "answers", "answer"))
    return {"context": words(draw), "question": words(draw), key: shape, "id": "1", "title": "T"}


def pair(draw: Random) -> Record:
    """A pair in one of the layouts in which files hold the prompt."""
    style = draw.choice(("messages", "sharegpt"))
    talk = turns(draw, style)[:-1]
    user = "content" if style == "messages" else "value"
    good, bad = ({"role": "assistant", "content": f"{words(draw)} {n}"} for n in "ab")
    if draw.random() < 0.3:
        return {"prompt": words(draw), "chosen": good["content"], "rejected": bad["content"]}
    record: Record = {}
    ways = ("beside", "single", "repeated", "last", "inside", "spaced")
    way = draw.choice(ways)
    prompt = json.loads(json.dumps(talk))
    before: list[Record] = []
    if way in ("repeated", "inside", "spaced"):
        before = json.loads(json.dumps(talk))
    elif way == "last" and talk[-1].get("role", SENDERS.get(talk[-1].get("from"))) == "user":
        before = json.loads(json.dumps(talk[-1:]))
    if way == "spaced" and isinstance(prompt[0].get(user), str):
        prompt[0][user] = f" {prompt[0][user]}\n"
    if way != "inside":
        record[draw.choice(("prompt", "prompt", "conversations"))] = prompt
    if style == "sharegpt":
        good, bad = ({"from": "gpt", "value": one["content"]} for one in (good, bad))
    if way == "single":
        return {**record, "chosen": good, "rejected": bad}
    return {**record, "chosen": [*before, good], "rejected": [*before, bad]}


FORMATS: dict[str, Callable[[Random], Record]] = {
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "messages": messages,
    "src_tgt": src_tgt,
    "squad": squad,
    "pair": pair,
    "text": lambda draw: {"text": words(draw)},
}


def mutated(draw: Random, record: Record) -> Record:
    """A record with something else about it: what it means may have changed, or be nothing."""
    record = json.loads(json.dumps(record))
    places: list[Record] = [record]
    for value in list(record.values()):
        places += [
            item for item in (value if isinstance(value, list) else []) if type(item) is dict
        ]
    place = draw.choice(places)
    change = draw.randint(0, 9)
    if change == 0:
        place[draw.choice(NOWHERE)] = draw.choice((*ODD, "User", ["a.png"]))
    elif change == 1:
        place[draw.choice((*MARKS, "label", "kto_tag"))] = draw.choice(ODD)
    elif change == 2 and place:
        place.pop(draw.choice(list(place)))
    elif change == 3 and place:
        place[draw.choice(list(place))] = draw.choice((*ODD, words(draw)))
    elif change == 4:
        record[draw.choice(("system", "system_prompt"))] = draw.choice((words(draw), "", None, 1))
    elif change == 5:
        other = FORMATS[draw.choice([name for name in FORMATS if name != "pair"])](draw)
        record |= {key: value for key, value in other.items() if key not in record}
    elif change == 6:
        record["tools"] = draw.choice((list(TOOLS), json.dumps(TOOLS), *ODD))
    elif change == 7 and place:
        place[draw.choice(list(place))] = words(draw) + draw.choice(BROKEN)
    elif change == 8:
        keys = "history context answers prompt name tool_call_id tool_calls role content from value"
        place[draw.choice(keys.split())] = draw.choice(
            (*ODD, words(draw), [[words(draw), words(draw)]])
        )
    else:
        place[draw.choice(("reasoning", "thinking", "reasoning_content"))] = words(draw)
    return record


def make_case(seed: int, directory: Path) -> Case:
    """The case of a seed, its file written."""
    draw = Random(seed)
    kind = draw.choice(list(FORMATS))
    records: list[Any] = []
    clean = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        record: Any = FORMATS[kind](draw)
        if draw.random() < 0.2:
            record[draw.choice(MEANINGLESS)] = draw.choice((*ODD, words(draw)))
        clean.append(draw.random() < 0.3)
        for _ in range(0 if clean[-1] else draw.choice((1, 1, 2))):
            record = mutated(draw, record)
        records.append(draw.choice((1, "x", None, [1])) if draw.random() < 0.02 else record)
        clean[-1] &= records[-1] is record
    writer = _json if kind == "text" else draw.choice((_json, _json, _json, _csv, _parquet))
    try:
        return writer(draw, kind, directory / f"{seed}", records, clean)
    except (pyarrow.ArrowException, ValueError, TypeError, AttributeError, OverflowError):
        return _json(draw, kind, directory / f"{seed}", records, clean)  # no table holds these


def _json(draw: Random, kind: str, stem: Path, records: list[Any], clean: list[bool]) -> Case:
    """Lines, or a list, each under any ending; with a mark of the byte order, as on Windows, ..."""
    lines = draw.random() < 0.6
    path = stem.with_suffix(draw.choice((".jsonl", ".json", ".ndjson")))
    texts = []
    for number, record in enumerate(records):
        text = json.dumps(record, ensure_ascii=draw.random() < 0.5 or _has_surrogate(record))
        if isinstance(record, dict) and record and draw.random() < 0.03:
            key = draw.choice(list(record))
            text = f"{{{json.dumps(key)}: {json.dumps(draw.choice(ODD))}, {text[1:]}"
            lost = Refused if kind != "text" or key == "text" else record
            records = [*records[:number], lost, *records[number + 1 :]]
            clean = [*clean[:number], False, *clean[number + 1 :]]
        texts.append(text)
    end = draw.choice(("\n", "\n", "\r\n"))
    names = [f"{path} item {n}" for n in range(1, len(texts) + 1)]
    if lines:
        content, names, line = "", [], 1
        for text in texts:
            for _ in range(draw.choice((0, 0, 0, 1, 2))):
                content, line = content + draw.choice(("", " ")) + end, line + 1
            names.append(f"{path}:{line}")
            content, line = content + text + end, line + 1
        content = content if draw.random() < 0.7 else content.removesuffix(end)
    else:
        between = draw.choice((",", f",{end}", f" , {end}"))
        content = draw.choice(("[", f"[{end}")) + between.join(texts) + f"{end}]" * 1
    raw = content.encode("utf-8")
    path.write_bytes((b"\xef\xbb\xbf" if draw.random() < 0.2 else b"") + raw)
    if path.suffix == ".json" and lines and len(texts) == 1:
        names = [str(path)]
    return Case(kind, path, records, names, clean)


def _has_surrogate(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _columns(records: list[Any]) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record))


def _csv(draw: Random, kind: str, stem: Path, records: list[Any], clean: list[bool]) -> Case:
    """A table: every value is a text, and one that is missing is the empty one."""
    delimiter, ending = draw.choice(((",", ".csv"), (";", ".csv"), ("\t", ".tsv")))
    path = stem.with_suffix(ending)
    names = _columns(records)
    if not names or (delimiter == ";" and len(names) < 2):
        raise ValueError
    rows = [{name: _cell(record.get(name)) for name in names} for record in records]
    if any("\0" in cell or _has_surrogate(cell) for row in rows for cell in row.values()):
        raise ValueError
    places = []
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(
            file, delimiter=delimiter, quoting=draw.choice((csv.QUOTE_ALL, csv.QUOTE_MINIMAL))
        )
        writer.writerow(names)
        for row in rows:
            file.flush()
            places.append(f"{path}:{path.read_bytes().decode().count(chr(10)) + 1}")
            writer.writerow(row.values())
    simple = all(isinstance(value, str | None) for record in records for value in record.values())
    whole = [one and simple for one in clean]
    return Case(kind, path, rows, places, whole)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _parquet(draw: Random, kind: str, stem: Path, records: list[Any], clean: list[bool]) -> Case:
    """A table with types: what is missing is null, and nested objects have all keys."""
    path = stem.with_suffix(".parquet")
    names = _columns(records)
    table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in records])
    parquet.write_table(table, path)
    rows = parquet.read_table(path).to_pylist()
    if len(rows) != len(records):
        raise ValueError
    places = [f"{path} row {number}" for number in range(1, len(rows) + 1)]
    return Case(kind, path, rows, places, [False] * len(clean))
