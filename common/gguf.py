"""GGUF files: what their headers say, checked against the file before anybody acts on it.

The format is llama.cpp's (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): metadata with
keys, then names, shapes and places of tensors, then their bytes. The ``gguf`` package's reader
believes the counts and lengths that a file states, and takes seconds for a vocabulary; this one
holds each of them against the size of the file.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.errors import DataError

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # where general.alignment does not say otherwise
_MAX_DIMENSIONS = 4
# Numbers of metadata, by the format's number for the type, as `struct` calls them.
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
# Types of tensors that are read: numbers of a block, and its bytes (ggml's `block_q4_0` and so on).
BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
_TYPES = {
    0: "F32",
    1: "F16",
    30: "BF16",
    8: "Q8_0",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
}
# Types of llama.cpp that are not read, by name for the message.
_OTHERS = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in a file.

    Attributes:
        name: llama.cpp's.
        shape: outermost axis first; the file states it the other way round.
        dtype: of :data:`BLOCKS`.
        offset: from the beginning of the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        numbers, size = BLOCKS[self.dtype]
        return math.prod(self.shape) // numbers * size


@dataclass(frozen=True)
class GGUFHeader:
    """What a file says before its tensors.

    Attributes:
        file: the file.
        metadata: values by key; arrays are lists.
        tensors: by name.
    """

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a value of the metadata, or the default where there is none.

        Raises:
            DataError: it is of another kind.
        """
        value = self.metadata.get(key, default)
        fits = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
        if value is None or fits:
            return value
        raise DataError(
            f"{self.file}: {key} is {_short(value)}, which is no {kind.__name__}; the file is "
            "damaged, fetch it again"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def gguf_file(place: str | Path) -> Path | None:
    """Return the GGUF file that a place stands for, None where it stands for something else.

    Args:
        place: such a file, by its name or by how it begins (Ollama's have no ending); or a
            directory whose only model is one.

    Raises:
        DataError: a name that ends in .gguf, and no such file; a directory with several of them
            and nothing else.
    """
    path = Path(place)
    if path.is_file():
        return path if path.suffix.lower() == SUFFIX or _begins(path) else None
    if path.suffix.lower() == SUFFIX and not path.is_dir():
        raise DataError(f"{path} is not there")
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(f for f in path.iterdir() if f.suffix.lower() == SUFFIX and f.is_file())
    if len(files) > 1:
        raise DataError(
            f"{path} holds {len(files)} GGUF files ({', '.join(f.name for f in files[:3])}"
            f"{', …' if files[3:] else ''}); give the one that is meant, such as {files[0]}"
        )
    return files[0] if files else None


def _begins(file: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def read_gguf(file: Path) -> GGUFHeader:
    """Return what a file says of itself; no tensor is read.

    Raises:
        DataError: no GGUF file, another version or byte order, a damaged or cut one, tensors that
            overlap or lie beyond its end, a type that is not read, or one part of several.
    """
    try:
        about = file.stat()
        return _read(file, about.st_size, about.st_mtime_ns)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error


@lru_cache(maxsize=4)
def _read(file: Path, size: int, changed: int) -> GGUFHeader:
    """Read a header once, though configuration, tokenizer and weights all ask for it."""
    del changed
    if size < 24:
        raise DataError(f"{file} is no GGUF file: it has {size} bytes; fetch it again")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return _Cursor(file, view, size).header()


class _Cursor:
    """Reads one field after the other, none of them beyond the end of the file."""

    def __init__(self, file: Path, view: mmap.mmap, size: int) -> None:
        self._file, self._view, self._size, self._at = file, view, size, 0

    def header(self) -> GGUFHeader:
        self._begin()
        tensors, keys = self._number("Q"), self._number("Q")
        # No entry is shorter: a length and a type; a length, a count, a type and a place.
        self._check_count(keys, 12, "keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string("the name of a key")
            if key in metadata:
                raise self._damaged(f"the key {key} stands twice")
            metadata[key] = self._value(self._number("I"), key)
        self._refuse_parts(metadata)
        self._check_count(tensors, 24, "tensors")
        stated = [self._tensor() for _ in range(tensors)]
        found = {tensor.name: tensor for tensor in self._placed(stated, metadata)}
        if len(found) < len(stated):
            raise self._damaged("a tensor stands twice")
        return GGUFHeader(self._file, metadata, found)

    def _begin(self) -> None:
        magic, version = self._bytes(4), self._number("I")
        if magic != _MAGIC:
            why = f"it begins with {magic!r}"
            if magic == b"vers":
                why = "it is a Git LFS pointer; run `git lfs pull` to fetch it"
            raise DataError(f"{self._file} is no GGUF file: {why}")
        if version in _VERSIONS:
            return
        turned = int.from_bytes(version.to_bytes(4, "little"), "big")
        why = f"it is of version {version}; versions {' and '.join(map(str, _VERSIONS))} are read"
        if turned in (1, *_VERSIONS):
            why = "its numbers are big-endian, and this suite reads little-endian files"
        raise DataError(
            f"{self._file} is not read: {why}; fetch such a file, or convert the model again with "
            "llama.cpp's convert_hf_to_gguf.py"
        )

    def _refuse_parts(self, metadata: Mapping[str, Any]) -> None:
        parts = metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise DataError(
                f"{self._file} is one of {parts} parts of a model; put them together with "
                "llama.cpp's `llama-gguf-split --merge FIRST_PART MERGED.gguf`"
            )

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string("the name of a tensor")
        count = self._number("I")
        if not 1 <= count <= _MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name} has {count} dimensions")
        shape = tuple(self._number("Q") for _ in range(count))
        return name, shape[::-1], self._number("I"), self._number("Q")

    def _placed(
        self, stated: list[tuple[str, tuple[int, ...], int, int]], metadata: Mapping[str, Any]
    ) -> list[GGUFTensor]:
        """Return the tensors; each has to lie within the file and apart from the others."""
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment % 8:
            raise self._damaged(f"general.alignment is {_short(alignment)}, no multiple of 8")
        begin = -(-self._at // alignment) * alignment
        tensors = []
        for name, shape, kind, offset in stated:
            tensor = GGUFTensor(name, shape, self._type(name, kind), begin + offset)
            if offset % alignment:
                raise self._damaged(f"tensor {name} begins at byte {offset}, off the alignment")
            if not all(shape) or shape[-1] % BLOCKS[tensor.dtype][0]:
                raise self._damaged(f"tensor {name} of type {tensor.dtype} has shape {[*shape]}")
            if tensor.offset + tensor.nbytes > self._size:
                raise DataError(
                    f"{self._file} is cut off: tensor {name} ends at byte "
                    f"{tensor.offset + tensor.nbytes}, the file has {self._size}; fetch it again"
                )
            tensors.append(tensor)
        for one, other in pairwise(sorted(tensors, key=lambda tensor: tensor.offset)):
            if one.offset + one.nbytes > other.offset:
                raise self._damaged(f"the tensors {one.name} and {other.name} overlap")
        return tensors

    def _type(self, name: str, kind: int) -> str:
        if kind in _TYPES:
            return _TYPES[kind]
        said = _OTHERS.get(kind, f"number {kind}")
        raise DataError(
            f"{self._file}: tensor {name} has type {said}; supported: {', '.join(BLOCKS)}. Fetch "
            "the model in one of them, or widen it with llama.cpp's `llama-quantize "
            f"--allow-requantize {self._file.name} WIDE.gguf F16`"
        )

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise self._damaged(f"{key} has a value of the unknown type {kind}")
        of, count = self._number("I"), self._number("Q")
        if of == _STRING:
            self._check_count(count, 8, f"texts of {key}")
            return [self._string(key) for _ in range(count)]
        if of not in _NUMBERS:
            raise self._damaged(f"{key} is an array of the type {of}")
        size = struct.calcsize(f"<{_NUMBERS[of]}")
        self._check_count(count, size, f"numbers of {key}")
        return list(struct.unpack(f"<{count}{_NUMBERS[of]}", self._bytes(count * size)))

    def _check_count(self, count: int, size: int, what: str) -> None:
        """Refuse more items than the rest of the file has room for."""
        if count * size > self._size - self._at:
            raise self._damaged(f"it states {count} {what}, for which it is too short")

    def _string(self, what: str) -> str:
        length = self._number("Q")
        self._check_count(length, 1, f"bytes of {what}")
        try:
            return self._bytes(length).decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is not UTF-8 text ({error.reason})") from error

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))
        return value

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise self._damaged("its header is cut off")
        start, self._at = self._at, self._at + count
        return self._view[start : self._at]

    def _damaged(self, why: str) -> DataError:
        return DataError(f"{self._file} is damaged: {why}; fetch it again")
