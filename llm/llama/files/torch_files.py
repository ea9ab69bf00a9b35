"""PyTorch's files (``pytorch_model.bin``, ``consolidated.00.pth``), read without running them.

``torch.save`` writes a ZIP archive: a pickle that says which tensors there are, and each storage as
an entry of its own, uncompressed. A pickle can run any code when it is loaded; here every name in
it stands for a description of ours, or the file is refused. Tensors stay in the file.
"""

import io
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from common.errors import UserError
from llm.llama.files.dtypes import FLOATS, native
from llm.llama.files.safetensors import StoredTensor

# Storage classes of torch, by what headers of safetensors files call their type.
_STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "IntStorage": "I32",
    "LongStorage": "I64",
}
_LEGACY = (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19")
_DAMAGED = (
    *(pickle.UnpicklingError, EOFError, AttributeError, LookupError),
    *(TypeError, ValueError, OverflowError, MemoryError),
)
_LOCAL = 30  # bytes of an entry's header before its name
_LARGEST_PICKLE = 1 << 28
_WORD = 16  # bytes of an entry that is one word


Inert = Callable[[str], bool]


def _nothing(name: str) -> bool:
    """No name may stand for nothing."""
    del name
    return False


class _Storage(NamedTuple):
    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class TorchTensor:
    """What a pickle says of a tensor."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Unnamed:
    """Stands for an object of a class that is not loaded; keeps what it is built from."""

    def __init__(self, *made: Any) -> None:
        self.made = made

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.__dict__.update({str(name): value for name, value in state.items()})


class _Entries(dict[Any, Any]):
    """Stands for an ordered dictionary; what a module notes beside its entries is left aside."""

    def __setstate__(self, state: Any) -> None:
        del state


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TorchTensor:
    return TorchTensor(storage, offset, tuple(shape), tuple(strides))


def _first(value: Any, *_: Any) -> Any:
    return value


_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): _Entries,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Knows the names in ``_GLOBALS``; others are refused, or stand for nothing."""

    def __init__(self, file: Path, stream: Any, inert: Inert) -> None:
        super().__init__(stream, encoding="utf-8")
        self._file, self._inert = file, inert

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _GLOBALS:
            return _GLOBALS[module, name]
        if self._inert(f"{module}.{name}"):
            return type(name.rpartition(".")[2], (Unnamed,), {})
        raise UserError(
            f"{self._file} asks to load {module}.{name}; weights are tensors only, so this file is "
            "refused: it would run code"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, count = pid
        if dtype not in _STORAGES.values() or type(count) is not int:
            raise UserError(f"{self._file} has a storage of the unknown type {dtype!r}")
        return _Storage(dtype, str(key), count)


def read_torch(
    file: Path, inert: Inert = _nothing, start: int = 0, size: int | None = None
) -> tuple[Any, Callable[[str, TorchTensor], StoredTensor]]:
    """Return what a file holds, with descriptions in place of tensors, and what locates them.

    Args:
        file: of ``torch.save``; or one with such content inside.
        inert: says of a name, such as ``argparse.Namespace``, whether an :class:`Unnamed` may
            stand in its place; everything else is refused.
        start: where the content begins.
        size: of the content; to the end of the file when not given.

    Raises:
        UserError: no such file, a damaged or cut one, an older format, or one that would run code.
    """
    try:
        whole = file.stat().st_size
        if start < 0 or start + (size or 0) > whole:
            raise UserError(f"{file} is cut off: it has {whole} bytes; fetch it again")
        with file.open("rb") as inner:
            stream: Any = _Window(inner, start, whole - start if size is None else size)
            _check_kind(file, stream.read(16))
            with zipfile.ZipFile(stream) as archive:
                content, entries = _content(file, archive, inert)
            places = {
                key.removeprefix("data/"): _place(file, stream, entry)
                for key, entry in entries.items()
                if key.startswith("data/")
            }
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    except (*_DAMAGED, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{file} is cut off or damaged: {error}; fetch it again") from error
    return content, lambda name, tensor: _stored(file, name, tensor, places)


def _content(
    file: Path, archive: zipfile.ZipFile, inert: Inert
) -> tuple[Any, dict[str, zipfile.ZipInfo]]:
    """Return what the pickle of an archive says, and its entries by name."""
    entries = {one.filename.partition("/")[2]: one for one in archive.infolist()}
    if "data.pkl" not in entries:
        raise UserError(f"{file} is a ZIP archive, but none of torch.save: no data.pkl")
    if entries["data.pkl"].file_size > _LARGEST_PICKLE:
        raise UserError(f"{file} has a data.pkl of more than {_LARGEST_PICKLE >> 20} MiB")
    order = entries.get("byteorder")
    # Not to be unpacked before its size is known: a small file can hold any number of zeros.
    if order is not None and (order.file_size > _WORD or archive.read(order) != b"little"):
        raise UserError(
            f"{file} was saved on a big-endian machine; load it with torch and save it again on a "
            "little-endian one"
        )
    with archive.open(entries["data.pkl"]) as stream:
        return _Unpickler(file, stream, inert).load(), entries


def read_pickle(file: Path, inert: Inert) -> Any:
    """Return what a plain pickle says, with descriptions in place of its objects.

    Args:
        file: of ``pickle.dump``.
        inert: as of :func:`read_torch`.

    Raises:
        UserError: as of :func:`read_torch`.
    """
    try:
        with file.open("rb") as stream:
            return _Unpickler(file, stream, inert).load()
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    except _DAMAGED as error:
        raise UserError(f"{file} is cut off or damaged: {error}; fetch it again") from error


class _Window(io.RawIOBase):
    """Part of a file as a file."""

    def __init__(self, inner: BinaryIO, start: int, size: int) -> None:
        super().__init__()
        self._inner, self.start, self.size, self._at = inner, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self._at)
        count = left if count < 0 else min(count, left)
        self._inner.seek(self.start + self._at)
        content = self._inner.read(count)
        self._at += len(content)
        return content


def _check_kind(file: Path, start: bytes) -> None:
    if start.startswith(b"PK"):
        return
    if start.startswith(_LEGACY):
        raise UserError(
            f"{file} is in the format of torch before 1.6; write it again with torch: "
            "torch.save(torch.load(FILE, weights_only=True), NEW)"
        )
    if start.startswith(b"version "):
        raise UserError(f"{file} is a Git LFS pointer; run `git lfs pull` to fetch the weights")
    raise UserError(f"{file} is no file of torch.save: it begins with {start[:4]!r}")


def _place(file: Path, stream: _Window, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Return where in the file the bytes of an entry begin, and how many there are."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{file} is a compressed archive, which torch.save does not write")
    stream.seek(entry.header_offset)
    header = stream.read(_LOCAL)
    if len(header) < _LOCAL or header[:4] != b"PK\x03\x04":
        raise UserError(f"{file} is damaged: {entry.filename} is not where the archive says")
    lengths = [int.from_bytes(header[at : at + 2], "little") for at in (26, 28)]
    start = entry.header_offset + _LOCAL + sum(lengths)
    if start + entry.file_size > stream.size:
        raise UserError(f"{file} is cut off in {entry.filename}; fetch it again")
    return stream.start + start, entry.file_size


def _stored(
    file: Path, name: str, tensor: TorchTensor, places: Mapping[str, tuple[int, int]]
) -> StoredTensor:
    storage, shape = tensor.storage, tensor.shape
    if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in shape):
        raise UserError(f"{file}: {name} is described in a way that is not known")
    if storage.key not in places:
        raise UserError(f"{file} is damaged: it lacks the numbers of {name}; fetch it again")
    start, size = places[storage.key]
    width = native(storage.dtype).itemsize
    count = math.prod(shape)
    wanted = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    strides = [(s, w) for s, w, n in zip(tensor.strides, wanted, shape, strict=True) if n > 1]
    if any(s != w for s, w in strides):
        raise UserError(
            f"{file}: {name} is a view that is not contiguous; save it again with "
            "torch.save({name: tensor.contiguous() …})"
        )
    if type(tensor.offset) is not int or tensor.offset < 0:
        raise UserError(f"{file}: {name} begins at {tensor.offset!r}")
    if (tensor.offset + count) * width > size:
        raise UserError(
            f"{file} is damaged: {name} of shape {list(shape)} does not fit into its storage of "
            f"{size} bytes; fetch it again"
        )
    return StoredTensor(file, name, storage.dtype, shape, start + tensor.offset * width)


def read_state_dict(file: Path, types: Sequence[str] = FLOATS) -> dict[str, StoredTensor]:
    """Return the tensors of a file that holds a dictionary of them, and nothing else.

    Args:
        file: of ``torch.save``.
        types: header names of the types that may occur.

    Raises:
        UserError: as of :func:`read_torch`, or something that is no tensor.
    """
    content, locate = read_torch(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a dictionary of tensors")
    found = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, TorchTensor):
            raise UserError(
                f"{file}: {name!r} is no tensor; save the model's state_dict alone "
                "(torch.save(model.state_dict(), FILE))"
            )
        if tensor.storage.dtype not in types:
            raise UserError(
                f"{file}: tensor {name} has type {tensor.storage.dtype}; supported: "
                f"{', '.join(types)}"
            )
        found[name] = locate(name, tensor)
    return found
