"""Which files a name, a directory or a glob means: literal names first, each file once."""

import logging
import os
from pathlib import Path

import pytest

from common.errors import DataError
from data.conversations.record_files import find_files
from data.corpus.prepare_worker import find_inputs
from data.input_files import Files, expand


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"text": "a"}')
    return root


# What is there, the pattern, and what it means.
PATTERNS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "literal directory first": (("d[1]/a.txt", "d1/b.txt"), "d[1]/*.txt", ("d[1]/a.txt",)),
    "a class where that is missing": (("data1/b.txt",), "data[1]/*.txt", ("data1/b.txt",)),
    "literal file first": (("a[1].txt", "a1.txt"), "a[1].txt", ("a[1].txt",)),
    "literal stars": (("a*.txt", "ab.txt"), "a*.txt", ("a*.txt",)),
    "a literal question mark": (("q?/x.txt", "qq/y.txt"), "q?/*", ("q?/x.txt",)),
    "deep": (("a[b]/c/d.txt", "ab/c/e.txt"), "a[b]/**/*.txt", ("a[b]/c/d.txt",)),
    "nothing literal": (("ab/c/e.txt", "a/f.txt"), "a*/**/*.txt", ("a/f.txt", "ab/c/e.txt")),
}  # fmt: skip


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("case", PATTERNS)
def test_patterns(
    case: str, absolute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, pattern, meant = PATTERNS[case]
    tree(tmp_path, *names)
    monkeypatch.chdir(tmp_path)
    root = tmp_path if absolute else Path()
    assert expand(str(root / pattern)) == [root / name for name in meant]


def test_nothing_matches(tmp_path: Path) -> None:
    tree(tmp_path, "data[1]/a.txt", "data1/b.jsonl")
    with pytest.raises(DataError, match="no file matches"):
        expand(f"{tmp_path}/data[1]/*.jsonl")


def links(root: Path) -> Path:
    """A directory with every way in which a file may be there twice, or be meant not to be read."""
    tree(root, "a.txt", "sub/b.txt", ".hidden/c.txt", "sub/.d.txt", "sub/e.png", "sub/.git/f.x")
    tree(root.parent, "elsewhere/g.txt")
    (root / "copy.txt").symlink_to(root / "a.txt")
    os.link(root / "a.txt", root / "hard.txt")
    (root / "sub" / "up").symlink_to(root)
    (root / "linked").symlink_to(root.parent / "elsewhere")
    (root / "linked2").symlink_to(root.parent / "elsewhere")
    return root


def test_directories_are_read_whole_and_once(tmp_path: Path) -> None:
    root = links(tmp_path / "in")
    found = Files()
    found.add_directory(root, (".txt",))
    assert found.paths == [root / "a.txt", root / "linked/g.txt", root / "sub/b.txt"]
    passed = {str(path.relative_to(root)) for path in found.ignored}
    assert passed == {".hidden/c.txt", "copy.txt", "hard.txt", "sub/.d.txt", "sub/e.png"}


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    root = tree(tmp_path, "a.txt")
    (root / "lost.txt").symlink_to(root / "nothing")
    for pattern in (root, f"{root}/*.txt", root / "lost.txt"):
        with pytest.raises(DataError, match=r"lost\.txt"):
            find_inputs([str(pattern)], "auto")


def test_both_ways_of_reading_go_through_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = links(tmp_path / "in")
    inputs = find_inputs([str(root), f"{root}/*.txt", str(root / "copy.txt")], "auto")
    names = [Path(source.path).name for source in inputs.sources]
    assert names == ["a.txt", "g.txt", "b.txt"]
    tree(tmp_path, "r/a.jsonl", "r/more/b.jsonl", "r/._a.jsonl")
    (tmp_path / "r" / "b.jsonl").symlink_to(tmp_path / "r" / "a.jsonl")
    caplog.set_level(logging.WARNING)
    assert [path.name for path in find_files([tmp_path / "r"])] == ["a.jsonl", "b.jsonl"]
    assert "passed over 2 other, hidden or repeated files" in caplog.text
    with pytest.raises(DataError, match=r"has no file ending in \.json, "):
        find_files([tmp_path / "elsewhere"])
