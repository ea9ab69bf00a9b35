"""Token stores: documents as token ids on disk, read by memory map and written as a stream.

Two layouts are read and written, a third is read; docs/data.md gives every byte of them:

- `bin`: PREFIX.bin + PREFIX.idx, Megatron's indexed dataset (version 1).
- `npy`: PREFIX_ids.npy + PREFIX_idx.npz, PaddleNLP's older layout.
- `ds`: PREFIX.ds + PREFIX.ds.index, which datatrove's DocumentTokenizer writes.

PREFIX.meta.json, which other readers ignore, says which tokenizer the ids are from.
"""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from data.tokenization.model_files import read_json
from data.vocabulary import check_origin

StoreFormat = Literal["bin", "npy"]
Layout = Literal["bin", "npy", "ds"]
LAYOUTS: tuple[StoreFormat, ...] = ("bin", "npy")
# By layout, the endings of the file of the ids and of that of the lengths.
_ENDINGS: dict[Layout, tuple[str, str]] = {
    "bin": (".bin", ".idx"),
    "npy": ("_ids.npy", "_idx.npz"),
    "ds": (".ds", ".ds.index"),
}
Ints = NDArray[np.int64]

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = np.dtype(
    [("magic", "V9"), ("version", "<u8"), ("dtype", "u1"), ("sequences", "<u8"), ("marks", "<u8")]
)
# Megatron's codes; the floating-point ones (6, 7) make no sense for token ids.
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
    9: np.dtype("<u4"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SCAN_TOKENS = 1 << 24


@dataclass(frozen=True)
class StorePaths:
    """The files of a store by their prefix."""

    prefix: Path

    def _with(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix)

    @property
    def meta(self) -> Path:
        """The side file with what the ids mean."""
        return self._with(".meta.json")

    @property
    def bad_lines(self) -> Path:
        """Where lines that were left out are listed."""
        return self._with(".bad_lines.txt")

    def tokens(self, layout: Layout) -> Path:
        """The file of the ids."""
        return self._with(_ENDINGS[layout][0])

    def index(self, layout: Layout) -> Path:
        """The file of the lengths."""
        return self._with(_ENDINGS[layout][1])


class TokenStore:
    """A store opened for reading; its tokens stay on disk until they are used.

    Attributes:
        layout: "bin", "npy" or "ds".
        tokens: all ids, [num_tokens].
        starts: where each document begins in `tokens`, and the end, int64 [num_documents + 1].
        sizes: tokens of each document, int32 [num_documents].
        meta: what PREFIX.meta.json says, {} where there is none.
    """

    def __init__(self, prefix: Path, layout: Layout, tokens: NDArray[Any], starts: Ints) -> None:
        self.prefix = prefix
        self.layout = layout
        self.tokens = tokens
        self.starts = starts
        self.sizes = _document_sizes(prefix, starts)
        self.meta = read_json(StorePaths(prefix).meta)

    @classmethod
    def open(cls, prefix: str | Path) -> "TokenStore":
        """Open the store PREFIX.bin/.idx, PREFIX_ids.npy/_idx.npz or PREFIX.ds/.ds.index.

        Raises:
            DataError: no store, a part missing, or files that are damaged or do not fit.
        """
        place = Path(prefix)
        layout = find_layout(place)
        paths = StorePaths(place)
        tokens, starts = _OPENERS[layout](paths.tokens(layout), paths.index(layout))
        return cls(place, layout, tokens, starts)

    @property
    def num_documents(self) -> int:
        """Documents in the store."""
        return len(self.sizes)

    @property
    def num_tokens(self) -> int:
        """Tokens in the store."""
        return int(self.starts[-1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the ids on disk."""
        return self.tokens.dtype

    @property
    def vocab_size(self) -> int | None:
        """Vocabulary size of the tokenizer that made the ids, if it is recorded."""
        value = self.meta.get("vocab_size")
        return value if isinstance(value, int) else None

    def document(self, index: int) -> NDArray[Any]:
        """Ids of one document, a view of the file."""
        if not 0 <= index < self.num_documents:
            raise DataError(
                f"document {index} is not in {self.prefix}, which holds 0 to "
                f"{self.num_documents - 1}"
            )
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    def fingerprint(self) -> str:
        """sha256 (hex) of the lengths of all documents, of 64 pieces of the tokens and of meta.

        Two stores with the same fingerprint give the same samples.
        """
        digest = hashlib.sha256(self.sizes.tobytes())
        step = max(self.num_tokens // 64, 1)
        for start in range(0, self.num_tokens, step):
            digest.update(self.tokens[start : start + 256].astype("<i8").tobytes())
        digest.update(json.dumps(self.meta, sort_keys=True).encode())
        return digest.hexdigest()

    def largest_id(self) -> int:
        """The largest id in the store, by reading all of it; -1 if it is empty."""
        largest = -1
        for start in range(0, self.num_tokens, SCAN_TOKENS):
            largest = max(largest, int(self.tokens[start : start + SCAN_TOKENS].max()))
        return largest

    def check_vocab(self, vocab_size: int, *, fingerprint: str | None = None) -> None:
        """`DataError` unless every id is below `vocab_size` and, if given, the tokenizer is
        the one whose `fingerprint` is recorded.

        Reads the whole store only where the recorded vocabulary size does not settle it.
        """
        if fingerprint is not None:
            check_origin(
                f"{self.prefix} was made",
                fingerprint,
                recorded=self.meta.get("tokenizer_fingerprint"),
                recorded_name=self.meta.get("tokenizer"),
                fix="prepare the data again",
            )
        if self.vocab_size is not None and self.vocab_size <= vocab_size:
            return
        largest = self.largest_id()
        if largest >= vocab_size:
            raise DataError(
                f"{self.prefix} holds token id {largest}, but the model's vocabulary has "
                f"{vocab_size} ids (0 to {vocab_size - 1}): prepare the data with the model's "
                "own tokenizer"
            )


def find_layout(prefix: Path) -> Layout:
    """Which layout is at `prefix`; `DataError` if none or several, or one file is missing."""
    if not prefix.name:
        raise DataError(
            f"{str(prefix)!r} is a directory, and no name in it: name a token store, such as "
            f"{next(iter(find_stores(prefix)), prefix / 'corpus')}"
        )
    paths = StorePaths(prefix)
    found: list[Layout] = []
    for layout in _ENDINGS:
        tokens, index = paths.tokens(layout), paths.index(layout)
        if tokens.is_file() and index.is_file():
            found.append(layout)
        elif tokens.is_file() or index.is_file():
            present, absent = (tokens, index) if tokens.is_file() else (index, tokens)
            raise DataError(
                f"{present} is there but {absent} is not: copy both, or prepare the data again"
            )
    if len(found) > 1:
        names = " and ".join(paths.tokens(layout).name for layout in found)
        raise DataError(f"{prefix} has {len(found)} layouts ({names}): delete or rename one")
    if not found:
        raise DataError(_not_found(prefix))
    return found[0]


def _not_found(prefix: Path) -> str:
    message = (
        f"no token store at {prefix}: expected {prefix}.bin with {prefix}.idx, "
        f"{prefix}_ids.npy with {prefix}_idx.npz, or {prefix}.ds with {prefix}.ds.index"
    )
    folder = prefix if prefix.is_dir() else prefix.parent
    if not folder.is_dir():
        return f"{message}; there is no directory {folder}"
    near = find_stores(folder)
    if near:
        return f"{message}; did you mean {near[0]}?"
    return f"{message}; make one with `python -m data.prepare`"


def find_stores(directory: str | Path) -> list[Path]:
    """Prefixes of the stores in a directory, sorted; the label masks of others are left out."""
    folder = Path(directory)
    names = {
        path.name.removesuffix(ending)
        for _, ending in _ENDINGS.values()
        for path in folder.glob(f"*{ending}")
    }
    masks = {f"{name}.labels" for name in names}
    return [folder / name for name in sorted(names - masks)]


def check_alike(stores: Sequence[TokenStore]) -> None:
    """`DataError` where stores say that their ids are of different tokenizers."""
    said = [store for store in stores if store.meta.get("tokenizer_fingerprint")]
    for store in said[1:]:
        if store.meta["tokenizer_fingerprint"] != said[0].meta["tokenizer_fingerprint"]:
            raise DataError(
                f"{store.prefix} was made with another tokenizer ({store.meta.get('tokenizer')}) "
                f"than {said[0].prefix} ({said[0].meta.get('tokenizer')}): prepare all stores of a "
                "run with one"
            )


def shared_store(stores: Sequence[TokenStore]) -> tuple[TokenStore, TokenStore] | None:
    """Return two stores of the same documents, as a copy or a link makes them; None without such.

    Fingerprints are made only of stores that are equally large.
    """
    alike: dict[tuple[int, int], list[TokenStore]] = {}
    for store in stores:
        alike.setdefault((store.num_documents, store.num_tokens), []).append(store)
    for group in alike.values():
        seen: dict[str, TokenStore] = {}
        for store in group if len(group) > 1 else ():
            first = seen.setdefault(store.fingerprint(), store)
            if first is not store:
                return first, store
    return None


def _document_sizes(prefix: Path, starts: Ints) -> NDArray[np.int32]:
    sizes = np.diff(starts)
    if sizes.size and int(sizes.max()) > np.iinfo(np.int32).max:
        raise DataError(
            f"document {int(sizes.argmax())} of {prefix} has {int(sizes.max())} tokens; the limit "
            f"is {np.iinfo(np.int32).max}: split it"
        )
    return sizes.astype(np.int32)


def _open_bin(tokens_path: Path, index_path: Path) -> tuple[NDArray[Any], Ints]:
    """Check a .bin/.idx pair; returns the tokens and the documents' starts."""
    file_size = index_path.stat().st_size
    if file_size < HEADER.itemsize:
        raise DataError(
            f"{index_path} is cut off: it has {file_size} bytes, the header alone takes "
            f"{HEADER.itemsize}"
        )
    header = np.fromfile(index_path, HEADER, count=1)[0]
    dtype = _check_header(index_path, header)
    sequences, marks = int(header["sequences"]), int(header["marks"])
    expected = HEADER.itemsize + 12 * sequences + 8 * marks
    if file_size != expected:
        fault = "is cut off" if file_size < expected else "has bytes too many"
        raise DataError(
            f"{index_path} {fault}: {sequences} sequences and {marks} document marks take "
            f"{expected} bytes, the file has {file_size}"
        )
    at = HEADER.itemsize
    raw = np.memmap(index_path, np.uint8, "r")
    sizes = raw[at : at + 4 * sequences].view("<i4")
    pointers = raw[at + 4 * sequences : at + 12 * sequences].view("<i8")
    document_marks = raw[at + 12 * sequences :].view("<i8")
    starts = _check_layout(index_path, sizes, document_marks)
    offsets = np.cumsum(sizes, dtype=np.int64) - sizes
    if not np.array_equal(pointers, offsets * dtype.itemsize):
        where = int(np.flatnonzero(pointers != offsets * dtype.itemsize)[0])
        raise DataError(
            f"{index_path}: sequence {where} is said to begin at byte {pointers[where]}, but the "
            f"lengths before it end at byte {offsets[where] * dtype.itemsize}: it is damaged"
        )
    total = int(starts[-1])
    held = tokens_path.stat().st_size
    if held != total * dtype.itemsize:
        raise DataError(
            f"{tokens_path} has {held} bytes, but {index_path} describes {total} tokens of "
            f"{dtype.itemsize} bytes: one of the two is cut off or from another run"
        )
    if total == 0:
        raise DataError(f"{tokens_path.with_suffix('')} holds no tokens: prepare it from more text")
    return np.memmap(tokens_path, dtype, "r"), starts


def _check_header(path: Path, header: Any) -> np.dtype[Any]:
    magic = header["magic"].tobytes()
    if magic != MAGIC:
        raise DataError(
            f"{path} is no index of a token store: it begins with {magic!r}, not {MAGIC!r}"
        )
    if header["version"] == header["version"].dtype.type(VERSION).byteswap():
        raise DataError(
            f"{path} is big-endian, and this suite reads little-endian files: prepare the data "
            "again, on a little-endian machine"
        )
    if header["version"] != VERSION:
        raise DataError(
            f"{path} has version {header['version']} of the index layout; only version {VERSION} "
            "can be read"
        )
    code = int(header["dtype"])
    if code not in DTYPES:
        known = ", ".join(f"{code} ({dtype.name})" for code, dtype in DTYPES.items())
        raise DataError(f"{path} has type code {code} for token ids; known are {known}")
    return DTYPES[code]


def _check_layout(path: Path, sizes: NDArray[Any], marks: NDArray[Any]) -> Ints:
    """Document starts from sequence lengths and the sequences at which documents begin."""
    if sizes.size and int(sizes.min()) < 0:
        raise DataError(f"{path}: sequence {int(sizes.argmin())} has length {int(sizes.min())}")
    if not marks.size or marks[0] != 0 or (np.diff(marks) < 0).any() or marks[-1] != len(sizes):
        found = f"{marks[0]} to {marks[-1]}" if marks.size else "none"
        raise DataError(
            f"{path}: the document marks must rise from 0 to the number of sequences, "
            f"{len(sizes)}, but they are {found}: it is damaged or was not finished"
        )
    ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    starts: Ints = ends[np.asarray(marks, np.int64)]
    return starts


def _open_npy(tokens_path: Path, index_path: Path) -> tuple[NDArray[Any], Ints]:
    """Check an _ids.npy/_idx.npz pair; returns the tokens and the documents' starts."""
    try:
        tokens = np.load(tokens_path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{tokens_path} is no array of token ids, or damaged: {error}") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(
            f"{tokens_path} must hold a one-dimensional array of integers, not {tokens.dtype} of "
            f"shape {tokens.shape}"
        )
    try:
        with np.load(index_path, allow_pickle=False) as arrays:
            lens, docs = arrays["lens"], arrays["docs"]
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{index_path} must hold the arrays 'lens' and 'docs', or is damaged: {error}"
        ) from error
    if (
        lens.ndim != 1
        or docs.ndim != 1
        or lens.dtype.kind not in "iu"
        or docs.dtype.kind not in "iu"
    ):
        raise DataError(f"{index_path}: 'lens' and 'docs' must be one-dimensional integer arrays")
    starts = _check_layout(index_path, lens, docs)
    if len(tokens) != int(starts[-1]):
        raise DataError(
            f"{tokens_path} has {len(tokens)} tokens, but {index_path} describes "
            f"{int(starts[-1])}: one of the two is cut off or from another run"
        )
    if not len(tokens):
        raise DataError(f"{tokens_path} holds no tokens: prepare it from more text")
    return tokens, starts


def _open_ds(tokens_path: Path, index_path: Path) -> tuple[NDArray[Any], Ints]:
    """Check a .ds/.ds.index pair; returns the tokens and the documents' starts.

    The index is where each document ends, uint64, in tokens; two bytes a token, or four where the
    vocabulary needs them, which only the sizes of the two files tell for sure.
    """
    marks = tokens_path.with_name(f"{tokens_path.name}.loss")
    if marks.exists():
        raise DataError(
            f"{marks} says which tokens are to be learnt, and pretraining learns all of them: "
            "write the store without save_loss_metadata, or move that file away to learn all"
        )
    size, held = index_path.stat().st_size, tokens_path.stat().st_size
    if size % 8 or not size:
        raise DataError(
            f"{index_path} has {size} bytes, which are not 8 for each document: it is cut off or "
            "no index of datatrove's"
        )
    ends = np.fromfile(index_path, "<u8").astype(np.int64)
    starts: Ints = np.concatenate([np.zeros(1, np.int64), ends])
    if (np.diff(starts) < 0).any():
        where = int((np.diff(starts) < 0).argmax())
        raise DataError(
            f"{index_path}: document {where} ends at token {ends[where]}, before it begins at "
            f"{starts[where]}: it is damaged"
        )
    total = int(starts[-1])
    if not total:
        raise DataError(f"{tokens_path} holds no tokens: prepare it from more text")
    width = {2 * total: "<u2", 4 * total: "<u4"}.get(held)
    if width is None:
        raise DataError(
            f"{tokens_path} has {held} bytes, but {index_path} describes {total} tokens of 2 or 4 "
            "bytes: one of the two is cut off or from another run"
        )
    return np.memmap(tokens_path, width, "r"), starts


_OPENERS = {"bin": _open_bin, "npy": _open_npy, "ds": _open_ds}


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 for vocabularies below 65500 ids (Megatron's bound), int32 above."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")
