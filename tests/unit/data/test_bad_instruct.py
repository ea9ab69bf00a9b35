"""Bad instruction data: each case with the message a user sees, which names file and line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import status

from common.errors import DataError
from data.conversations.convert_instruct import main as convert_main
from data.conversations.instruct import read_examples
from data.conversations.instruct_dataset import (
    InstructDataset,
    Limits,
    PackedDataset,
    Passes,
    collate,
)
from data.conversations.instruct_store import open_instruct
from data.conversations.make_task import make_task
from data.conversations.preference import PreferenceDataset, read_pairs
from data.conversations.tasks import find_task
from data.prepare import main as prepare_main
from data.tokenizer import load_tokenizer


def lines(*records: Any) -> str:
    return "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n"


def turns(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


GOOD = {"src": "q", "tgt": "a"}
SQUAD = {"context": "C.", "question": "Q?", "answers": [{"text": "C"}]}

# File name, content, and what the message says; {f} is the file.
FILES: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("a.jsonl", "", "{f} is empty"),
    "blank": ("a.jsonl", " \n\n", "{f} is empty"),
    "not data": ("a.txt", "Once upon a time", "{f} holds neither JSON nor CSV nor Parquet"),
    "lfs": ("a.json", "version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "compressed": ("a.jsonl.gz", b"\x1f\x8b", "{f} is compressed: unpack it first (`gzip -dk a."),
    "not UTF-8": ("a.jsonl", '{"src": "é"}'.encode("latin-1"), "{f}:1: not UTF-8 at byte 9 (0xe9)"),
    "empty array": ("a.json", "[]", "{f} holds an empty JSON array"),
    "cut array": ("a.json", '[{"src": "q",\n', "{f}:2: not JSON: Expecting property"),
    "cut line": ("a.jsonl", lines(GOOD, '{"src": '), "{f}:2: not JSON: Expecting value (column 9)"),
    "no object": ("a.jsonl", lines(GOOD, "[1]"), "{f}:2: a record must be a JSON object, not list"),
    "array of text": ("a.json", '["a"]', "{f} item 1: a record must be a JSON object, not str"),
    "unknown keys": ("a.jsonl", lines({"q": 1}), "{f}:1: no known format has the keys 'q': alpaca"),
    "text": ("a.jsonl", lines({"text": "a"}), "text without questions is for data.prepare and"),
    "preference": (
        "a.jsonl",
        lines({"prompt": "p", "chosen": "a", "rejected": "b"}),
        "{f}:1: a preference pair (keys 'chosen' and 'rejected')",
    ),
    "other keys later": ("a.jsonl", lines(GOOD, {"source": "q"}), "{f}:2: no 'src' (its keys:"),
    "empty answer": (
        "a.jsonl",
        lines(GOOD, {"src": "q", "tgt": " "}),
        "{f}:2: the answer is empty",
    ),
    "empty prompt": (
        "a.jsonl",
        lines({"src": " ", "tgt": "a"}),
        "{f}:1: the prompt is empty (turn",
    ),
    "number": ("a.jsonl", lines({"src": "q", "tgt": 4}), "{f}:1: 'tgt' must be a string, not int"),
    "null": ("a.jsonl", lines({"src": "q", "tgt": None}), "{f}:1: no 'tgt' (its keys: 'src'"),
    "NUL": ("a.jsonl", lines({"src": "q\0", "tgt": "a"}), "{f}:1: the text holds a NUL"),
    "surrogate": ("a.jsonl", '{"src": "q\\ud800", "tgt": "a"}', "{f}:1: the text holds the lone"),
    "uneven turns": (
        "a.jsonl",
        lines({"src": ["a", "b"], "tgt": ["c"]}),
        "{f}:1: 'src' has 2 turns and 'tgt' has 1: each question needs its answer",
    ),
    "no turns": ("a.jsonl", lines({"src": [], "tgt": []}), "{f}:1: 'src' is an empty list"),
    "no instruction": (
        "a.json",
        json.dumps([{"instruction": "", "input": "x", "output": "y"}]),
        "{f} item 1: 'instruction' is empty",
    ),
    "history": (
        "a.jsonl",
        lines({"instruction": "i", "output": "o", "history": [["a"]]}),
        "{f}:1: 'history' must be a list of [question, answer] pairs",
    ),
    "sender": (
        "a.jsonl",
        lines({"conversations": [{"from": "humann", "value": "a"}]}),
        "{f}:1: turn 1 is from 'humann', did you mean human?; known are system, human",
    ),
    "sender missing": (
        "a.jsonl",
        lines({"conversations": [{"value": "a"}]}),
        "{f}:1: turn 1 must be an object with 'from' and 'value'",
    ),
    "no list": ("a.jsonl", lines({"messages": "hi"}), "{f}:1: 'messages' must be a list, not str"),
    "no messages": ("a.jsonl", lines({"messages": []}), "{f}:1: the conversation is empty"),
    "role": (
        "a.jsonl",
        lines(turns(("users", "a"), ("assistant", "b"))),
        "{f}:1: turn 1 has the role 'users', did you mean user?",
    ),
    "picture": (
        "a.jsonl",
        lines({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        "{f}:1: turn 1 has a part of type 'image_url'; only text can be used",
    ),
    "no assistant": ("a.jsonl", lines(turns(("user", "a"))), "{f}:1: no turn is the assistant's"),
    "assistant first": (
        "a.jsonl",
        lines(turns(("system", "s"), ("assistant", "a"))),
        "{f}:1: it begins with the assistant's turn: there is nothing to answer",
    ),
    "question last": (
        "a.jsonl",
        lines(turns(("user", "a"), ("assistant", "b"), ("user", "c"))),
        "{f}:1: the last turn is the user's, so it has no answer",
    ),
    "empty answer inside": (
        "a.jsonl",
        lines(turns(("user", "a"), ("assistant", ""), ("user", "c"), ("assistant", "d"))),
        "{f}:1: the answer is empty (turn 2 of 4)",
    ),
    "late system": (
        "a.jsonl",
        lines(turns(("user", "a"), ("system", "s"), ("assistant", "b"))),
        "{f}:1: turn 2 is the system's, which must be first",
    ),
    "system twice": (
        "a.jsonl",
        lines({**turns(("system", "s"), ("user", "a"), ("assistant", "b")), "system": "t"}),
        "{f}:1: it has two system messages",
    ),
    "SQuAD 2": (
        "a.json",
        json.dumps(
            {"data": [{"paragraphs": [{"context": "C.", "qas": [{"id": "7", "question": "Q?"}]}]}]}
        ),
        "{f} question 7: a question without an answer: only SQuAD v1.1",
    ),
    "SQuAD without qas": (
        "a.json",
        json.dumps({"data": [{"paragraphs": [{"context": "C."}]}]}),
        "{f}, data[1].paragraphs[1] needs a list of objects under 'qas': is this SQuAD v1.1?",
    ),
    "SQuAD without context": (
        "a.jsonl",
        lines(SQUAD, {**SQUAD, "context": " "}),
        "{f}:2: the context or the question is empty",
    ),
    "SQuAD answers": (
        "a.jsonl",
        lines({**SQUAD, "answers": 3}),
        "{f}:1: 'answers' must be a list, not int",
    ),
    "CSV cells": ("a.csv", "src,tgt\nq,a\nq,a,b\n", "{f}:3: 3 cells where there are 2 columns"),
    "CSV header": ("a.csv", "src,src\nq,a\n", "{f}:1: the column 'src' stands twice in the header"),
    "CSV without rows": ("a.csv", "src,tgt\n", "{f} holds a header but no rows"),
    "CSV quotes": (
        "a.csv",
        'src,tgt\nq,"a\n',
        "{f}:2: the row that begins here is no CSV: unexpected end",
    ),
    "CSV columns": ("a.csv", "a,b\n1,2\n", "{f}:2: no known format has the keys 'a', 'b'"),
    "Parquet": ("a.parquet", "src,tgt\n", "{f} is no Parquet file: it begins with b'src,'"),
    "cut Parquet": ("a.parquet", b"PAR1 and no more", "{f} is no Parquet file, or damaged"),
}


@pytest.mark.parametrize("case", FILES)
def test_files(case: str, tmp_path: Path) -> None:
    name, content, message = FILES[case]
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        read_examples([path])
    assert message.format(f=path) in str(caught.value)


def test_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or directory: no\.json"):
        read_examples(["no.json"])
    with pytest.raises(DataError, match=r"has no file ending in \.json, \.jsonl"):
        read_examples([tmp_path])
    with pytest.raises(DataError, match="no data file was given"):
        read_examples([])
    with pytest.raises(DataError, match="unknown format 'alpacca', did you mean alpaca"):
        read_examples([tmp_path], format="alpacca")
    path = tmp_path / "a.jsonl"
    path.write_text(lines({"src": "q"}))
    with pytest.raises(DataError, match=r"a.jsonl:1: no 'conversations' \(its keys: 'src'\)"):
        read_examples([path], format="sharegpt")
    with pytest.raises(DataError, match=r"no usable example in .*; 1 bad records, the first: "):
        read_examples([path], on_bad="skip")


PAIRS: dict[str, tuple[Any, str]] = {
    "no chosen": ({"prompt": "p", "rejected": "b"}, "{f}:1: no 'chosen' (its keys: 'prompt'"),
    "same": ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    "empty prompt": ({"prompt": " ", "chosen": "a", "rejected": "b"}, "the prompt is empty"),
    "empty": ({"prompt": "p", "chosen": "a", "rejected": " "}, "rejected is an empty answer"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "there is no 'prompt', and 'chosen' is a str"),
    "user last": (
        {"chosen": turns(("user", "a"))["messages"], "rejected": turns(("user", "b"))["messages"]},
        "chosen has to end with the assistant's turn, not user",
    ),
    "no question": (
        {
            "chosen": turns(("assistant", "a"))["messages"],
            "rejected": turns(("assistant", "b"))["messages"],
        },
        "chosen is an answer without a prompt",
    ),
    "two prompts": (
        {
            "chosen": turns(("user", "a"), ("assistant", "x"))["messages"],
            "rejected": turns(("user", "b"), ("assistant", "y"))["messages"],
        },
        "chosen and rejected differ before their last answer",
    ),
    "role": (
        {"prompt": "p", "chosen": [{"role": "bot", "content": "a"}], "rejected": "b"},
        "chosen: turn 1 has the role 'bot'",
    ),
    "not JSON": ("{", "{f}:1: not JSON: Expecting property"),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs(case: str, tmp_path: Path) -> None:
    record, message = PAIRS[case]
    path = tmp_path / "a.jsonl"
    path.write_text(lines(record))
    with pytest.raises(DataError) as caught:
        read_pairs([path])
    assert message.format(f=path) in str(caught.value)


TEMPLATES = {
    "no roles": ("{{ bos_token }}{{ messages[0]['content'] }}", "leaves out the assistant's text"),
    "no eos": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "no control token ends a generation",
    ),
    "no user": (
        "{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
        "{% endfor %}",
        "leaves out what the user says (turn 1)",
    ),
    "refuses": ("{{ raise_exception('not today') }}", "refuses these messages: not today"),
    "counts": (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
        "the template writes the turns before turn 2 differently when it follows: '1Question",
    ),
    "not Jinja": ("{% for", "the chat template is not valid Jinja, line 1"),
    "chatml": ("chatml", "template ends an answer with 'Answer<|im_end|>\\n', in which no control"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates(case: str, tiny_model: Path, tmp_path: Path) -> None:
    template, message = TEMPLATES[case]
    tokenizer = load_tokenizer(tiny_model, chat_template=template)
    path = tmp_path / "a.jsonl"
    path.write_text(lines(GOOD))
    with pytest.raises(DataError) as caught:
        open_instruct(path, tokenizer)
    assert "the chat template cannot be trained with: " in str(caught.value)
    assert message in str(caught.value)


def test_a_base_models_end_of_turn(tiny_tiktoken: Path, tmp_path: Path) -> None:
    """Llama 3's base models name <|end_of_text|> alone; their instruct models <|eot_id|> too."""
    before = load_tokenizer(tiny_tiktoken, chat_template="llama3")
    before.save(tmp_path)
    eot = before.special.ids["<|eot_id|>"]
    (tmp_path / "a.jsonl").write_text(lines(GOOD))
    generation = tmp_path / "generation_config.json"
    for ids in ([before.eos_ids[0]], [before.eos_ids[0], eot]):
        generation.write_text(json.dumps({"eos_token_id": ids}))
        tokenizer = load_tokenizer(tmp_path)
        if eot in ids:
            assert open_instruct(tmp_path / "a.jsonl", tokenizer)[0]["labels"][-1] == eot
            continue
        message = rf"add {eot}, the id of <\|eot_id\|>, to eos_token_id in the model's generation"
        with pytest.raises(DataError, match=message):
            open_instruct(tmp_path / "a.jsonl", tokenizer)


