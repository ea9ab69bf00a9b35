"""Writing token stores as a stream, in constant memory; the files appear only when complete."""

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from common.errors import DataError
from common.files import replacing, writing
from data.corpus.token_store import (
    CODES,
    HEADER,
    LAYOUTS,
    MAGIC,
    VERSION,
    StoreFormat,
    StorePaths,
)

NPY_HEADER = 128
BLOCK = 1 << 20


@dataclass(frozen=True)
class WrittenSoFar:
    """How far a writer has come: enough to go on after a crash."""

    tokens: int = 0
    documents: int = 0


class TokenStoreWriter:
    """Write documents one by one or in groups; `finish` makes the store appear.

    Ids and lengths go to hidden files beside the target. `close` leaves them for a later
    writer that is given `resume`; `abort` deletes them. As a context manager it finishes on
    success and deletes them on an exception.

    Args:
        prefix: where the store is to be.
        dtype: type of the ids on disk, an integer type (`best_dtype`).
        layout: "bin" or "npy".
        vocab_size: ids must be below it.
        meta: what PREFIX.meta.json records besides counts and type.
        resume: go on from here with the files a closed or killed writer left.
        hint: what helps after a failure to write, beside what the failure itself says.

    Raises:
        DataError: a bad id, a document too long, a file that cannot be written.
    """

    def __init__(
        self,
        prefix: str | Path,
        dtype: DTypeLike,
        *,
        layout: StoreFormat = "bin",
        vocab_size: int | None = None,
        meta: Mapping[str, Any] | None = None,
        resume: WrittenSoFar | None = None,
        hint: str = "",
    ) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise DataError(f"a token store cannot hold {self.dtype}: use uint16 or int32")
        if vocab_size is not None and vocab_size - 1 > np.iinfo(self.dtype).max:
            raise DataError(
                f"a vocabulary of {vocab_size} ids does not fit into {self.dtype.name}, which "
                f"holds up to {np.iinfo(self.dtype).max}: use int32"
            )
        self.layout = layout
        self.paths = StorePaths(Path(prefix))
        self.vocab_size = vocab_size
        self._meta = dict(meta or {})
        self._hint = hint
        self._head = NPY_HEADER if layout == "npy" else 0
        self.written = resume or WrittenSoFar()
        tokens_path = self.paths.tokens(layout)
        self._tokens_partial = _partial(tokens_path)
        self._sizes_partial = _partial(tokens_path, "sizes")
        with writing(tokens_path):
            tokens_path.parent.mkdir(parents=True, exist_ok=True)
            killed = not self._tokens_partial.exists() and not self.paths.index(layout).exists()
            if resume and killed and tokens_path.exists():
                # Killed while finishing: the tokens had their name, the index did not.
                tokens_path.replace(self._tokens_partial)
            tokens_at = self._head + self.written.tokens * self.dtype.itemsize
            self._tokens = _open_at(self._tokens_partial, tokens_at, resume is not None)
            self._sizes = _open_at(self._sizes_partial, 4 * self.written.documents, bool(resume))

    def add_document(self, ids: ArrayLike) -> None:
        """Append one document."""
        array = np.asarray(ids, np.int64).reshape(-1)
        self.add_documents(array, np.array([len(array)]))

    def add_documents(self, ids: NDArray[Any], sizes: NDArray[Any]) -> None:
        """Append documents given as their ids joined and the number of ids of each."""
        if int(sizes.sum()) != len(ids) or (sizes.size and int(sizes.min()) < 0):
            raise DataError(f"sizes sum to {int(sizes.sum())}, but there are {len(ids)} ids")
        if sizes.size and int(sizes.max()) > np.iinfo(np.int32).max:
            raise DataError(
                f"a document has {int(sizes.max())} tokens; the limit is "
                f"{np.iinfo(np.int32).max}: split it"
            )
        if ids.size:
            self._check_range(int(ids.min()), int(ids.max()))
        with self._errors():
            self._tokens.write(ids.astype(self.dtype, copy=False).tobytes())
            self._sizes.write(sizes.astype("<i4").tobytes())
        self.written = WrittenSoFar(
            self.written.tokens + len(ids), self.written.documents + len(sizes)
        )

    def _check_range(self, smallest: int, largest: int) -> None:
        limit = int(np.iinfo(self.dtype).max)
        if self.vocab_size is not None:
            limit = min(limit, self.vocab_size - 1)
        if smallest < 0 or largest > limit:
            wrong = smallest if smallest < 0 else largest
            raise DataError(
                f"token id {wrong} does not fit into this store, whose ids are 0 to {limit} "
                f"({self.dtype.name}): wrong tokenizer or type"
            )

    def _errors(self) -> Any:
        return writing(self.paths.tokens(self.layout), hint=self._hint)

    def flush(self) -> WrittenSoFar:
        """Bring everything so far to the disk itself; returns what a resume needs."""
        with self._errors():
            for file in (self._tokens, self._sizes):
                file.flush()
                os.fsync(file.fileno())
        return self.written

    def close(self) -> None:
        """Stop, leaving what was written for a later resume."""
        with self._errors():
            self._tokens.close()
            self._sizes.close()

    def abort(self) -> None:
        """Stop and delete what was written."""
        try:
            self.close()
        finally:
            self._tokens_partial.unlink(missing_ok=True)
            self._sizes_partial.unlink(missing_ok=True)

    def finish(self) -> Path:
        """Write the index and give the files their names; returns the prefix.

        Raises:
            DataError: nothing was written.
        """
        if not self.written.tokens:
            self.abort()
            raise DataError(
                f"{self.paths.prefix} would hold no tokens: the input has no usable text"
            )
        index = self.paths.index(self.layout)
        tokens = self.paths.tokens(self.layout)
        with self._errors():
            if self.layout == "npy":
                self._tokens.seek(0)
                self._tokens.write(npy_header(self.dtype, self.written.tokens))
            self.flush()
            self.close()
            # The index comes last: without it nothing takes the files for a store.
            with replacing(index) as new_index, replacing(self.paths.meta) as new_meta:
                self._write_index(new_index)
                self._write_meta(new_meta)
                # All of the new store is on disk: now an old one may go.
                index.unlink(missing_ok=True)
                self._tokens_partial.replace(tokens)
            self._sizes_partial.unlink()
        return self.paths.prefix

    def _write_index(self, path: Path) -> None:
        sizes = np.memmap(self._sizes_partial, "<i4", "r")
        count = len(sizes)
        with path.open("wb") as file:
            if self.layout == "npy":
                _write_npz(file, sizes)
            else:
                header = np.zeros(1, HEADER)
                header["magic"] = np.void(MAGIC)
                header["version"], header["dtype"] = VERSION, CODES[self.dtype]
                header["sequences"], header["marks"] = count, count + 1
                file.write(header.tobytes())
                _copy(file, sizes)
                _write_starts(file, sizes, self.dtype.itemsize, total=False)
                _copy(file, np.arange(count + 1, dtype="<i8"))
            file.flush()
            os.fsync(file.fileno())

    def _write_meta(self, path: Path) -> None:
        meta = {
            **self._meta,
            "dtype": self.dtype.name,
            "vocab_size": self.vocab_size,
            "documents": self.written.documents,
            "tokens": self.written.tokens,
        }
        path.write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def __enter__(self) -> "TokenStoreWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()


