"""Weights of exported programs: Paddle's file of all parameters (``.pdiparams``), read in place.

A parameter is a version (4 bytes), levels of detail (8 bytes, 0 here), another version (4), the
length of a description (4), the description, and the numbers. The description is a protocol buffer:
field 1 is the type, field 2 the dimensions (paddle/fluid/framework/framework.proto,
VarType.TensorDesc). Parameters have no names in it.
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from paddle import Tensor

from common.errors import DataError

# Bytes of a number, by VarType.Type: bool, int16, int32, int64, float16, float32, float64, uint8,
# int8, bfloat16.
_SIZES = {0: 1, 1: 2, 2: 4, 3: 8, 4: 2, 5: 4, 6: 8, 20: 1, 21: 1, 22: 2}
_HEAD = struct.Struct("<IQIi")
_FIRST = 4096  # bytes that are compared before the others: layers have weights of one shape

Bytes = NDArray[np.uint8]


def _varints(data: bytes) -> Iterator[int]:
    """Yield the integers of a protocol buffer in which there is nothing else."""
    value = shift = 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield value
            value = shift = 0


def _described(data: bytes) -> tuple[int, tuple[int, ...]]:
    """Return type and dimensions; these come one by one, or all together behind their length."""
    kind, dims = 0, []
    numbers = _varints(data)
    for tag in numbers:
        field, wire = tag >> 3, tag & 7
        if field == 2 and wire == 2:
            next(numbers)
            dims += list(numbers)
        elif field == 2:
            dims.append(next(numbers))
        else:
            kind = next(numbers)
    return kind, tuple(dims)


def _parameters(data: Bytes, path: Path) -> Iterator[tuple[tuple[int, ...], Bytes]]:
    """Yield the dimensions and the bytes of each parameter."""
    at = 0
    while at < len(data):
        try:
            _, levels, _, length = _HEAD.unpack(data[at : at + _HEAD.size].tobytes())
            begin = at + _HEAD.size + length
            kind, dims = _described(data[at + _HEAD.size : begin].tobytes())
            end = begin + _SIZES[kind] * int(np.prod(dims, dtype=np.int64))
            if levels or end > len(data):
                raise ValueError
        except (struct.error, KeyError, ValueError, StopIteration):
            raise DataError(f"{path}: no whole parameter at byte {at}; export again") from None
        yield dims, data[begin:end]
        at = end


def _equal(one: Bytes, other: Bytes) -> bool:
    if len(one) != len(other) or not np.array_equal(one[:_FIRST], other[:_FIRST]):
        return False
    return np.array_equal(one, other)


def missing_weights(path: Path, weights: Mapping[str, Tensor]) -> list[str]:
    """Return the names of weights that are in no parameter of a file, byte by byte.

    Args:
        path: a ``.pdiparams`` file.
        weights: any number of tensors.

    Raises:
        DataError: the file is no such file, or ends early.
    """
    found: dict[tuple[int, ...], list[Bytes]] = {}
    for dims, numbers in _parameters(np.memmap(path, np.uint8, "r"), path):
        found.setdefault(dims, []).append(numbers)
    missing = []
    for name, weight in weights.items():
        own = np.ascontiguousarray(weight.numpy()).reshape(-1).view(np.uint8)
        same = found.get(tuple(weight.shape), [])
        if not any(_equal(own, other) for other in same):
            missing.append(name)
    return missing
