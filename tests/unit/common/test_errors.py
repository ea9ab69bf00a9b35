"""Errors that users see: one kind, and where in a file they arose."""

import pickle
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
