"""Types of numbers: as headers of files call them, as NumPy and Paddle do, and from one to another.

Files, and arrays of what they hold, have bfloat16 as uint16, as Paddle hands it out; ``ml_dtypes``
computes with it. Nothing here imports paddle.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from common.errors import UserError

Array = NDArray[Any]

_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
FLOATS = tuple(_STORED)
# Of quantized weights.
_STORED |= {"I8": "i1", "U8": "u1", "I32": "<i4", "I64": "<i8"}
TYPES = tuple(_STORED)
# As PaddleNLP's safetensors call bfloat16: NumPy, which writes them, has no such type.
PADDLE_BFLOAT16 = "U16"
_STORED[PADDLE_BFLOAT16] = "<u2"
# Paddle's names.
HEADERS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
NAMES = {header: name for name, header in HEADERS.items()}
# Square whose rows and columns both stay in a core's cache while it is transposed.
_TILE = 128
_BAND = 1 << 19  # numbers; of what is only converted
# From where on numbers round to inf, the largest number below, and types that have room.
_LIMITS = {
    "F16": (65520.0, "65504"),
    "BF16": (2.0**128 - 2.0**119, "3.39e38"),
    "F32": (2.0**128 - 2.0**103, "3.4e38"),
}
ROOMIER = {"F16": "bfloat16", "BF16": "float32"}
_INF = {"F16": 0x7C00, "BF16": 0x7F80}  # bits without sign; those of nan are larger


class _Typed(Protocol):
    @property
    def dtype(self) -> object: ...


def dtype_name(tensor: _Typed) -> str:
    """Return the name of a Paddle tensor's type, such as ``bfloat16``."""
    return str(tensor.dtype).rsplit(".", 1)[-1]


def header_type(tensor: _Typed) -> str:
    """Return a header's name for the type of one of Paddle's floating-point tensors."""
    return HEADERS[dtype_name(tensor)]


def native(dtype: str) -> np.dtype[Any]:
    """Return NumPy's type for a type of a header; uint16 for bfloat16."""
    return np.dtype(_STORED[dtype])


def nbytes(shape: Sequence[int], dtype: str) -> int:
    """Return the size of a tensor; ``dtype`` is the header's name."""
    return math.prod(shape) * native(dtype).itemsize


def all_finite(values: Array, dtype: str = "") -> bool:
    """Return whether no number is nan or inf; a pass over memory, without a second array.

    Args:
        values: numbers, or bfloat16's bits.
        dtype: the header's name of the type where it is ``BF16``; others are seen.
    """
    if dtype == "BF16" or values.dtype == np.float16:
        # NumPy computes with them one number at a time. Of bits as integers +nan and +inf are the
        # largest with a sign, -nan and -inf without.
        infinite = _INF[dtype if dtype == "BF16" else "F16"]
        signed, unsigned = values.view(np.int16), values.view(np.uint16)
        return (
            int(signed.max(initial=0)) < infinite
            and int(unsigned.max(initial=0)) < infinite | 0x8000
        )
    if values.dtype.kind != "f":
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        # Sums of large numbers may overflow where each is finite.
        return bool(np.isfinite(values.sum())) or bool(np.isfinite(values).all())


def beyond(values: Array, target: str) -> str | None:
    """Say which number a type would turn into inf, and what its largest is; None where none.

    Args:
        values: finite numbers, bfloat16 widened.
        target: the header's name of a type.
    """
    if target not in _LIMITS or values.dtype.kind != "f" or not values.size:
        return None
    limit, largest = _LIMITS[target]
    if float(np.finfo(values.dtype).max) < limit:
        return None
    extreme = max(float(values.max()), -float(values.min()))
    if extreme < limit:
        return None
    kind = NAMES[target]
    return f"{extreme:.4g}, which does not fit into {kind}, whose largest number is {largest}"


def to_bfloat16(values: Array) -> Array:
    """Round float32 to the nearest bfloat16, ties to even, still in float32."""
    return values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def widen(values: Array, dtype: str) -> Array:
    """Return bfloat16's bits as float32; other types as they are."""
    return _numbers(values, dtype).astype(np.float32) if dtype == "BF16" else values


def _numbers(values: Array, dtype: str) -> Array:
    """Return what is stored as numbers to compute with."""
    return values.view(ml_dtypes.bfloat16) if dtype == "BF16" else values


def cast(values: Array, source: str, target: str) -> Array:
    """Return numbers in another type, rounded to nearest, ties to even.

    Args:
        values: in ``native(source)``.
        source: the header's name of the type.
        target: likewise.
    """
    if source == target:
        return values
    if source == "F16":
        # NumPy converts halves one by one; there are only 65536 of them to look up.
        return np.take(_halves(target), values.view(np.uint16), mode="clip")
    return _cast(values, source, target)


def _cast(values: Array, source: str, target: str) -> Array:
    kind = ml_dtypes.bfloat16 if target == "BF16" else native(target)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for infinities
        return _numbers(values, source).astype(kind).view(native(target))


@functools.cache
def _halves(target: str) -> Array:
    """Return every half, by its bits, in another type."""
    return _cast(np.arange(1 << 16, dtype=np.uint16).view(native("F16")), "F16", target)


def transfer(target: Array, values: Array, types: tuple[str, str]) -> None:
    """Copy a rectangle into another of any orientation, tile by tile.

    Args:
        target: in the second type; written.
        values: of the same shape, in the first type.
        types: of source and target.

    Raises:
        UserError: a number that the target's type cannot hold.
    """
    rows, cols = values.shape
    along = values.strides[0] >= values.strides[1]
    turned = along != (target.strides[0] >= target.strides[1])
    if not turned and types[0] == types[1]:
        target[...] = values
        return
    # Where nothing is transposed, tiles are bands of whole lines.
    band = max(1, _BAND // (cols if along else rows))
    tall, wide = (_TILE, _TILE) if turned else (band, cols) if along else (rows, band)
    for top in range(0, rows, tall):
        for left in range(0, cols, wide):
            tile = (slice(top, top + tall), slice(left, left + wide))
            target[tile] = _checked(values[tile], *types)


def _checked(values: Array, source: str, target: str) -> Array:
    result = cast(values, source, target)
    if source != target and not all_finite(result, target):
        wide = widen(values, source)
        problem = beyond(wide[np.isfinite(wide)], target)
        if problem is not None:
            cure = f"; use --dtype {ROOMIER[target]}" if target in ROOMIER else ""
            raise UserError(f"a weight is {problem}{cure}")
    return result
