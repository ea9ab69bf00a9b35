"""Writing of files: what happens to each kind of target, whoever writes; what is refused before."""

import json
import os
import platform
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from common import files, jsonl
from common.errors import DataError, UserError
from common.files import check_target, new_directory, replacing, scratch_directory, write_whole
from common.flags import arg, save_resolved
from data.tokenizer import load_tokenizer
from llm.evaluation import report
from llm.planner import __main__ as planner

REPO = Path(__file__).resolve().parents[3]


@dataclass
class Options:
    """A group of flags."""

    size: int = arg(3, "a size")


def write_by_name(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("new")


def write_predictions(path: Path) -> None:
    planner._write(str(path), *_prediction())


def _prediction() -> tuple[planner.Prediction, list[planner.Prediction]]:
    words = ("configs/pretrain_tiny_cpu.yaml", "--input_dir", "x")
    recipe = planner.read_recipe([str(REPO / words[0]), *words[1:]])
    return planner._asked(recipe, None, float("inf")), []


WRITERS: dict[str, Callable[[Path], object]] = {
    "replacing": write_by_name,
    "write_whole": lambda path: write_whole(path, "new"),
    "jsonl.write": lambda path: jsonl.write(path, ["new"]),
    "save_resolved": lambda path: save_resolved([Options()], path),
    "evaluation": lambda path: report.write(str(path), {}, []),
    "planner": write_predictions,
}


def target(kind: str, root: Path) -> tuple[Path, Path]:
    """A path to write to and the place where the content is to be found."""
    path, place = root / "out", root / "elsewhere" / "kept"
    place.parent.mkdir()
    if kind == "new":
        return path, path
    if kind == "below new directories":
        return root / "a" / "b" / "out", root / "a" / "b" / "out"
    if kind == "file":
        path.write_text("old")
        path.chmod(0o640)
        return path, path
    if kind != "dangling link":
        place.write_text("old")
    if kind == "link to a link":
        (place.parent / "between").symlink_to("kept")
        path.symlink_to("elsewhere/between")
    elif kind == "absolute link":
        path.symlink_to(place)
    else:
        path.symlink_to("elsewhere/kept")
    return path, place


TARGETS = ("new", "below new directories", "file", "link", "absolute link", "link to a link")
TARGETS += ("dangling link",)


def everything(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("writer", WRITERS)
def test_files_and_links(writer: str, kind: str, tmp_path: Path) -> None:
    """A link stays, what it leads to is replaced, and nothing else is left behind."""
    path, place = target(kind, tmp_path)
    before = everything(tmp_path) | {
        str(p.relative_to(tmp_path)) for p in (place, *place.parents) if tmp_path in p.parents
    }
    was_link, inode = path.is_symlink(), place.stat().st_ino if place.exists() else None
    check_target(path, "output_file")
    WRITERS[writer](path)
    assert path.is_symlink() == was_link and place.is_file() and not place.is_symlink()
    assert place.read_text() not in ("", "old")
    assert place.stat().st_ino != inode, "it is another file, renamed"
    if kind == "file":
        assert stat.S_IMODE(place.stat().st_mode) == 0o640
    assert everything(tmp_path) == before


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("writer", WRITERS)
def test_pipes_are_written_through(writer: str, linked: bool, tmp_path: Path) -> None:
    pipe = path = tmp_path / "pipe"
    os.mkfifo(pipe)
    if linked:
        path = tmp_path / "link"
        path.symlink_to(pipe)
    check_target(path, "output_file")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    WRITERS[writer](path)
    reader.join(10)
    assert read and read[0]
    assert pipe.is_fifo() and everything(tmp_path) == {"pipe", *(["link"] if linked else [])}


def test_devices_stay_devices() -> None:
    check_target("/dev/null", "output_file")
    write_whole("/dev/null", "new")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(DataError, match="no space is left on the disk while writing /dev/full"):
        write_whole("/dev/full", "new")


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("to", ["file", "pipe"])
def test_standard_output(name: str, to: str, tmp_path: Path) -> None:
    """What was and will be printed is kept, also where a shell sends it into a file."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    code = (
        "from common.files import check_target, write_whole\n"
        f"check_target({name!r}, 'output_file')\n"
        "print('before')\n"
        f"write_whole({name!r}, 'new\\n')\n"
        "print('after')\n"
    )
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": ""}
    out = tmp_path / "printed"
    with out.open("wb") as file:
        stdout = file if to == "file" else subprocess.PIPE
        done = subprocess.run(command, stdout=stdout, cwd=tmp_path, env=env, check=True)
    said = out.read_bytes() if to == "file" else done.stdout
    assert said == b"before\nnew\nafter\n"
    assert everything(tmp_path) == {"link", "printed"}


REFUSED: dict[str, tuple[Callable[[Path], str], str]] = {
    "directory": (lambda root: "", "is a directory; give a file name"),
    "link to a directory": (
        lambda root: (root / "link").symlink_to(root) or "link",
        "is a directory; give a file name",
    ),
    "below a file": (
        lambda root: (root / "file").write_text("old") and "file/out",
        "file is not a directory; choose another place",
    ),
    "far below a file": (
        lambda root: (root / "file").write_text("old") and "file/a/b/out",
        "file is not a directory; choose another place",
    ),
    "read-only": (
        lambda root: (root / "file").write_text("old") and ((root / "file").chmod(0o444) or "file"),
        "file may not be written: it is read-only; choose another file",
    ),
    "link to a read-only file": (
        lambda root: [
            (root / "file").write_text("old"),
            (root / "file").chmod(0o444),
            (root / "link").symlink_to("file"),
            "link",
        ][-1],
        "link may not be written: it is read-only; choose another file",
    ),
    "links in a ring": (
        lambda root: (root / "a").symlink_to("b") or (root / "b").symlink_to("a") or "a",
        "writing .*a failed: Too many levels of symbolic links",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    path = tmp_path / make(tmp_path)
    before = everything(tmp_path)
    with pytest.raises(UserError, match=message):
        check_target(path, "output_file")
    for write in (lambda: write_whole(path, "new"), lambda: jsonl.write(path, ["new"])):
        with pytest.raises(DataError):
            write()
    assert everything(tmp_path) == before
    if (tmp_path / "file").exists():
        assert (tmp_path / "file").read_text() == "old"


def test_a_directory_that_takes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    allowed = os.access
    monkeypatch.setattr(  # root, who may run this, would be let in
        files.os, "access", lambda path, mode: Path(path) != closed and allowed(path, mode)
    )
    for path in (closed / "out", closed / "a" / "out"):
        with pytest.raises(UserError, match=r"output_file .*closed takes no new files; choose"):
            check_target(path, "output_file")
    check_target(tmp_path / "out", "output_file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_permissions_of_others_than_root(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(UserError, match="takes no new files"):
            check_target(tmp_path / "out", "output_file")
        with pytest.raises(DataError, match="may not be written"):
            write_whole(tmp_path / "out", "new")
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("kind", ["new", "file", "link"])
def test_a_failure_leaves_what_was(kind: str, tmp_path: Path) -> None:
    path, place = target(kind, tmp_path)
    before = everything(tmp_path)

    def rows() -> object:
        yield "one"
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=f"no space is left on the disk while writing {path}"):
        jsonl.write(path, rows())  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert everything(tmp_path) == before
    assert not place.exists() or place.read_text() == "old"


def test_directories_are_whole_or_absent(tmp_path: Path) -> None:
    place = tmp_path / "a" / "model"
    with pytest.raises(ZeroDivisionError), new_directory(place) as temporary:
        temporary.mkdir()
        raise ZeroDivisionError
    assert everything(tmp_path) == {"a"}
    with new_directory(place) as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("new")
        assert not place.exists()
    assert everything(tmp_path) == {"a", "a/model", "a/model/file"}


def test_json_lines_that_are_written_can_be_read(tmp_path: Path) -> None:
    values = [{"a": "one\u2028two\x85\r\n", "b": ["é", None, 1.5]}, "\ufeff", 3]
    path = jsonl.write(tmp_path / "a.jsonl", values)
    assert [value for _, value in jsonl.read(path)] == values
    assert (
        "\u2028" in path.read_text("utf-8") and json.loads(path.read_bytes().split(b"\n")[2]) == 3
    )


def test_a_tokenizer_is_saved_through_a_link(tmp_path: Path) -> None:
    before = load_tokenizer("__internal_testing__/tiny-random-llama")
    (tmp_path / "model").mkdir()
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "model" / "tokenizer_config.json").symlink_to("../real.json")
    before.save(tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer_config.json").is_symlink()
    assert "added_tokens_decoder" in (tmp_path / "real.json").read_text()
    assert load_tokenizer(tmp_path / "model").fingerprint == before.fingerprint


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    )
    head = f".x.{platform.node()}-"
    left = tmp_path / f"{head}{ended.stdout.strip()}.tmp"
    left.mkdir()
    (left / "half").write_text("")
    others = {f"{head}{os.getppid()}.tmp", ".x.elsewhere-9.tmp", ".y.tmp"}
    for name in others:
        (tmp_path / name).write_text("")
    write_whole(tmp_path / "x", "whole")
    assert {path.name for path in tmp_path.iterdir()} == others | {"x"}
    left.write_text("")
    with new_directory(tmp_path / "x2") as place:
        place.mkdir()
    assert left.exists(), "of another name"


def test_a_scratch_directory_goes_with_what_killed_processes_left(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / "deep" / f".x.{platform.node()}-{ended.pid}.tmp"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    with (
        pytest.raises(SystemExit),
        scratch_directory(tmp_path / "deep" / "x") as scratch,
    ):
        assert [place.name for place in scratch.parent.iterdir()] == [scratch.name]
        (scratch / "part").write_text("")
        raise SystemExit
    assert not list(scratch.parent.iterdir())


def test_nobody_else_makes_temporary_names_beside_targets() -> None:
    """Python leaves its own for ever where SIGKILL ends it; in the place for such it may."""
    places = [*REPO.glob("*.py")]
    for package in ("common", "data", "llm", "paddlenlp_ext"):
        places += (REPO / package).rglob("*.py")
    made = re.compile(r"(mkdtemp|mkstemp|TemporaryDirectory|TemporaryFile)\([^)]*\b(dir|prefix)=")
    found = [place.name for place in places if made.search(place.read_text())]
    assert found == ["files.py"]  # a probe, which lies there for an instant
