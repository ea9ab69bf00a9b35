"""Which files are meant by what a user names: paths, directories and globs; each file once."""

import glob
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import DataError

Identity = tuple[int, int]


def identity(path: Path) -> Identity:
    """What two names of one file have in common, links included.

    Raises:
        DataError: there is no file, though there may be a link.
    """
    try:
        status = path.stat()
    except OSError as error:
        link = f" (a link to {path.readlink()})" if path.is_symlink() else ""
        raise DataError(f"cannot read {path}{link}: {error.strerror}") from error
    return status.st_dev, status.st_ino


def expand(pattern: str) -> list[Path]:
    """The path itself, or what a glob matches, sorted.

    What is there by its very name is meant by it, also where it looks like a pattern: of
    `data[1]/*.txt` the directory `data[1]`, and only where that is missing `data1`.

    Raises:
        DataError: nothing is there.
    """
    path = Path(pattern)
    if path.exists():
        return [path]
    parts = path.parts
    literal = 0
    while literal < len(parts) and Path(*parts[: literal + 1]).exists():
        literal += 1
    begin = glob.escape(str(Path(*parts[:literal]))) if literal else ""
    # Path.glob takes no absolute patterns.
    found = sorted(glob.glob(str(Path(begin, *parts[literal:])), recursive=True))  # noqa: PTH207
    if found:
        return [Path(name) for name in found]
    what = "no file matches" if glob.has_magic(pattern) else "no such file or directory:"
    raise DataError(f"{what} {pattern}")


@dataclass
class Files:
    """Files in the order in which they were found.

    Attributes:
        paths: the files to read, each once, whatever number of names and links it has.
        ignored: what was passed over in directories: files of other kinds, hidden ones with a
            known ending, and other names of a file that is read.
    """

    paths: list[Path] = field(default_factory=list)
    ignored: list[Path] = field(default_factory=list)
    _seen: set[Identity] = field(default_factory=set)

    def add(self, path: Path) -> None:
        """Take a file unless it is there already, by any name."""
        if _is_new(path, self._seen):
            self.paths.append(path)
        elif path not in self.paths:
            self.ignored.append(path)

    def add_directory(self, directory: Path, endings: Collection[str]) -> None:
        """Take all files below a directory with such an ending that are not hidden.

        Raises:
            DataError: there are none.
        """
        known = others = 0
        for path, hidden in _below(directory, set()):
            fits = path.suffix.lower() in endings
            if fits and not hidden:
                self.add(path)
                known += 1
            elif fits or not hidden:
                self.ignored.append(path)
                others += 1
        if not known:
            raise DataError(
                f"directory {directory} has no file ending in {', '.join(endings)} "
                f"({others} others)"
            )


def _below(
    directory: Path, seen: set[Identity], *, hidden: bool = False
) -> Iterator[tuple[Path, bool]]:
    """Files below a directory with whether they or a directory above are hidden; links are
    followed, each directory once.
    """
    if not _is_new(directory, seen):
        return
    for path in sorted(directory.iterdir()):
        dotted = hidden or path.name[0] == "."
        if path.is_dir():
            yield from _below(path, seen, hidden=dotted)
        elif path.is_file() or path.is_symlink():  # also one that leads nowhere
            yield path, dotted


def _is_new(path: Path, seen: set[Identity]) -> bool:
    here = identity(path)
    new = here not in seen
    seen.add(here)
    return new
