"""What random records found: words beside the usual ones that were lost, or a traceback.

`tests/fuzz/records.py` found each; a slice of it runs here too.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from common import jsonl
from common.errors import DataError
from data.conversations.convert_instruct import convert
from data.conversations.instruct import read_examples
from data.conversations.preference import Pair, read_pairs
from tests.fuzz import records as fuzz
from tests.unit.data.records import ASK, RAIN, SIMPLE, answer, write

SYSTEM = {"role": "system", "content": "Be kind."}
Q, A = SIMPLE
BARE = {"name": "now", "arguments": {}}
NOW = {"type": "function", "function": BARE}
# Record, and the turns that it has.
READ: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "system_prompt": ({"src": "q", "tgt": "a", "system_prompt": "Be kind."}, [SYSTEM, Q, A]),
    "system said twice": ({"messages": [SYSTEM, *SIMPLE], "system": "Be kind. "}, [SYSTEM, Q, A]),
    "system beside an empty context": (
        {"src": "q", "tgt": "a", "system": "Be kind.", "context": {}},
        [SYSTEM, Q, A],
    ),
    "system beside a blank one": (
        {"messages": [{**SYSTEM, "content": " "}, *SIMPLE], "system": "Be kind."},
        [SYSTEM, Q, A],
    ),
    "system of SQuAD": (
        {"context": "c", "question": "q", "answers": ["a"], "system": "Be kind."},
        [SYSTEM, {**Q, "content": "Text: c\n\nQuestion: q\n\nAnswer:"}, A],
    ),
    "a call without its wrapping": (
        {"messages": [ASK, answer("", tool_calls=[BARE]), RAIN, answer("b")]},
        [ASK, answer("", tool_calls=[NOW]), RAIN, answer("b")],
    ),
    "a column without answers": (
        {"prompt": "q", "completion": "", "response": "a"},
        [Q, A],
    ),
    "mask of the user": ({"messages": SIMPLE, "mask": "User", "masked": False}, [Q, A]),
    "weights that are words": ({"src": "q", "tgt": "a", "weight": "3 kg", "label": 0}, [Q, A]),
    "yes in a table": ({"src": "q", "tgt": "a", "weight": "1.0", "train": "True"}, [Q, A]),
    "no mark": ({"src": "q", "tgt": "a", "is_impossible": "False", "history": []}, [Q, A]),
    "both spellings": ({"messages": [{**Q, "from": "human", "value": "q"}, A]}, [Q, A]),
}


@pytest.mark.parametrize("case", READ)
def test_read(case: str, tmp_path: Path) -> None:
    record, turns = READ[case]
    (example,) = read_examples([write(tmp_path / "a.jsonl", record)])
    stripped = [{**turn, "content": turn["content"].strip()} for turn in example.messages]
    assert stripped == turns


TWICE = {"from": "function_call", "value": json.dumps(BARE), "tool_calls": [NOW]}
PAIR = {"chosen": [Q, A], "rejected": [Q, answer("b")]}
# Record, and what the message says.
REFUSED: dict[str, tuple[Any, str]] = {
    "no in a table": ({"src": "q", "tgt": "a", "weight": "0"}, "weight='0' says that this record"),
    "false in a table": ({"src": "q", "tgt": "a", "label": "False"}, "label='False' says that"),
    "a share in a table": ({"src": "q", "tgt": "a", "loss_scale": "0.5"}, "loss_scale='0.5' says"),
    "weights of turns": ({"messages": SIMPLE, "weight": [0, 1]}, "weight=[0, 1] says that this"),
    "ms-swift's pair": ({"messages": SIMPLE, "rejected_messages": [A]}, "for preference tuning"),
    "boxes": ({"messages": SIMPLE, "objects": {"ref": ["a"]}}, "'objects' cannot be honoured"),
    "torchtune's mark": (
        {"messages": [Q, {**A, "masked": True}]},
        "'masked' cannot be honoured: a turn is learnt as a whole",
    ),
    "mask of the assistant": ({"messages": SIMPLE, "mask": "Assistant"}, "'mask' cannot be"),
    "two systems": (
        {"src": "q", "tgt": "a", "system": "A", "context": {"system": "B"}},
        "it has two system messages, 'A' and 'B'",
    ),
    "context of src": ({"src": "q", "tgt": "a", "context": "c"}, "may hold a 'system' only"),
    "more context": ({"src": "q", "tgt": "a", "context": {"x": 1}}, "may hold a 'system' only"),
    "context of messages": ({"messages": SIMPLE, "context": "c"}, "'context' cannot be honoured"),
    "history of messages": ({"messages": SIMPLE, "history": [["q", "a"]]}, "'history' cannot be"),
    "history that is none": ({"instruction": "q", "output": "a", "history": 1}, "must be a list"),
    "two answers": (
        {"prompt": "q", "completion": "a", "response": "b"},
        "it has prompt/completion and prompt/response, which differ",
    ),
    "SQuAD's two answers": (
        {"context": "c", "question": "q", "answers": ["a"], "answer": "b"},
        "it has 'answers' and 'answer'",
    ),
    "answers that are none": ({"src": "q", "tgt": "a", "answers": 1}, "'answers' must be a string"),
    "two spellings": (
        {"conversations": [{"from": "human", "value": "q", "content": "p"}, A]},
        "turn 1 has from/value and role/content, which differ",
    ),
    "two roles": (
        {"messages": [{**Q, "from": "gpt"}, A]},
        "turn 1 has role/content and from/value, which differ",
    ),
    "calls twice": (
        {"conversations": [{"from": "human", "value": "q"}, TWICE]},
        "turn 2 spells calls as its value and in 'tool_calls'",
    ),
    "a sender that is a list": ({"conversations": [{"from": [], "value": "q"}]}, "is from []"),
    "a role that is missing": (
        {"conversations": [Q, {"content": "", "tool_calls": [NOW]}]},
        "turn 2 must be an object with 'role'",
    ),
    "two prompts": ({"prompt": [Q], "conversations": [Q], **PAIR}, "it has a prompt twice"),
    "two systems of a pair": (
        {"system": "A", "prompt": [{**SYSTEM, "content": "B"}, Q], **PAIR},
        "it has two system messages, 'A' and 'B'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    record, message = REFUSED[case]
    path = write(tmp_path / "a.jsonl", record)
    with pytest.raises(DataError) as caught:
        (read_pairs if "chosen" in record else read_examples)([path])
    assert message in str(caught.value) and f"{path}:1" in str(caught.value)


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"src": "q", "tgt": "a"}\n{"src": "q", "tgt": "a", "tgt": "b"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON: the key 'tgt' stands twice"):
        read_examples([path])
    assert len(read_examples([path], on_bad="skip")) == 1
    path.write_text('{"data": [{"x": 1, "x": 2}]}')
    with pytest.raises(DataError, match=r"the key 'x' stands twice"):
        list(jsonl.read(path))


# A pair but for its answers, and the turns before them.
BEFORE: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "beside whole conversations": ({"system": "Be kind."}, [Q]),
    "twice": ({"system": "Be kind.", "prompt": [SYSTEM, Q]}, []),
    "of another key": ({"system_prompt": "Be kind.", "prompt": "q"}, []),
    "under a null prompt": ({"prompt": None, "conversations": [SYSTEM, Q]}, []),
}


@pytest.mark.parametrize("case", BEFORE)
def test_systems_of_pairs(case: str, tmp_path: Path) -> None:
    record, before = BEFORE[case]
    sides = {"chosen": [*before, A], "rejected": [*before, answer("b")]}
    (pair,) = read_pairs([write(tmp_path / "a.jsonl", {**record, **sides})])
    assert pair == Pair((SYSTEM, Q, A), (SYSTEM, Q, answer("b")), pair.name)


@pytest.mark.parametrize("prompt", ["none", "alpaca"])
def test_conversion_keeps_accepted_answers(prompt: str, tmp_path: Path) -> None:
    record = {"instruction": "q", "output": "a", "answers": ["A"], "system_prompt": "Be kind."}
    path = write(tmp_path / "a.jsonl", record)
    convert([path], tmp_path / "b.jsonl", prompt=prompt)
    (example,) = read_examples([tmp_path / "b.jsonl"])
    assert example.answers == ("A",) and example.messages[0] == SYSTEM


def test_random_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--cases", "60", "--seed", "20260101", "--seconds", "60"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("records: 60 cases:") and " equal" in said
