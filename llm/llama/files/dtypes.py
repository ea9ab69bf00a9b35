"""Floating-point types as they lie in files; bfloat16, which NumPy lacks, as its bits."""

import functools

import numpy as np

from common.errors import UserError

_NATIVE = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Square whose rows and columns both stay in a core's cache while it is transposed.
_TILE = 128
_BAND = 1 << 19  # numbers; of what is only converted


def native(dtype: str) -> np.dtype:
    """Return NumPy's type for a type of safetensors; uint16 for bfloat16."""
    return np.dtype(_NATIVE[dtype])


def widen(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return bfloat16's bits as float32; other types as they are."""
    if dtype != "BF16":
        return values
    wide = values.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def cast(values: np.ndarray, source: str, target: str) -> np.ndarray:
    """Return numbers in another type, rounded to nearest, ties to even.

    Args:
        values: in ``native(source)``.
        source: safetensors' name of the type.
        target: likewise.
    """
    if source == target:
        return values
    if native(source).itemsize == 2:
        # NumPy converts halves one by one; there are only 65536 of them to look up.
        return np.take(_table(source, target), values.view(np.uint16), mode="clip")
    return _rounded(values, target)


@functools.cache
def _table(source: str, target: str) -> np.ndarray:
    """Return every number of a type of two bytes, by its bits, in another type."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(native(source))
    return _rounded(widen(numbers, source), target)


def _rounded(values: np.ndarray, target: str) -> np.ndarray:
    if target != "BF16":
        with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for infinities
            return values.astype(native(target))
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits >> np.uint32(16)) & np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    result = rounded.astype(np.uint16)
    nan = np.isnan(bits.view(np.float32))
    if nan.any():  # rounding up could turn a NaN's bits into an infinity's
        result[nan] = (bits[nan] >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40)
    return result


def transfer(target: np.ndarray, values: np.ndarray, types: tuple[str, str]) -> None:
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


def _checked(values: np.ndarray, source: str, target: str) -> np.ndarray:
    result = cast(values, source, target)
    infinite = np.uint16(0x7C00)
    if target == "F16" and ((result.view(np.uint16) & np.uint16(0x7FFF)) == infinite).any():
        wide = widen(values, source)
        finite = np.abs(wide[np.isinf(result) & np.isfinite(wide)], dtype=np.float64)
        if finite.size:
            raise UserError(
                f"a weight of {finite.max():.4g} does not fit into float16, whose largest number "
                "is 65504; use --dtype bfloat16"
            )
    return result
