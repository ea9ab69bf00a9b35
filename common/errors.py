"""What the user can put right: scripts print it as one message, without a traceback."""

from dataclasses import dataclass
from numbers import Integral
from pathlib import Path


class UserError(ValueError):
    """Bad input: the message names the value, the limit and what to do.

    Scripts print it as one line without a traceback and exit with status 2.
    """


@dataclass(frozen=True)
class Place:
    """A spot in a file, as messages name it: "FILE:LINE", or "FILE item 3".

    Attributes:
        file: the file.
        line: counts from 1; None where lines say nothing.
        inner: what follows in the name, with the character that parts it: " item 3".
    """

    file: str | Path
    line: int | None = None
    inner: str = ""

    def __str__(self) -> str:
        line = "" if self.line is None else f":{self.line}"
        return f"{self.file}{line}{self.inner}"


class DataError(UserError):
    """Bad data, or a file that cannot be read or written.

    Args:
        reason: what is wrong and what to do.
        place: where, if it is known; the message is then "FILE:LINE: reason".
    """

    def __init__(self, reason: str, place: Place | None = None) -> None:
        super().__init__(reason if place is None else f"{place}: {reason}")
        self.reason = reason
        self.place = place

    @property
    def file(self) -> Path | None:
        """The file, if it is known."""
        return None if self.place is None else Path(self.place.file)

    @property
    def line(self) -> int | None:
        """The line of the file, from 1, if it is known."""
        return None if self.place is None else self.place.line

    def at(self, place: Place) -> "DataError":
        """This error with a place, unless it has one."""
        return DataError(self.reason, place) if self.place is None else self


def check_integer(name: str, value: int, *, least: int, most: int | None = None) -> None:
    """`DataError` unless `value` is an integer in range."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise DataError(f"{name} must be an integer, got {value!r}")
    if value < least or (most is not None and value > most):
        upper = f" and at most {most}" if most is not None else ""
        raise DataError(f"{name} must be at least {least}{upper}, got {value}")
