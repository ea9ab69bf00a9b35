"""Safetensors files read and written one tensor at a time.

The ``safetensors`` package hands a whole shard at once to its writer and has no bfloat16 for NumPy;
both matter here, because loading and saving may not hold a second copy of the model. The layout is
eight bytes of header length, a JSON header of dtypes, shapes and byte ranges, and the raw data
(https://github.com/huggingface/safetensors#format).
"""

import contextlib
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.errors import UserError
from llm.llama.files.dtypes import FLOATS, PADDLE_BFLOAT16, native, nbytes, widen

_MAX_HEADER = 100 << 20  # the limit of the reference implementation


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in a file; nothing is read until :meth:`read`."""

    file: Path
    name: str
    dtype: str  # as in the header: F32, F16, BF16 …
    shape: tuple[int, ...]
    offset: int

    @property
    def verbatim(self) -> bool:
        """Whether the file holds the numbers in the type that is stated, as they are read."""
        return True

    def packed(self, rows: np.ndarray) -> np.ndarray:
        """Return rows of numbers in ``dtype`` as the file is to hold them."""
        return rows

    def read(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Map the tensor's bytes; bfloat16 widens to float32, others keep their type.

        Args:
            part: a slice of each leading axis; nothing outside of it is read from the disk, but for
                the rest of the pages that it touches.
        """
        return widen(self.bits(part), self.dtype)

    def bits(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Map the tensor's bytes as they are: bfloat16 is uint16."""
        return np.memmap(
            self.file, dtype=native(self.dtype), mode="r", offset=self.offset, shape=self.shape
        )[part]


def read_header(file: Path, types: Sequence[str] = FLOATS) -> dict[str, StoredTensor]:
    """Return the tensors of one file by name.

    Args:
        file: a safetensors file.
        types: header names of the types that may occur.

    Raises:
        UserError: not a safetensors file, truncated, or a type that is no model weight's.
    """
    return read_described(file, types)[0]


def read_described(
    file: Path, types: Sequence[str] = FLOATS
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of one file by name, and what its header says of itself.

    Args:
        file: as of :func:`read_header`.
        types: likewise.

    Raises:
        UserError: see :func:`read_header`.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
            if length > min(_MAX_HEADER, max(size - 8, 0)):
                why = "it is cut off or no safetensors file"
                if prefix == b"version ":
                    why = "it is a Git LFS pointer; run `git lfs pull` to fetch the weights"
                raise UserError(f"{file} has no header: {why}")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} has a damaged safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise UserError(f"{file} has a damaged safetensors header: not a JSON object")
    described = header.pop("__metadata__", None)
    found = {n: _entry(file, n, entry, 8 + length, size, types) for n, entry in header.items()}
    return found, described if isinstance(described, dict) else {}


def _entry(
    file: Path, name: str, entry: Any, data: int, size: int, types: Sequence[str]
) -> StoredTensor:
    """Check one entry of a header whose data section starts at byte ``data``."""
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = all(type(n) is int and n >= 0 for n in (*shape, start, end))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} has a damaged entry for tensor {name}: {error!r}") from error
    if dtype == PADDLE_BFLOAT16:
        dtype = "BF16"
    if dtype not in types:
        raise UserError(f"{file}: tensor {name} has type {dtype}; supported: {', '.join(types)}")
    if not numbers or end - start != nbytes(shape, dtype):
        raise UserError(
            f"{file} has a damaged entry for tensor {name}: bytes {start} to {end} do not hold "
            f"{dtype} of shape {list(shape)}"
        )
    if data + end > size:
        raise UserError(
            f"{file} is cut off: tensor {name} ends at byte {data + end}, the file has {size}; "
            "fetch it again"
        )
    return StoredTensor(file, name, dtype, shape, data + start)


def safetensors_header(
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, str],
    described: Mapping[str, str] | None = None,
    align: int = 8,
) -> bytes:
    """Return what stands before the tensors of a file, which follow without gaps.

    Args:
        shapes: shape of every tensor, in the order of the file.
        types: the header's name of each tensor's type.
        described: what the file says of itself; that it is a checkpoint when not given.
        align: the tensors begin at a multiple of it.
    """
    header: dict[str, object] = {
        "__metadata__": {"format": "pt"} if described is None else described
    }
    position = 0
    for name, shape in shapes.items():
        end = position + nbytes(shape, types[name])
        entry = {"dtype": types[name], "shape": list(shape)}
        header[name] = {**entry, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    return struct.pack("<Q", len(text)) + text


class TensorFile:
    """A file that is being written, tensor after tensor in the order of ``shapes``.

    Args:
        file: target; it comes to be with the first tensor.
        shapes: shape of every tensor, in the order of the file.
        dtypes: the header's name of the type, one for all tensors or for each by name.
    """

    def __init__(
        self, file: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: str | Mapping[str, str]
    ) -> None:
        self.file = file
        self.types = {n: dtypes if isinstance(dtypes, str) else dtypes[n] for n in shapes}
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._pending = list(reversed(self.shapes))
        self._stream: BinaryIO | None = None

    def add(self, name: str, data: np.ndarray) -> None:
        """Append C-ordered data in the announced type (uint16 bits for BF16).

        Raises:
            OSError: a full or unwritable disk; the file is closed, and incomplete.
        """
        assert self._pending.pop() == name, name
        assert data.shape == self.shapes[name] and data.dtype == native(self.types[name]), name
        try:
            if self._stream is None:
                self._stream = self.file.open("wb")
                self._stream.write(safetensors_header(self.shapes, self.types))
            self._stream.write(np.ascontiguousarray(data).data)
            if not self._pending:
                self._stream.flush()
                os.fsync(self._stream.fileno())
                self.close()
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file, whether or not it is complete."""
        if self._stream is not None:
            self._stream.close()


def write_file(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: str | Mapping[str, str],
    fetch: Callable[[str], np.ndarray],
) -> None:
    """Write one file, fetching each tensor only when its turn comes.

    Args:
        file: target; flushed to disk before returning.
        shapes: shape of every tensor, in the order of the file; at least one.
        dtypes: the header's name of the type, one for all tensors or for each by name.
        fetch: returns a tensor's C-ordered data in that type (uint16 bits for BF16).
    """
    with contextlib.closing(TensorFile(file, shapes, dtypes)) as tensors:
        for name in shapes:
            tensors.add(name, fetch(name))
