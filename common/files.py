"""Files that are either the old one or the whole new one; directories likewise."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import DataError


@contextlib.contextmanager
def writing(path: Path | str, *, hint: str = "") -> Iterator[None]:
    """Turn an `OSError` raised while writing `path` into a `DataError` that says what to do.

    `hint` is added to the message, for example how to go on after making room.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"no space is left on the disk while writing {path}: free some"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = f"{path} may not be written ({error.strerror}): choose another place"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            reason = f"{path} cannot be made: a file stands where a directory is needed"
        else:
            reason = f"writing {path} failed: {error.strerror or error}"
        raise DataError(f"{reason}{'; ' + hint if hint else ''}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; what is written there takes its place at the end.

    A failure leaves ``path`` as it was and no temporary file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``, absent or empty; a directory made there becomes it.

    A failure leaves ``path`` as it was and no temporary directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Work:
    """What one process of a save does on the disk, in order.

    A process whose disk is full still has to take part in what the processes of the save do
    together. So what fails is kept, everything after it is skipped, and whoever owns the save asks.

    Args:
        later: collect the work for :meth:`run`, such as for a thread.

    Attributes:
        error: why work failed, if any did.
    """

    def __init__(self, *, later: bool = False) -> None:
        self.error: OSError | ValueError | None = None
        self._later = later
        self._queue: list[Callable[[], object]] = []
        self._last: list[Callable[[], object]] = []

    def do(self, call: Callable[[], object]) -> None:
        """Do something on the disk, now or in its turn; it has to hold its own copy of data."""
        if self._later:
            self._queue.append(call)
        else:
            self._try(call)

    def last(self, call: Callable[[], object]) -> None:
        """Do something when all processes are through with their work; only rank 0 is asked."""
        self._last.append(call)

    def run(self) -> None:
        """Do what was collected, and from now on at once; memory is given back piece by piece."""
        self._later = False
        self._queue.reverse()
        while self._queue:
            self._try(self._queue.pop())

    def conclude(self) -> None:
        """Do what was to be done last."""
        for call in self._last:
            self._try(call)

    def _try(self, call: Callable[[], object]) -> None:
        if self.error is not None:
            return
        try:
            call()
        except (OSError, ValueError) as error:  # refusals of this suite are ValueErrors
            self.error = error
