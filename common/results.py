"""Results that survive: each is on the disk, or down the pipe, before the next one is begun."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from common.files import followed, open_through, write_whole, writing, written_through


class Journal:
    """Numbered results that are kept as they come, one JSON value a line.

    A regular file appears under its name when all are there, in order; until then ``FILE.partial``
    holds what has come, in the order in which it came, and it stays if the work ends early. An
    earlier one is never written over: the next free of ``.partial2``, ``.partial3`` ... is taken.
    A pipe, a device or /dev/stdout gets each line as soon as all before it are through, and at an
    early end the others.

    Args:
        path: where the results go.

    Attributes:
        place: where those lie that have come.
        count: how many there are.

    Raises:
        DataError: it cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
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
                self.place, self._file = _new_partial(target)

    @property
    def count(self) -> int:
        """Results so far."""
        return len(self._lines)

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
        self._file.close()
        if not self.through and not self._lines and self.place.exists():
            self.place.unlink()


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
