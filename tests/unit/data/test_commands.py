"""The command lines of `data`: the suite's loader reads them, from words and from files."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from commands import status

from common.errors import UserError
from data import merge, prepare
from data.conversations import convert_instruct, make_task
from data.conversations.instruct import read_examples
from data.conversations.instruct_store import is_store
from data.corpus.token_store import TokenStore

REPO = Path(__file__).resolve().parents[3]
Main = Callable[[Sequence[str]], None]

COMMANDS: dict[str, Main] = {
    "data.prepare": prepare.main,
    "data.merge": merge.main,
    "data.conversations.convert_instruct": convert_instruct.main,
    "data.conversations.make_task": make_task.main,
}
REFUSED: list[tuple[str, str, str]] = [
    ("data.prepare", "", "--input is missing: files, directories or globs"),
    ("data.merge", "--output_prefix a", "--input is missing: prefixes of stores"),
    ("data.merge", "--input a", "--output_prefix is missing: where the store goes"),
    ("data.merge", "--input a --output_prefix b", "no token store at a"),
    ("data.merge", "--input a --output_prefix . --overwrite", "is a directory: add a name"),
    ("data.prepare", "--input a --tokenizer t", "--output_prefix is missing: where the store goes"),
    ("data.prepare", "--inptu a", "unknown 'inptu'; did you mean 'input'?"),
    ("data.prepare", "--input", "--input needs a value"),
    ("data.prepare", "a.txt --input a", "'a.txt' is not a flag"),
    (
        "data.prepare",
        "--dtype int64",
        "dtype='int64' is not one of auto, uint16, int32",
    ),
    ("data.prepare", "--on_long cut", "on_long='cut' is not one of error, truncate, skip"),
    ("data.prepare", "--src_length 0", "src_length=0 but the minimum is 1"),
    ("data.prepare", "none.yaml", "cannot read the config file none.yaml"),
    ("data.conversations.convert_instruct", "--input a", "--output is missing: the file of JSON"),
    ("data.conversations.convert_instruct", "--too sharegpt", "unknown 'too'; did you mean 'to'?"),
    (
        "data.conversations.convert_instruct",
        "--to share",
        "to='share' is not one of messages, sh",
    ),
    ("data.conversations.convert_instruct", "--input a --output .", "output . is a directory; giv"),
    ("data.conversations.make_task", "--output_dir d", "--name is missing: the rule"),
    ("data.conversations.make_task", "--name kind", "name='kind' is not one of keyword, kinds, "),
    ("data.conversations.make_task", "--train 0", "train=0 but the minimum is 1"),
    ("data.conversations.make_task", "--sed 1", "unknown 'sed'; did you mean 'seed'?"),
]


@pytest.mark.parametrize(("command", "words", "message"), REFUSED)
def test_refused(
    command: str, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(COMMANDS[command], words.split()) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err and not said.out


def test_a_file_of_flags_comes_first(tmp_path: Path, tiny_model: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n\n{name}\n")
    config = tmp_path / "prepare.yaml"
    config.write_text(
        f"input: [{tmp_path}/a.txt, {tmp_path}/b.txt]\ntokenizer_name_or_path: {tiny_model}\n"
        f"output_prefix: {tmp_path}/from_file\nappend_eos: true\ntxt_documents: file\n"
    )
    assert status(prepare.main, [str(config)]) == 0
    assert TokenStore.open(tmp_path / "from_file").num_documents == 2
    words = ["--output-prefix", f"{tmp_path}/from_words", "--txt_documents=line", "--workers", "1"]
    assert status(prepare.main, [str(config), *words, "--append_eos", "false"]) == 0
    store = TokenStore.open(tmp_path / "from_words")
    assert (store.num_documents, store.meta["append_eos"]) == (4, False)


def test_lists_take_several_values(tmp_path: Path, tiny_model: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"src": name, "tgt": "c"}))
    inputs = ["--input", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    out = tmp_path / "out.jsonl"
    assert status(convert_instruct.main, [*inputs, "--output", str(out)]) == 0
    assert [e.messages[0]["content"] for e in read_examples([out])] == ["a", "b"]
    words = [*inputs, "--output_prefix", str(tmp_path / "store"), "--tokenizer", str(tiny_model)]
    words += ["--task", "instruct", "--chat_template", "simple", "--src-length", "200"]
    assert status(prepare.main, words) == 0
    assert is_store(tmp_path / "store")


def test_callers_get_the_error_itself() -> None:
    with pytest.raises(UserError, match="--input is missing"):
        prepare.prepare([])


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    """It says every flag that the guides show, and loads nothing slow."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module({command!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'paddle', 'pyarrow', 'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert f"python -m {command} [CONFIG.yaml|CONFIG.json] [--flag value ...]" in done.stdout
    assert "(required)" in done.stdout
    if command == "data.prepare":
        guide = (REPO / "docs" / "data.md").read_text(encoding="utf-8")
        table = guide.split("### What is a document")[0]
        flags = set(re.findall(r"^\| `(--\w+)", table, flags=re.M)) | {"--prepend_bos"}
        assert len(flags) == 13
        assert all(f"  {flag} " in done.stdout for flag in flags)


def test_nobody_else_reads_command_lines() -> None:
    """The launcher's inner processes apart, every command goes through common.flags."""
    own = {
        str(file.relative_to(REPO))
        for room in ("common", "data", "llm", "paddlenlp_ext")
        for file in (REPO / room).rglob("*.py")
        if re.search(r"^ *(import argparse|from argparse)", file.read_text("utf-8"), flags=re.M)
    }
    assert own == {"common/flags.py", "llm/parallel/sentry.py"}
