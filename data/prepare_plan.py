"""Which files are read, and in which pieces."""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError
from data.readers import FORMATS, SUFFIXES, Reader, detect_format, make_reader

SMALLEST_PIECE = 256 << 10
LARGEST_PIECE = 8 << 20
PIECES = 32


@dataclass(frozen=True)
class Source:
    """An input file as it was when the work began."""

    path: str
    format: str
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Span:
    """Bytes [start, stop) of the source with number `source`."""

    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class Inputs:
    """The files to read and what was passed over in directories."""

    sources: tuple[Source, ...]
    ignored: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes in all files."""
        return sum(source.size for source in self.sources)


def find_inputs(patterns: Sequence[str], input_format: str) -> Inputs:
    """Files, directories (searched through) and globs, in the order given; each file once.

    Raises:
        DataError: nothing found, a file that cannot be read, an unknown format.
    """
    if input_format not in ("auto", *FORMATS):
        raise DataError(f"unknown input format {input_format!r}: choose auto, {', '.join(FORMATS)}")
    paths: dict[Path, None] = {}
    ignored: list[str] = []
    for pattern in patterns:
        for path in expand(pattern):
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
                known = [p for p in inside if p.suffix.lower() in SUFFIXES]
                ignored.extend(str(p) for p in inside if p.suffix.lower() not in SUFFIXES)
                if not known:
                    raise DataError(
                        f"directory {path} has no file ending in {', '.join(SUFFIXES)}"
                        f" ({len(inside)} others)"
                    )
                paths.update(dict.fromkeys(known))
            else:
                paths[path] = None
    sources = tuple(_source(path, input_format) for path in paths)
    if not any(source.size for source in sources):
        raise DataError(f"the input is empty: {', '.join(patterns)} hold(s) 0 bytes")
    return Inputs(sources, tuple(ignored))


def expand(pattern: str) -> list[Path]:
    """The path itself, or what a glob matches, sorted; `DataError` if that is nothing."""
    if Path(pattern).exists():
        return [Path(pattern)]
    # Path.glob takes no absolute patterns.
    found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    if found:
        return [Path(name) for name in found]
    what = "no file matches" if glob.has_magic(pattern) else "no such file or directory:"
    raise DataError(f"{what} {pattern}")


def _source(path: Path, input_format: str) -> Source:
    if not path.is_file():
        raise DataError(f"{path} is not a regular file: pipes and devices cannot be resumed")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} may not be read: check its permissions")
    status = path.stat()
    name = detect_format(path) if input_format == "auto" else input_format
    return Source(str(path), name, status.st_size, status.st_mtime_ns)


def piece_size(total_bytes: int) -> int:
    """Bytes of input a worker takes at a time; the same for any number of workers."""
    return min(max(total_bytes // PIECES, SMALLEST_PIECE), LARGEST_PIECE)


def plan_pieces(inputs: Inputs, readers: dict[str, Reader], size: int) -> list[tuple[Span, ...]]:
    """Cut the files at document borders into pieces of about `size` bytes.

    Small files share a piece. The documents are the same whatever the size.
    """
    pieces: list[tuple[Span, ...]] = []
    piece: list[Span] = []
    held = 0
    for number, source in enumerate(inputs.sources):
        start = 0
        reader = readers[source.format]
        with Path(source.path).open("rb") as file:
            while start < source.size:
                wanted = start + max(size - held, 1)
                stop = source.size
                if wanted < source.size:
                    stop = min(reader.next_start(file, wanted), source.size)
                piece.append(Span(number, start, stop))
                held += stop - start
                start = stop
                if held >= size:
                    pieces.append(tuple(piece))
                    piece, held = [], 0
    if piece:
        pieces.append(tuple(piece))
    return pieces


def make_readers(inputs: Inputs, *, json_key: str, txt_documents: str) -> dict[str, Reader]:
    """A reader for each format in use."""
    return {
        name: make_reader(name, json_key=json_key, txt_documents=txt_documents)
        for name in {source.format for source in inputs.sources}
    }
