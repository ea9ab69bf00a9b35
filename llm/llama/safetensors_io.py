"""Safetensors files read and written one tensor at a time.

The ``safetensors`` package hands a whole shard at once to its writer and has no bfloat16 for NumPy;
both matter here, because loading and saving may not hold a second copy of the model. The layout is
eight bytes of header length, a JSON header of dtypes, shapes and byte ranges, and the raw data
(https://github.com/huggingface/safetensors#format).
"""

import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm.errors import UserError

# NumPy has no bfloat16: its bits travel as uint16.
_NUMPY = {"F32": "float32", "F16": "float16", "BF16": "uint16", "F64": "float64"}
FLOATS = tuple(_NUMPY)
# Of quantized weights.
_NUMPY |= {"I8": "int8", "U8": "uint8", "I32": "int32", "I64": "int64"}
TYPES = tuple(_NUMPY)
_MAX_HEADER = 100 << 20  # the limit of the reference implementation


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in a file; nothing is read until :meth:`read`."""

    file: Path
    name: str
    dtype: str  # as in the header: F32, F16, BF16 …
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """Map the tensor's bytes; bfloat16 widens to float32, others keep their type."""
        raw = np.memmap(
            self.file, dtype=_NUMPY[self.dtype], mode="r", offset=self.offset, shape=self.shape
        )
        if self.dtype != "BF16":
            return raw
        wide = np.array(raw, dtype=np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)


def read_header(file: Path, types: Sequence[str] = FLOATS) -> dict[str, StoredTensor]:
    """Return the tensors of one file by name.

    Args:
        file: a safetensors file.
        types: header names of the types that may occur.

    Raises:
        UserError: not a safetensors file, truncated, or a type that is no model weight's.
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
    header.pop("__metadata__", None)
    return {n: _entry(file, n, entry, 8 + length, size, types) for n, entry in header.items()}


def _entry(
    file: Path, name: str, entry: Any, data: int, size: int, types: Sequence[str]
) -> StoredTensor:
    """Check one entry of a header whose data section starts at byte ``data``."""
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = all(type(n) is int and n >= 0 for n in (*shape, start, end))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} has a damaged entry for tensor {name}: {error!r}") from error
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


def nbytes(shape: Sequence[int], dtype: str) -> int:
    """Return the size of a tensor; ``dtype`` is the header's name."""
    return math.prod(shape) * np.dtype(_NUMPY[dtype]).itemsize


def write_file(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: str | Mapping[str, str],
    fetch: Callable[[str], np.ndarray],
) -> None:
    """Write one file, fetching each tensor only when its turn comes.

    Args:
        file: target; flushed to disk before returning.
        shapes: shape of every tensor, in the order of the file.
        dtypes: the header's name of the type, one for all tensors or for each by name.
        fetch: returns a tensor's C-ordered data in that type (uint16 bits for BF16).
    """
    types = {n: dtypes if isinstance(dtypes, str) else dtypes[n] for n in shapes}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + nbytes(shape, types[name])
        header[name] = {"dtype": types[name], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            data = fetch(name)
            assert data.shape == tuple(shape) and data.dtype == _NUMPY[types[name]], name
            stream.write(np.ascontiguousarray(data).data)
        stream.flush()
        os.fsync(stream.fileno())