def check_output(prefix: Path, *, overwrite: bool) -> None:
    """`DataError` if a store would go where a directory or a link is, or replace one unasked."""
    if not prefix.name or prefix.is_dir():
        raise DataError(
            f"--output_prefix {prefix} is a directory: add a name, e.g. {prefix / 'corpus'}"
        )
    # What a link leads to is another store's file: one of the two would not fit any more.
    links = [path for path in _files(prefix) if path.is_symlink()]
    if links:
        raise DataError(
            f"{links[0]} is a link to {links[0].readlink()}: choose another prefix, give the place "
            "that it leads to, or delete the link"
        )
    there = present(prefix)
    if there and not overwrite:
        raise DataError(f"{there[0]} exists already: choose another prefix, or --overwrite it")


def _files(prefix: Path) -> list[Path]:
    """All files that a store of either layout may have."""
    paths = StorePaths(prefix)
    parts = [part(layout) for layout in LAYOUTS for part in (paths.index, paths.tokens)]
    return [*parts, paths.meta, paths.bad_lines]


def present(prefix: Path) -> list[Path]:
    """The files of a store, or of a part of one, that have their names."""
    paths = StorePaths(prefix)
    store = [part(layout) for layout in LAYOUTS for part in (paths.index, paths.tokens)]
    return [path for path in store if path.exists()]