def test_messages_that_a_template_refuses_are_named(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines(GOOD, {**GOOD, "system": "s"}))
    plain = load_tokenizer(tiny_model, chat_template="plain")
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*plain has no place for the role system"):
        open_instruct(path, plain)
    with pytest.raises(DataError, match=r"has no chat template: put a chat_template.jinja"):
        open_instruct(path, load_tokenizer(tiny_model))


def test_lengths(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model, chat_template="simple")
    path = tmp_path / "a.jsonl"
    path.write_text(lines(GOOD, {"src": "why " * 40, "tgt": "so " * 50}, GOOD))

    def opened(**options: Any) -> InstructDataset:
        return open_instruct(path, tokenizer, **options)

    with pytest.raises(DataError) as caught:
        opened(src_length=60, tgt_length=30)
    message = str(caught.value)
    assert message.startswith("1 of 3 examples are too long: 1 have a prompt above src_length=60, ")
    assert f"({path}:2)" in message and "1 have an answer above tgt_length=30" in message
    assert "Raise src_length and tgt_length, or say on_long=truncate (cut them)" in message
    with pytest.raises(DataError, match="no example is left of 3: all are too long"):
        opened(tgt_length=1, on_long="skip")
    with pytest.raises(DataError, match="src_length must be at least 1, got 0"):
        opened(src_length=0)
    with pytest.raises(DataError, match="on_long must be error, truncate or skip, got 'cut'"):
        opened(on_long="cut")
    with pytest.raises(DataError, match="1 of 3 examples do not fit into a row of 40 tokens"):
        PackedDataset(opened(), 40)
    with pytest.raises(DataError, match="max_length must be at least 1, got 0"):
        PackedDataset(opened(), 0)
    with pytest.raises(DataError, match="there are no samples to collate"):
        collate([])
    with pytest.raises(DataError, match="'labels' has 1 entries, 'input_ids' has 2"):
        collate([{"input_ids": np.zeros(2, np.int64), "labels": np.zeros(1, np.int64)}])
    with pytest.raises(DataError, match="num_samples must be at least 1, got 0"):
        Passes(opened(), 0, 1)
    pairs = tmp_path / "p.jsonl"
    pairs.write_text(lines({"prompt": "p", "chosen": "a " * 40, "rejected": "b"}))
    with pytest.raises(DataError, match=r"too long: 1 have an answer.*p\.jsonl:1 \(chosen\)"):
        PreferenceDataset(read_pairs([pairs]), tokenizer, limits=Limits(tgt_length=20))


