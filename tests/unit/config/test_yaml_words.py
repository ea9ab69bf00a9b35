"""Values of configuration files are the words that stand there, whatever YAML takes them for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from common.errors import UserError
from common.flags import arg, load
from llm.config.scripts import SCRIPTS


@dataclass
class Fields:
    """One field of each kind."""

    word: str = arg("x", "help")
    maybe: str | None = arg("y", "help")
    choice: Literal["steps", "no"] = arg("steps", "help")
    count: int = arg(1, "help")
    rate: float = arg(1.0, "help")
    flag: bool | None = arg(None, "help")
    words: list[str] = arg([], "help")


class Refused:
    """Marks a value that is an error."""


WORDS = "no yes on off n y true 010 0o10 0x10 1e-5 1e5 12:30 1:30:00 2024-01-01 1_000 1.0 007 .5"
# Field, what the file says, and what it means.
ROWS: list[tuple[str, str, Any]] = [
    *(("word", word, word) for word in (*WORDS.split(), "=", ".inf", "2024-01-01 10:00:00")),
    *(("word", f"'{word}'", word) for word in WORDS.split()),
    *(("word", nothing, Refused) for nothing in ("null", "~", "", "[a]")),
    ("word", "'null'", "null"),
    *(("maybe", nothing, None) for nothing in ("null", "~", "", "none")),
    *(("maybe", word, word) for word in WORDS.split()),
    *(("choice", word, "no") for word in ("no", "'no'", '"no"')),
    *(("choice", word, Refused) for word in ("off", "No", "false", "yes")),
    *(("count", word, 10) for word in ("10", "'10'", "010", "1e1", "10.0", "+10", "1_0")),
    *(("count", word, Refused) for word in ("0o10", "0x10", "0b1", "12:30", "1:30", "no", "true")),
    *(("count", word, Refused) for word in ("2024-01-01", "1.5", "1e400", "null", "", ".inf")),
    *(("rate", word, 1e-5) for word in ("1e-5", "1.0e-5", "'1e-5'", "0.00001", "+1E-5")),
    *(("rate", word, 0.5) for word in (".5", "0.5", "5e-1")),
    *(("rate", word, Refused) for word in ("1:30", "12:30:45", "no", "nan", ".inf", "0x10", "1,5")),
    *(("flag", word, False) for word in ("no", "off", "false", "False", "0", "'no'", "NO")),
    *(("flag", word, True) for word in ("yes", "on", "true", "TRUE", "1", "'on'")),
    *(("flag", word, Refused) for word in ("n", "y", "2", "1.0", "[yes]")),
    ("words", "[no, 010, 1e-5, 12:30, null]", Refused),
    ("words", "[no, 010, 1e-5, 12:30]", ["no", "010", "1e-5", "12:30"]),
    ("words", "\n- no\n- on", ["no", "on"]),
    ("words", "no", ["no"]),
]


def read(name: str, text: str, path: Path) -> Any:
    path.write_text(f"{name}: {text}\n")
    (fields,) = load([Fields], [str(path)], prog="test")
    return getattr(fields, name)


@pytest.mark.parametrize(("name", "text", "meaning"), ROWS, ids=str)
def test_words(name: str, text: str, meaning: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    if meaning is Refused:
        with pytest.raises(UserError, match=name):
            read(name, text, path)
        return
    found = read(name, text, path)
    assert found == meaning and type(found) is type(meaning)


def test_a_file_says_what_the_command_line_says(tmp_path: Path) -> None:
    """The second source of the same words, for every row whose value is one plain word."""
    for name, text, meaning in ROWS:
        if not text or text[0] in "'\"[\n" or text in ("~", "null") or " " in text:
            continue
        try:
            (fields,) = load([Fields], [f"--{name}", text], prog="test")
            assert getattr(fields, name) == meaning, (name, text)
        except UserError:
            assert meaning is Refused, (name, text)


def test_json_has_types_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"count": 10, "rate": 1e-5, "flag": False, "words": ["no"]}))
    (fields,) = load([Fields], [str(path)], prog="test")
    assert (fields.count, fields.rate, fields.flag, fields.words) == (10, 1e-5, False, ["no"])
    path.write_text(json.dumps({"word": False}))
    with pytest.raises(UserError, match="word=False is not a valid str"):
        load([Fields], [str(path)], prog="test")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.yaml", "count: 1\nrate: 2\ncount: 3\n"),
        ("c.json", '{"count": 1, "rate": 2, "count": 3}'),
        ("d.yaml", "{count: 1, count: 1}"),
    ],
)
def test_a_key_stands_once(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=r"the key 'count' stands twice"):
        load([Fields], [str(tmp_path / name)], prog="test")


@pytest.mark.parametrize("script", ["run_pretrain.py", "finetune_generation.py"])
def test_no_means_no(script: str, tmp_path: Path) -> None:
    """As in the recipes of other suites."""
    path = tmp_path / "c.yaml"
    path.write_text("save_strategy: no\nevaluation_strategy: no\ndo_train: yes\noutput_dir: 010\n")
    needed = {
        "run_pretrain.py": ["--input_dir", "x", "--max_steps", "1"],
        "finetune_generation.py": ["--task_name", "squad"],
    }[script]
    model = ["--model_name_or_path", "__internal_testing__/tiny-random-llama"]
    groups = load(SCRIPTS[script], [str(path), *needed, *model], prog=script)
    found = {name: value for group in groups for name, value in vars(group).items()}
    assert found["save_strategy"] == found["evaluation_strategy"] == "no"
    assert found["output_dir"] == "010" and found["do_train"] is True
