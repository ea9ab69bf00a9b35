"""Files that ``torch.load`` opens, laid out around bytes that others fill in.

The archive is what ``torch.save`` writes (PyTorch's ``caffe2/serialize/inline_container.cc``): ZIP
entries without compression, each storage at a multiple of 64 bytes, ZIP64 where sizes ask for it.
"""

import pickle
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.llama.files.dtypes import nbytes
from llm.llama.files.target import FilePlan, Seal

_ROOT = "archive"
_ALIGNMENT = 64
_STORAGES = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"}
_WIDE = 0xFFFFFFFF  # stands in for a size or a place that ZIP64's field holds
_PADDING = b"FB"
_VERSION, _VERSION_64 = 20, 45


@dataclass
class _Entry:
    name: bytes
    size: int
    content: bytes | None  # None: filled in later
    start: int = 0  # of its header
    data: int = 0

    @property
    def code(self) -> int:
        return 0 if self.content is None else zlib.crc32(self.content)


def plan_torch(
    path: Path,
    arrays: Mapping[str, tuple[tuple[int, ...], str]],
    settings: Mapping[str, Any] | None = None,
) -> tuple[FilePlan, dict[str, int]]:
    """Lay out a dictionary of tensors.

    Args:
        path: where the file is going to be.
        arrays: shape and type (F32, F16, BF16) of each tensor by name, in the file's order.
        settings: plain values that Megatron's files have as ``args``, an ``argparse.Namespace``;
            the tensors are then a dictionary in the entry ``model``.

    Returns:
        The file, and the offset of each tensor's bytes.
    """
    entries = [_Entry(_named("data.pkl"), 0, _pickled(arrays, settings))]
    entries.append(_Entry(_named("byteorder"), 0, b"little"))
    for key, (shape, dtype) in enumerate(arrays.values()):
        entries.append(_Entry(_named(f"data/{key}"), nbytes(shape, dtype), None))
    entries.append(_Entry(_named("version"), 0, b"3\n"))
    around, position = [], 0
    for entry in entries:
        if entry.content is not None:
            entry.size = len(entry.content)
        header = _local(entry, position)
        entry.start, entry.data = position, position + len(header)
        around.append((position, header + (entry.content or b"")))
        position = entry.data + entry.size
    seals, directory = [], b""
    for entry in entries:
        record = _central(entry)
        if entry.content is None:
            places = (entry.start + 14, position + len(directory) + 16)
            seals.append(Seal(entry.data, entry.size, places))
        directory += record
    end = directory + _end(len(entries), len(directory), position)
    around.append((position, end))
    plan = FilePlan(path, position + len(end), tuple(around), tuple(seals))
    storages = [entry.data for entry in entries if entry.content is None]
    return plan, dict(zip(arrays, storages, strict=True))


def _named(name: str) -> bytes:
    return f"{_ROOT}/{name}".encode()


def _local(entry: _Entry, position: int) -> bytes:
    """Return the header before an entry, with as much padding as brings it to the alignment."""
    wide = entry.size >= _WIDE
    extra = struct.pack("<HHQQ", 1, 16, entry.size, entry.size) if wide else b""
    before = position + 30 + len(entry.name) + len(extra) + 4
    padding = -before % _ALIGNMENT
    extra += _PADDING + struct.pack("<H", padding) + b"Z" * padding
    size = _WIDE if wide else entry.size
    version = _VERSION_64 if wide else _VERSION
    fixed = (version, 0, 0, 0, 0x21, entry.code, size, size, len(entry.name), len(extra))
    return b"PK\x03\x04" + struct.pack("<HHHHHIIIHH", *fixed) + entry.name + extra


def _central(entry: _Entry) -> bytes:
    """Return an entry's record in the archive's directory."""
    wide = [value for value in (entry.size, entry.size, entry.start) if value >= _WIDE]
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size, start = min(entry.size, _WIDE), min(entry.start, _WIDE)
    version = _VERSION_64 if wide else _VERSION
    fixed = (version, version, 0, 0, 0, 0x21, entry.code, size, size, len(entry.name), len(extra))
    return (
        b"PK\x01\x02"
        + struct.pack("<HHHHHHIIIHHHHHII", *fixed, 0, 0, 0, 0, start)
        + entry.name
        + extra
    )


def _end(count: int, size: int, start: int) -> bytes:
    """Return what closes the archive, in both of ZIP's forms."""
    fixed = (44, _VERSION_64, _VERSION_64, 0, 0, count, count, size, start)
    wide = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", *fixed)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, start + size, 1)
    narrow = (0, 0, min(count, 0xFFFF), min(count, 0xFFFF), min(size, _WIDE), min(start, _WIDE), 0)
    return wide + locator + b"PK\x05\x06" + struct.pack("<HHHHIIH", *narrow)


def _fragment(value: Any) -> bytes:
    """Return the opcodes of a small value, without the header and the stop of a pickle."""
    return pickle.dumps(value, protocol=2)[2:-1]


def _pickled(
    arrays: Mapping[str, tuple[tuple[int, ...], str]], settings: Mapping[str, Any] | None
) -> bytes:
    """Return the pickle of a file."""
    before, after = pickle.PROTO + b"\2", pickle.STOP
    if settings is not None:
        before += pickle.EMPTY_DICT + pickle.MARK
        before += _fragment("args") + b"cargparse\nNamespace\n" + pickle.EMPTY_TUPLE
        before += pickle.REDUCE + _fragment(dict(settings)) + pickle.BUILD
        before += _fragment("checkpoint_version") + _fragment(3.0)
        before += _fragment("iteration") + _fragment(0) + _fragment("model")
        after = pickle.SETITEMS + after
    return before + _tensors(arrays) + after


def _tensors(arrays: Mapping[str, tuple[tuple[int, ...], str]]) -> bytes:
    """Return the opcodes of a dictionary of tensors, each with a storage of its own."""
    made = pickle.EMPTY_DICT + pickle.MARK
    for key, (name, (shape, dtype)) in enumerate(arrays.items()):
        count = nbytes(shape, "I8")
        strides, step = [], 1
        for side in reversed(shape):
            strides.append(step)
            step *= side
        made += _fragment(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + pickle.MARK
        made += pickle.MARK + _fragment("storage") + f"ctorch\n{_STORAGES[dtype]}\n".encode()
        made += _fragment(str(key)) + _fragment("cpu") + _fragment(count)
        made += pickle.TUPLE + pickle.BINPERSID
        made += _fragment(0) + _fragment(shape) + _fragment(tuple(reversed(strides)))
        made += _fragment(False) + b"ccollections\nOrderedDict\n"
        made += pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.TUPLE + pickle.REDUCE
    return made + pickle.SETITEMS
