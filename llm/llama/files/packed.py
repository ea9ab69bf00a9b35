"""Packed weights in a file that is mapped into memory: what a network opens in seconds from.

A safetensors file whose tensors lie as the native kernels read them, in an order that keeps each of
them aligned. Its header says what it was made from, and with which layout; a file that says
something else, or is cut off, counts as absent. Pages of a mapped file are the system's cache of
it: they take no time to read where they are there, and processes that map the file share them.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import replacing
from llm.llama.files.dtypes import TYPES, Array, native, nbytes
from llm.llama.files.safetensors import StoredTensor, read_described, safetensors_header

# Of this file: count up when names or metadata change. The layout of the weights themselves is
# external_ops.native.PACKED_LAYOUT.
FORMAT_VERSION = 1
SUFFIX = ".packed"
# Files are written in whole large pages: Linux then keeps them in such, and maps them so.
_PAGE = 2 << 20
_BLOCK = 4 * _PAGE
_ALIGN = 64  # bytes, a line of the processor's cache
_SAMPLES, _SAMPLE = 16, 4096  # pieces of a weights file that are looked at, and their bytes


@dataclass(frozen=True)
class PackedKey:
    """What a file of packed weights has to have been made from.

    Args:
        source: fingerprint of the model's files, of :func:`fingerprint`.
        layout: of the packed weights, ``external_ops.native.PACKED_LAYOUT``.
        options: how they were packed, such as the type.
    """

    source: str
    layout: int
    options: Mapping[str, str]

    @property
    def name(self) -> str:
        """The file's name, the same for whatever a model becomes: newer files replace older."""
        return self._named("model")

    def shared_name(self, directory: Path) -> str:
        """The file's name in a place where those of several models lie; ``directory`` is its own.

        A model and its draft would replace each other's file at every start.
        """
        return self._named(f"{directory.resolve().name}-{_digest(directory)}")

    def _named(self, model: str) -> str:
        return "-".join([model, *self.options.values()]) + SUFFIX

    @property
    def described(self) -> dict[str, str]:
        """What the header says of the key."""
        options = json.dumps(dict(self.options), sort_keys=True)
        return {
            "format": "packed",
            "format_version": str(FORMAT_VERSION),
            "packed_layout": str(self.layout),
            "source": self.source,
            "options": options,
        }


@dataclass(frozen=True)
class Stored:
    """A tensor to be written.

    Args:
        shape: of the tensor.
        dtype: the header's name of the type.
        fetch: returns the numbers, uint16 bits for bfloat16.
    """

    shape: tuple[int, ...]
    dtype: str
    fetch: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return nbytes(self.shape, self.dtype)


def fingerprint(directory: Path, files: set[Path]) -> str:
    """Return what changes with a model's files: names, sizes, times and some of their contents.

    Reading all of a large file would take as long as packing it.

    Args:
        directory: of the model; its config.json is read whole. A GGUF file has none.
        files: that hold the weights.
    """
    described = directory / "config.json"
    whole = hashlib.sha256(described.read_bytes() if described.is_file() else b"")
    for file in sorted(files):
        about = file.stat()
        whole.update(f"\0{file.name} {about.st_size} {about.st_mtime_ns}\0".encode())
        with file.open("rb") as stream:
            whole.update(stream.read(_SAMPLE))
            for index in range(_SAMPLES):
                stream.seek(index * max(0, about.st_size - _SAMPLE) // (_SAMPLES - 1))
                whole.update(stream.read(_SAMPLE))
    return whole.hexdigest()


def user_directory(directory: Path) -> Path | None:
    """Return where a model's packed weights lie if its own directory takes no files.

    None where the user has no home: a number without a name, as in containers.
    """
    # Relative paths are invalid by the XDG Base Directory Specification.
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():
        try:
            root = Path.home() / ".cache"
        except RuntimeError:
            return None
    return root / "llama-paddle" / "packed" / _digest(directory)


def _digest(directory: Path) -> str:
    return hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]


def read_packed(
    file: Path, described: Mapping[str, str]
) -> tuple[dict[str, Array], dict[str, Any]] | None:
    """Map a file of packed weights.

    Args:
        file: where it would lie.
        described: what its header has to say of itself, such as ``PackedKey.described``.

    Returns:
        Arrays by name (uint16 bits for bfloat16), and what the writer said of them; their memory
        is the file's, private to this process where somebody writes to it. None where there is no
        such file, or it is cut off, damaged or made from something else.
    """
    try:
        tensors, said = read_described(file, TYPES)
        contents = json.loads(said.pop("contents"))
        if said != described:
            return None
        raw = np.memmap(file, np.uint8, "c")
    except (UserError, KeyError, ValueError, OSError):
        return None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        raw._mmap.madvise(mmap.MADV_HUGEPAGE)  # what is not in memory is read in large pages
    return {name: _view(raw, one) for name, one in tensors.items()}, contents


def _view(raw: Array, tensor: StoredTensor) -> Array:
    end = tensor.offset + nbytes(tensor.shape, tensor.dtype)
    return raw[tensor.offset : end].view(native(tensor.dtype)).reshape(tensor.shape)


def write_packed(
    file: Path,
    described: Mapping[str, str],
    tensors: Mapping[str, Stored],
    contents: Mapping[str, Any],
) -> None:
    """Write a file of packed weights; it has its name once it is complete.

    Args:
        file: where.
        described: what the header says of the file; ``contents`` comes to it.
        tensors: by name; fetched one by one.
        contents: JSON that :func:`read_packed` returns beside them.

    Raises:
        OSError: a full or unwritable disk; nothing is left behind.
    """
    names = sorted(tensors, key=lambda name: _rank(tensors[name]))
    said = {**described, "contents": json.dumps(contents)}
    shapes = {name: tensors[name].shape for name in names}
    types = {name: tensors[name].dtype for name in names}
    with replacing(file) as temporary, temporary.open("wb", buffering=0) as stream:
        blocks = _Blocks(stream)
        blocks.add(np.frombuffer(safetensors_header(shapes, types, said, _ALIGN), np.uint8))
        for name in names:
            blocks.add(np.ascontiguousarray(tensors[name].fetch()).reshape(-1).view(np.uint8))
        blocks.flush()
        os.fsync(stream.fileno())


def _rank(tensor: Stored) -> tuple[bool, int]:
    """Order tensors so that each is aligned: what is whole lines first, then the wide ones."""
    return tensor.nbytes % _ALIGN != 0, -native(tensor.dtype).itemsize


class _Blocks:
    """Writes bytes in blocks that begin where large pages of the file do."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._block = np.empty(_BLOCK, np.uint8)
        self._used = 0

    def add(self, data: Array) -> None:
        """Append bytes."""
        at = 0
        while at < len(data):
            step = min(len(data) - at, _BLOCK - self._used)
            self._block[self._used : self._used + step] = data[at : at + step]
            self._used, at = self._used + step, at + step
            if self._used == _BLOCK:
                self.flush()

    def flush(self) -> None:
        """Write what has been collected."""
        view = memoryview(self._block)[: self._used]
        while view:
            view = view[self._stream.write(view) :]
        self._used = 0
