"""What the user can put right: scripts print it as one message, without a traceback."""

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

_SHOWN = 200  # characters of a path


class UserError(ValueError):
    """Bad input: the message names the value, the limit and what to do.

    Scripts print it as one line without a traceback and exit with status 2.
    """


class UnknownNameError(UserError):
    """Nothing has the name that was asked for, or it has gone since."""


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


@contextmanager
def located(place: Place) -> Iterator[None]:
    """Give errors of data that come up in the body this place, unless they have one."""
    try:
        yield
    except DataError as error:
        raise error.at(place) from None


# What a system says of a path that whoever named it can put right, and how.
_CURES = {
    errno.EACCES: "check its permissions, and those of the directories above it",
    errno.EPERM: "check its permissions, and those of the directories above it",
    errno.EROFS: "choose another place",
    errno.ELOOP: "its links lead in a circle; name what they should lead to",
    errno.ENAMETOOLONG: "give a shorter one",
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EIO: "check the disk, or the connection to it",
    errno.ESTALE: "check the connection to its disk",
}


def said_of_a_path(error: OSError) -> str | None:
    """What a system's error about a path means to whoever named it; None for other errors."""
    cure = _CURES.get(error.errno or 0)
    if cure is None or error.filename is None:
        return None
    name = str(error.filename)
    shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}… ({len(name)} characters)"
    return f"{shown}: {error.strerror}; {cure}"


def near_name(name: str, known: Iterable[str]) -> str | None:
    """Return the name that `name` is a slip of, or says more than; None where none is near.

    A slip is a letter missing, added, wrong or exchanged with the next: one in up to nine letters,
    then one for every five. max_length is none of max_seq_length, another word is no suggestion.
    """
    known = list(known)
    slips = {one: _slips(name, one) for one in known}
    nearest = min(known, key=lambda one: slips[one], default=None)
    if nearest is not None and slips[nearest] <= max(1, len(name) // 5):
        return nearest
    # min_lr_rate says more than min_lr, src_len less than src_length.
    begun = [one for one in known if "_" in one and name.startswith(f"{one}_")]
    begun += [one for one in known if "_" in name and one.startswith(name)]
    return max(begun, key=len, default=None)


def _slips(one: str, other: str) -> int:
    """Damerau's distance (1964), in which a letter is moved once."""
    rows = [list(range(len(other) + 1))]
    for i, letter in enumerate(one, 1):
        row = [i]
        for j, there in enumerate(other, 1):
            best = min(row[-1] + 1, rows[-1][j] + 1, rows[-1][j - 1] + (letter != there))
            if i > 1 < j and letter == other[j - 2] and one[i - 2] == there:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]


def check_integer(name: str, value: int, *, least: int, most: int | None = None) -> None:
    """`DataError` unless `value` is an integer in range."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise DataError(f"{name} must be an integer, got {value!r}")
    if value < least or (most is not None and value > most):
        upper = f" and at most {most}" if most is not None else ""
        raise DataError(f"{name} must be at least {least}{upper}, got {value}")