def remove_layout(prefix: Path, layout: StoreFormat) -> None:
    """Delete a store's index and tokens; in this order, so that no index has wrong tokens."""
    paths = StorePaths(prefix)
    paths.index(layout).unlink(missing_ok=True)
    paths.tokens(layout).unlink(missing_ok=True)


def remove_store(prefix: Path, layout: StoreFormat) -> None:
    """Delete a store with what it says of itself."""
    remove_layout(prefix, layout)
    StorePaths(prefix).meta.unlink(missing_ok=True)


def is_finished(prefix: Path, layout: StoreFormat) -> bool:
    """Whether the store has its names, rather than an older one that is to be replaced."""
    paths = StorePaths(prefix)
    return paths.index(layout).is_file() and not _partial(paths.tokens(layout)).exists()


def _partial(path: Path, what: str = "") -> Path:
    """Where a file lies until it is complete: one name, under which a later run finds it."""
    return path.with_name(f".{path.name}.{what + '.' if what else ''}partial")


def _open_at(path: Path, position: int, resume: bool) -> IO[bytes]:
    """Open for writing at `position`, cutting off what may stand behind it."""
    if resume:
        held = path.stat().st_size if path.is_file() else 0
        if held < position:
            raise DataError(
                f"{path} has {held} bytes, but {position} were written before: start again "
                "with --overwrite"
            )
    file = path.open("r+b" if resume else "wb")
    file.truncate(position)
    file.seek(position)
    return file


def npy_header(dtype: np.dtype[Any], length: int) -> bytes:
    """The header of a .npy file (version 1.0) of a one-dimensional array, 128 bytes."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({length},), }}"
    return (
        b"\x93NUMPY\x01\x00"
        + (NPY_HEADER - 10).to_bytes(2, "little")
        + (text.ljust(NPY_HEADER - 11).encode("ascii") + b"\n")
    )


def _copy(file: IO[bytes], array: NDArray[Any]) -> None:
    for start in range(0, len(array), BLOCK):
        file.write(array[start : start + BLOCK].tobytes())


def _write_starts(file: IO[bytes], sizes: NDArray[Any], width: int, *, total: bool) -> None:
    """int64 positions at which the sequences begin, in units of 1/`width`; `total`: and the end."""
    at = 0
    for start in range(0, len(sizes), BLOCK):
        block = sizes[start : start + BLOCK].astype("<i8") * width
        ends = at + np.cumsum(block)
        file.write((ends - block).tobytes())
        at = int(ends[-1])
    if total:
        file.write(at.to_bytes(8, "little"))


def _write_npz(file: IO[bytes], sizes: NDArray[Any]) -> None:
    """`lens`, `sents` and `docs` as PaddleNLP writes them, one sequence a document."""
    count = len(sizes)
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, dtype, length in (
            ("lens", "<i4", count),
            ("sents", "<i8", count + 1),
            ("docs", "<i8", count + 1),
        ):
            # A fixed date keeps the file the same from run to run.
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(info, "w", force_zip64=True) as entry:
                entry.write(npy_header(np.dtype(dtype), length))
                if name == "lens":
                    _copy(entry, sizes)
                elif name == "sents":
                    _write_starts(entry, sizes, 1, total=True)
                else:
                    _copy(entry, np.arange(count + 1, dtype="<i8"))
