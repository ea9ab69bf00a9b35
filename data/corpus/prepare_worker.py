"""Which files are read, in which pieces, and what one worker does with a piece."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.ending import work_for_parent
from common.errors import DataError
from common.jsonl import BOM
from data.corpus.readers import (
    FORMATS,
    SUFFIXES,
    Documents,
    Reader,
    detect_format,
    make_reader,
)
from data.input_files import Files, expand
from data.tokenizer import Tokenizer

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
    found = Files()
    for pattern in patterns:
        for path in expand(pattern):
            if path.is_dir():
                found.add_directory(path, SUFFIXES)
            else:
                found.add(path)
    sources = tuple(_source(path, input_format) for path in found.paths)
    if not any(source.size for source in sources):
        raise DataError(f"the input is empty: {', '.join(patterns)} hold(s) 0 bytes")
    return Inputs(sources, tuple(map(str, found.ignored)))


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


# Characters encoded in one call: large enough for numpy, small enough for the cache.
GROUP = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A piece encoded.

    Attributes:
        ids: tokens of all its documents.
        sizes: tokens of each document.
        bad: (span, line in the span, reason) of each line left out.
        lines: lines in each span.
        empty: blank documents left out.
        size: bytes of input.
    """

    ids: NDArray[Any]
    sizes: NDArray[np.int64]
    bad: list[tuple[int, int, str]]
    lines: list[int]
    empty: int
    size: int


class Worker:
    """Encodes pieces; made once in the parent and inherited by forked workers.

    Args:
        tokenizer: for the ids.
        sources, readers: the input.
        dtype: type of the ids.
        before, after: ids put before and after each document.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sources: Sequence[Source],
        readers: dict[str, Reader],
        dtype: np.dtype[Any],
        before: Sequence[int],
        after: Sequence[int],
    ) -> None:
        size = sum(source.size for source in sources)
        self._encoder = tokenizer.packed_encoder(dtype, characters=size)
        self._sources = sources
        self._readers = readers
        self._before = list(before)
        self._after = list(after)

    def work(self, spans: Sequence[Span]) -> Piece:
        """Read and encode one piece."""
        found = [self._read(span) for span in spans]
        try:
            ids, sizes = self._encode([text for one in found for text in one.texts])
        except DataError:
            for span, documents in zip(spans, found, strict=True):
                self._set_aside(span, documents)
            ids, sizes = self._encode([text for one in found for text in one.texts])
        bad = [(at, line, why) for at, one in enumerate(found) for line, why in sorted(one.bad)]
        size = sum(span.stop - span.start for span in spans)
        lines = [one.lines for one in found]
        return Piece(ids, sizes, bad, lines, sum(one.empty for one in found), size)

    def _set_aside(self, span: Span, found: Documents) -> None:
        """Take out documents that the tokenizer cannot encode, and note the lines they begin at."""
        good = []
        for text in found.texts:
            try:
                self._encoder.encode([text])
                good.append(text)
            except DataError as error:
                noted = {line for line, _ in found.bad}
                found.bad.append((self._line_of(span, text, noted), str(error)))
        found.texts[:] = good

    def _line_of(self, span: Span, text: str, noted: set[int]) -> int:
        """The line of a span, from 1, at which a document begins; not one of those `noted`."""
        reader = self._readers[self._sources[span.source].format]
        content = self._content(span).replace(b"\r\n", b"\n")
        for number, line in enumerate(content.split(b"\n"), 1):
            if number not in noted and reader.read(line).texts == [text]:
                return number
        at = content.find(text.encode())
        while at >= 0 and content.count(b"\n", 0, at) + 1 in noted:
            at = content.find(text.encode(), at + 1)
        return content.count(b"\n", 0, max(at, 0)) + 1

    def _read(self, span: Span) -> Documents:
        return self._readers[self._sources[span.source].format].read(self._content(span))

    def _content(self, span: Span) -> bytes:
        source = self._sources[span.source]
        try:
            with Path(source.path).open("rb") as file:
                file.seek(span.start)
                content = file.read(span.stop - span.start)
        except OSError as error:
            raise DataError(f"reading {source.path} failed: {error.strerror or error}") from error
        if len(content) != span.stop - span.start:
            raise DataError(f"{source.path} became shorter while it was read: start again")
        return content.removeprefix(BOM) if span.start == 0 else content

    def _encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        groups = [self._encoder.encode(group) for group in _groups(texts)]
        if not groups:
            return np.zeros(0, self._encoder.dtype), np.zeros(0, np.int64)
        ids = np.concatenate([ids for ids, _ in groups])
        sizes = np.concatenate([sizes for _, sizes in groups])
        return with_affixes(ids, sizes, self._before, self._after)


def _groups(texts: Sequence[str]) -> list[Sequence[str]]:
    """Texts in groups of about `GROUP` characters."""
    groups: list[Sequence[str]] = []
    start = held = 0
    for index, text in enumerate(texts, 1):
        held += len(text)
        if held >= GROUP:
            groups.append(texts[start:index])
            start, held = index, 0
    if start < len(texts):
        groups.append(texts[start:])
    return groups


def with_affixes(
    ids: NDArray[Any], sizes: NDArray[np.int64], before: Sequence[int], after: Sequence[int]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Put the ids `before` and `after` around each of the documents joined in `ids`."""
    if not before and not after:
        return ids, sizes
    longer = sizes + len(before) + len(after)
    ends = np.cumsum(longer)
    out = np.empty(int(ends[-1]) if len(ends) else 0, ids.dtype)
    own = np.ones(len(out), bool)
    for position, token_id in enumerate(before):
        out[ends - longer + position] = token_id
        own[ends - longer + position] = False
    for position, token_id in enumerate(after):
        out[ends - len(after) + position] = token_id
        own[ends - len(after) + position] = False
    out[own] = ids
    return out, longer


class Inherited:
    """The worker that forked processes find, so that nothing large is sent to them."""

    worker: Worker | None = None

    @classmethod
    def work(cls, spans: Sequence[Span]) -> Piece:
        """Run in a forked process."""
        assert cls.worker is not None
        return cls.worker.work(spans)

    @staticmethod
    def start(parent: int) -> None:
        """Run once in each forked process."""
        work_for_parent(parent)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