CLI: dict[str, tuple[list[str], str]] = {
    "pretraining's flag": (["--append_eos"], "append_eos is given but task is not pretrain"),
    "no template": ([], "has no chat template"),
    "template": (["--chat_template", "alpac"], "unknown chat template 'alpac': choose llama2"),
    "task": (
        ["--task", "instructt"],
        "task='instructt' is not one of pretrain, instruct; did you mean 'instruct'?",
    ),
    "format": (
        ["--input_format", "txt", "--chat_template", "simple"],
        "unknown format 'txt'",
    ),
    "no file": (["--input", "none.json"], "no such file or directory: none.json"),
    "long": (["--chat_template", "simple", "--src_length", "3"], "1 of 1 examples are too long"),
    "there": (["--output_prefix", "there"], "there.idx exists already: choose another prefix"),
}


@pytest.mark.parametrize("case", CLI)
def test_command_line(
    case: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(lines(GOOD))
    Path("there.idx").write_bytes(b"")
    more, message = CLI[case]
    given = {"--task": "instruct", "--input": "a.jsonl", "--output_prefix": "out"}
    usual = [word for name, value in given.items() if name not in more for word in (name, value)]
    assert status(prepare_main, [*usual, "--tokenizer", str(tiny_model), *more]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "there.idx"]
    arguments = ["--input", "a.jsonl", "--tokenizer", str(tiny_model), "--output_prefix", "out"]
    assert status(prepare_main, [*arguments, "--src_length", "3"]) == 2
    assert "src_length is given but task is not instruct; choose" in capsys.readouterr().err


def test_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for call, message in (
        (lambda: find_task("squadd"), "unknown task_name 'squadd', did you mean squad?"),
        (lambda: find_task(None), "say what to train on: a task_name (squad, alpaca"),
        (lambda: find_task("squad", "v2"), "the sample of squad has no part named 'v2'"),
        (lambda: find_task("x", None, tmp_path / "no"), "nothing is at dataset_path"),
        (lambda: find_task("x", None, tmp_path), "has no file train.*"),
        (lambda: find_task("x", "part", tmp_path), "has no directory 'part'; it has none"),
        (lambda: make_task("keywords", tmp_path), "unknown task 'keywords', did you mean keyword"),
        (lambda: make_task("keyword", tmp_path, train=0), "train must be at least 1, got 0"),
        (
            lambda: make_task("keyword", tmp_path, train=10**5),
            "100100 were asked for: lower train or dev",
        ),
    ):
        with pytest.raises(DataError) as caught:
            call()
        assert message in str(caught.value)
    for name in ("train.json", "train.csv"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(DataError, match=r"may be its part 'train' \(train.csv, train.json\)"):
        find_task("x", None, tmp_path)
    source = tmp_path / "src.jsonl"
    source.write_text(lines(GOOD))
    out = str(tmp_path / "out.jsonl")
    assert (
        status(convert_main, ["--input", str(source), "--output", out, "--prompt", "alpaca"]) == 2
    )
    message = "src.jsonl:1: the prompt 'alpaca' is for records in the alpaca format, not src_tgt"
    assert message in capsys.readouterr().err
    assert not Path(out).exists()
