"""Errors that users see: one kind, and where in a file they arose."""

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from common.ending import run_script
from common.errors import DataError, Place, UserError, check_integer

PLACES = {
    "a.txt": Place("a.txt"),
    "a.jsonl:3": Place(Path("a.jsonl"), 3),
    "a.json item 3": Place("a.json", inner=" item 3"),
    "a.jsonl:3 question 7": Place("a.jsonl", 3, " question 7"),
}


@pytest.mark.parametrize("name", PLACES)
def test_message_names_the_place(name: str) -> None:
    place = PLACES[name]
    error = DataError("too long; cut it", place)
    assert str(error) == f"{name}: too long; cut it"
    assert (error.file, error.line) == (Path(place.file), place.line)
    assert error.at(Place("b.txt", 9)) is error
    assert str(DataError("too long; cut it").at(place)) == str(error)


def test_without_a_place() -> None:
    error = DataError("nothing to learn")
    assert (str(error), error.file, error.line) == ("nothing to learn", None, None)


@pytest.mark.parametrize("place", [None, Place("a", 3, " item 1")])
def test_workers_can_send_it(place: Place | None) -> None:
    """Processes that encode hand their errors to the parent pickled."""
    sent = pickle.loads(pickle.dumps(DataError("bad", place)))
    assert (str(sent), sent.reason, sent.place) == (str(DataError("bad", place)), "bad", place)


@pytest.mark.parametrize("error", [UserError("what"), DataError("what"), KeyboardInterrupt()])
def test_scripts_end_without_a_traceback(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    interrupted = isinstance(error, KeyboardInterrupt)
    assert stop.value.code == (130 if interrupted else 2)
    assert capsys.readouterr().err == ("interrupted\n" if interrupted else "error: what\n")


def too_long(place: Path) -> None:
    (place / ("x" * 300)).is_file()


def a_circle(place: Path) -> None:
    (place / "link").symlink_to("link")
    (place / "link").read_bytes()


def not_permitted(place: Path) -> None:
    raise PermissionError(13, os.strerror(13), str(place / "x"))


def full(place: Path) -> None:
    raise OSError(28, os.strerror(28), str(place / "x"))


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (too_long, r"/.*x… \(\d+ characters\): File name too long; give a shorter one"),
        (a_circle, r"/.*link: Too many levels of symbolic links; its links lead in a circle; "),
        (not_permitted, "/.*x: Permission denied; check its permissions, and those of the dire"),
        (full, "/.*x: No space left on device; free some space, or choose another place"),
    ],
)
def test_a_path_that_the_system_refuses_is_one_line(
    work: Callable[[Path], None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: work(tmp_path))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert re.match(f"error: {message}", said), said


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "x"), OSError(28, "No space left"), OSError("x")]
)
def test_a_fault_of_the_program_shows_where_it_is(error: OSError) -> None:
    def main() -> None:
        raise error

    with pytest.raises(OSError) as raised:
        run_script(main)
    assert raised.value is error


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "n must be an integer, got True"),
        (1.0, "n must be an integer, got 1.0"),
        (0, "n must be at least 1 and at most 3, got 0"),
        (4, "n must be at least 1 and at most 3, got 4"),
    ],
)
def test_check_integer(value: int, message: str) -> None:
    check_integer("n", 3, least=1, most=3)
    with pytest.raises(DataError, match=message):
        check_integer("n", value, least=1, most=3)
