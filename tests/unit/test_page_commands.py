"""No command of a guide without a row that says how it is run, and none that its parser refuses."""

import contextlib
import io
import runpy
import sys
from unittest import mock

import pytest

from data.prepare import DESCRIPTION
from llm.config.scripts import SCRIPTS
from tests.page_commands import bash_commands, help_examples, shown
from tests.pages import rows
from tests.pages.desk import REPO, with_flags
from tests.pages.reading import read
from tests.pages.rows import PAGES, ROWS, Read, Run, key_of

DOCUMENTS = [*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")]
BASH = [
    pytest.param(one.words, id=f"{page}: {one.text}")
    for page in PAGES
    for one in shown(REPO / page)
    if one.words
]
# What stands for the reader's own files in examples of --help.
OWN = {
    "corpus.jsonl": "README.md",
    "books/": "docs",
    "alpaca.json": "data/assets/samples/alpaca/train.json",
    "wiki.train.tokens": "README.md",
    "models/llama-2-7b": "__internal_testing__/tiny-random-llama",
    "models/llama-3-8b": "__internal_testing__/tiny-random-llama",
}


def rowless(page):
    return [one.text for one in shown(REPO / page) if key_of(page, one) is None]


def test_every_page_with_commands_is_in_the_order():
    names = {file.relative_to(REPO).as_posix() for file in DOCUMENTS if shown(file)}
    assert set(PAGES) == set(ROWS) == names


@pytest.mark.parametrize("page", PAGES)
def test_every_command_has_a_row_and_every_row_a_command(page):
    assert rowless(page) == []
    used = {key_of(page, one) for one in shown(REPO / page)}
    assert sorted(set(ROWS[page]) - used) == []


def test_rows_say_why_they_do_not_run():
    for table in ROWS.values():
        for row in table.values():
            assert isinstance(row, Run) or (isinstance(row, Read) and len(row.reason) > 10)


def test_given_files_belong_to_pages():
    assert set(rows.GIVEN) <= set(PAGES)


@pytest.mark.parametrize("words", BASH)
def test_its_own_parser_reads_it(words, monkeypatch):
    monkeypatch.chdir(REPO)
    read(words)


def help_of(script):
    said = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [script, "--help"]),
        contextlib.redirect_stdout(said),
        pytest.raises(SystemExit),
    ):
        if script.endswith(".py"):
            runpy.run_path(str(REPO / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__")
    return said.getvalue()


def test_examples_of_help_are_read(monkeypatch):
    monkeypatch.chdir(REPO)
    examples = [*help_examples(DESCRIPTION)]
    for script in SCRIPTS:
        examples += help_examples(help_of(script))
    assert len(examples) >= 10
    for one in examples:
        if "..." not in one.words:
            read([OWN.get(word, word) for word in one.words])


def test_a_new_command_needs_a_row(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\npython server.py \\\n  --no_ui\n# why\n```\n\n```python\nx = 1\n```\n"
    )
    assert bash_commands(page) == [["python", "server.py", "--no_ui"]]
    assert [one.kind for one in shown(page)] == ["bash", "python"]
    monkeypatch.setitem(ROWS, str(page), {"python server": Run()})
    assert rowless(str(page)) == ["x = 1\n"]
    with pytest.raises(AssertionError, match="no parser"):
        read(["paddlenlp", "--x"])


def test_longer_keys_go_first_and_flags_are_replaced():
    one = next(s for s in shown(REPO / "README.md") if "--dtype bfloat16" in s.text)
    assert "bfloat16" in key_of("README.md", one)
    words = with_flags(["x.py", "--a", "1", "2", "--b"], "--a 3 --c 4 5")
    assert words == ["x.py", "--a", "3", "--b", "--c", "4", "5"]
