"""Results that survive: each is on the disk, or down the pipe, before the next one is begun."""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from common import jsonl
from common.errors import DataError, Place
from common.files import followed, open_through, write_whole, writing, written_through

# Of an earlier result, from its place and value; None where it is to be made again.
NumberOf = Callable[[Place, object], int | None]


class Journal:
    """Numbered results that are kept as they come, one JSON value a line.

    A regular file appears under its name when all are there, in order; until then ``FILE.partial``
    holds what has come, in the order in which it came, and it stays if the work ends early. An
    earlier one is never written over: the next free of ``.partial2``, ``.partial3`` ... is taken,
    or, with ``number_of``, the one that is there is gone on with, and so are the results that are
    under the name already. A pipe, a device or /dev/stdout gets each line as soon as all before it
    are through, and at an early end the others.

    Args:
        path: where the results go.
        number_of: tells the number of an earlier result.
        replaced: what is under the name already is no list of results: it is not read, and
            replaced at the end.

    Attributes:
        place: where those lie that have come.
        count: how many there are.

    Raises:
        DataError: it cannot be written; another process is writing it; or what is there is no
            result.
    """

    def __init__(
        self, path: str | Path, number_of: NumberOf | None = None, *, replaced: bool = False
    ) -> None:
        self._path = Path(path)
        self._lines: dict[int, bytes] = {}
        self._sent = 0
        with writing(path):
            target = followed(self._path)
            self.through = written_through(target)
            if self.through:
                self.place, self._file = target, open_through(target)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                if number_of is None:
                    self.place, self._file = _new_partial(target)
                else:
                    self._go_on(target, number_of, replaced)

    def _go_on(self, target: Path, number_of: NumberOf, replaced: bool) -> None:
        """Take up what is there; a line that a kill has cut is made again."""
        self.place = partial(target)
        self._file = self.place.open("a+b")
        _lock(self._file, self.place)
        try:
            self._file.seek(0)
            begun = self._file.read()
            whole = begun[: begun.rfind(b"\n") + 1]
            self._file.truncate(len(whole))
            if not replaced:
                self._take(target, _content(target), number_of)
            kept = self._take(self.place, whole, number_of)
            if kept != whole:
                self._file.truncate(0)
                self._send(kept)
        except BaseException:
            self._close()
            raise

    def _take(self, file: Path, content: bytes, number_of: NumberOf) -> bytes:
        """Take up the results of a file; returns their lines."""
        found = list(_numbered(file, content, number_of))
        self._lines.update(found)
        return b"".join(line for _, line in found)

    def _close(self) -> None:
        """Close the file, and leave none without a line."""
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            if not self.through and not self.place.stat().st_size:
                self.place.unlink()

    @property
    def count(self) -> int:
        """Results so far."""
        return len(self._lines)

    def __contains__(self, number: int) -> bool:
        """Whether the result of that number is there."""
        return number in self._lines

    def add(self, number: int, value: object) -> None:
        """Keep a result; numbers count from 0.

        Raises:
            DataError: it cannot be written.
            BrokenPipeError: nobody reads any more.
        """
        line = (json.dumps(value, ensure_ascii=False) + "\n").encode()
        self._lines[number] = line
        if not self.through:
            self._send(line)
            return
        while self._sent in self._lines:
            self._send(self._lines[self._sent])
            self._sent += 1

    def _send(self, line: bytes) -> None:
        try:
            self._file.write(line)
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError:
            with writing(self.place):
                raise

    def finish(self, content: str | None = None) -> None:
        """Give the results their name; a regular file may get other content that holds them all."""
        if self.through:
            if content is not None:
                self._send(content.encode())
        else:
            whole = b"".join(self._lines[number] for number in sorted(self._lines))
            write_whole(self._path, whole if content is None else content)
            self.place.unlink()
        self._lines.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is not None and self.through and not isinstance(error, BrokenPipeError):
            late = sorted(number for number in self._lines if number >= self._sent)
            for number in late:
                self._send(self._lines[number])
        self._close()


def _lock(file: BinaryIO, place: Path) -> None:
    """Refuse a file that another process writes, or has just given its name."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = os.fstat(file.fileno()).st_nlink > 0
    except BlockingIOError:
        taken = False
    if not taken:
        file.close()  # it is not ours: an empty one stays, too
        raise DataError(
            f"{place} is being written by another process; wait for its end, or give another place"
        )


def partial(target: Path) -> Path:
    """Return where results lie that can be gone on with, of a file without links."""
    return target.with_name(f"{target.name}.partial")


def check_earlier(path: str | Path, number_of: NumberOf) -> None:
    """Let ``number_of`` see what a `Journal` would go on with, before the work that it is for.

    Raises:
        DataError: it cannot be read, or what ``number_of`` raises.
    """
    with writing(path):
        target = followed(Path(path))
        if not written_through(target):
            begun = _content(partial(target))
            whole = begun[: begun.rfind(b"\n") + 1]
            for _ in _numbered(partial(target), whole, number_of):
                pass


def _numbered(file: Path, content: bytes, number_of: NumberOf) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the line of each earlier result."""
    for number, text in enumerate(content.split(b"\n"), 1):
        place = Place(file, number)
        if not text.strip():
            continue
        try:
            value = jsonl.parse(text, place)
        except DataError as error:
            raise DataError(
                f"{error.reason}; it is no result: remove the file to begin again, or give another "
                "place",
                place,
            ) from None
        result = number_of(place, value)
        if result is not None:
            yield result, text + b"\n"


def _content(file: Path) -> bytes:
    with contextlib.suppress(FileNotFoundError):
        return file.read_bytes()
    return b""


def _new_partial(target: Path) -> tuple[Path, BinaryIO]:
    number = 1
    while True:
        place = target.with_name(f"{target.name}.partial{number if number > 1 else ''}")
        try:
            descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            number += 1
            continue
        return place, os.fdopen(descriptor, "wb")
