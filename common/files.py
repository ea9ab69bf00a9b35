"""Writing of files and directories, which are either the old ones or the whole new ones.

A link stays and what it leads to is replaced; what is no regular file, such as a pipe, a device or
/dev/stdout, is written through.
"""

import contextlib
import errno
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from common.errors import DataError, UserError

_MOST_LINKS = 40  # as Linux
_PROBE = ".may-be-written-"  # a directory made for an instant to see whether one can be


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
    """Yield a temporary name; what is written there takes the place of ``path`` at the end.

    It lies beside the file, whose permissions are kept; directories above it are made. A failure
    leaves ``path`` as it was and no temporary file.

    Raises:
        OSError: a directory, a read-only file, or a disk that refuses or is full.
    """
    target = followed(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if written_through(target):
        with tempfile.TemporaryDirectory() as directory:
            temporary = Path(directory) / target.name
            yield temporary
            with temporary.open("rb") as content, open_through(target) as out:
                shutil.copyfileobj(content, out)
        return
    old = target.stat().st_mode if target.exists() else None
    if old is not None and not _may_write(target):
        raise PermissionError(errno.EACCES, "it is read-only", str(path))
    temporary = _temporary(target)
    try:
        yield temporary
        if old is not None:
            temporary.chmod(old & 0o7777)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(place: Path) -> Path:
    """Return this process's temporary name; those of killed ones of this machine are removed."""
    head = f".{place.name}.{platform.node()}-"
    with contextlib.suppress(OSError):  # of a directory that may not be read, say
        for left in place.parent.iterdir():
            pid = left.name.removeprefix(head).removesuffix(".tmp")
            if left.name == f"{head}{pid}.tmp" and pid.isdecimal() and not _runs(int(pid)):
                _remove(left)
    return place.with_name(f"{head}{os.getpid()}.tmp")


def _remove(left: Path) -> None:
    if left.is_dir():
        shutil.rmtree(left, ignore_errors=True)
    else:
        left.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Write a file as :func:`replacing` does; returns its path.

    Raises:
        DataError: it cannot be written.
    """
    path = Path(path)
    with writing(path), replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def check_target(path: str | Path, flag: str) -> None:
    """Refuse a file that could not be written, before the work for it begins.

    Args:
        path: the file; what is missing above it will be made.
        flag: what it was given with, for the message.

    Raises:
        UserError: a directory, a read-only file, a place below a file or in a directory that
            takes no new files.
    """
    with writing(path):
        place = followed(Path(path))
    if place.is_dir():
        raise UserError(f"{flag} {path} is a directory; give a file name")
    if place.exists() and not _may_write(place):
        raise UserError(f"{flag} {path} may not be written: it is read-only; choose another file")
    above = next(parent for parent in place.parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"{flag} {path}: {above} is not a directory; choose another place")
    if not written_through(place) and not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: {above} takes no new files; choose another place")


def check_directory(path: str | Path, flag: str, what: str | None = None) -> None:
    """Refuse a directory that could not be made or written to, before the work for it begins.

    Args:
        path: the directory; what is missing of it will be made.
        flag: what it was given with, for the message.
        what: it has to be new or empty, to hold this; None takes one with contents too.

    Raises:
        UserError: a file, a place below a file, one that takes no new directories, or contents.
    """
    with writing(path):
        place = followed(Path(path))
    if what is not None and place.exists() and (not place.is_dir() or holds_something(place)):
        raise UserError(f"{flag}={path} is not empty; give a new directory for {what}")
    above = next(one for one in (place, *place.absolute().parents) if one.exists())
    if not above.is_dir():
        raise UserError(f"{flag}={path}: {above} is a file; give a directory")
    try:
        Path(tempfile.mkdtemp(prefix=_PROBE, dir=above)).rmdir()
    except OSError as error:
        raise UserError(
            f"{flag}={path}: {above} is not writable ({error.strerror}); choose another place"
        ) from error


def holds_something(directory: Path) -> bool:
    """Whether a directory is there and not empty."""
    # Processes of one run check one directory at once: what another tries it with is no content.
    return directory.is_dir() and any(
        not place.name.startswith(_PROBE) for place in directory.iterdir()
    )


def followed(path: Path) -> Path:
    """Where the links that `path` may be lead, but for the open files of processes."""
    for _ in range(_MOST_LINKS):
        place = path.parent.resolve() / path.name
        if _is_open_file(place) or not place.is_symlink():
            return place
        path = place.parent / place.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _is_open_file(place: Path) -> bool:
    return place.parts[:2] == ("/", "proc")  # where /dev/stdout and the like lead


def written_through(place: Path) -> bool:
    """Whether a place is no regular file, but a pipe, a device or an open file of a process."""
    special = place.exists() and not place.is_file() and not place.is_dir()
    return special or _is_open_file(place)


def _may_write(place: Path) -> bool:
    # For root everything is writable; a file that nobody may write is one to keep all the same.
    return bool(place.stat().st_mode & 0o222) and os.access(place, os.W_OK)


def open_through(target: Path) -> BinaryIO:
    """Open what is written through; /dev/stdout goes on where standard output is."""
    own = re.fullmatch(rf"/proc/{os.getpid()}/fd/(\d+)", str(target))
    if own is None:
        return target.open("wb")
    # Opened by its name, a file would be emptied of what was written to it before.
    sys.stdout.flush()
    return os.fdopen(os.dup(int(own[1])), "wb")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``, absent or empty; a directory made there becomes it.

    A failure leaves ``path`` as it was and no temporary directory.
    """
    path = followed(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def scratch_directory(beside: Path) -> Iterator[Path]:
    """Yield a directory for parts of what ``beside`` becomes; it lies there, and goes at the end.

    What a killed process of this machine left of its own goes too.
    """
    temporary = _temporary(beside)
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
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
