"""Weights looked at as they are read or made: one nan spoils every answer, and nobody says so."""

from pathlib import Path
from typing import Protocol

import numpy as np

from common.errors import UserError
from llm.llama.files.dtypes import (
    ROOMIER,
    Array,
    all_finite,
    beyond,
    cast,
    native,
    transfer,
    widen,
)
from llm.llama.files.safetensors import StoredTensor

_SLAB = 1 << 23  # numbers that are looked at together


class _Readable(Protocol):
    """A tensor in files, stored whole or in pieces."""

    @property
    def file(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    def read(self, part: tuple[slice, ...] = ()) -> Array: ...
    def bits(self, part: tuple[slice, ...] = ()) -> Array: ...


def read_finite(
    tensor: _Readable, part: tuple[slice, ...] = (), target: str | None = None
) -> Array:
    """Read a tensor, or part of it, and refuse numbers that are none.

    Args:
        tensor: in a file.
        part: as its ``read`` takes it.
        target: the header's name of the type that it is going to have, which may hold less.

    Raises:
        UserError: nan, inf, or a number that would become inf, by file and name.
    """
    values = tensor.read(part)
    if not all_finite(values):
        raise UserError(_said(tensor, _count_bad(values)))
    if target is not None and target != tensor.dtype:
        problem = beyond(values, target)
        if problem is not None:
            cure = f"; use {ROOMIER[target]}" if target in ROOMIER else ""
            raise UserError(f"{tensor.file}: {tensor.name} holds {problem}{cure}")
    return values


def read_as(tensor: _Readable, target: str, part: tuple[slice, ...], *, transposed: bool) -> Array:
    """Read a tensor of floating-point numbers, or part of it, in a type and an orientation.

    Args:
        tensor: in a file.
        target: the header's name of the type.
        part: as its ``read`` takes it.
        transposed: of a matrix, return the transpose.

    Returns:
        C-ordered numbers in ``native(target)``.

    Raises:
        UserError: as of :func:`read_finite`.
    """
    source = tensor.dtype
    # Where nothing can become inf, the bits are looked at: they are fewer bytes.
    if source == target or (target == "F32" and source in ("BF16", "F16")):
        values = tensor.bits(part)
        if not all_finite(values, source):
            raise UserError(_said(tensor, _count_bad(values, source)))
    else:
        values = read_finite(tensor, part, target)
        source = "F32" if source == "BF16" else source
    values = values.T if transposed else values
    if values.ndim != 2:
        return np.ascontiguousarray(cast(values, source, target))
    out = np.empty(values.shape, native(target))
    transfer(out, values, (source, target))
    return out


def unfit(values: Array, dtype: str, target: str | None = None) -> str | None:
    """Say what is wrong with computed numbers; None where nothing is.

    Args:
        values: numbers, or bfloat16's bits.
        dtype: the header's name of their type.
        target: of the type that they are going to have; None leaves them as they are.
    """
    if not all_finite(values, dtype):
        return f"{_count_bad(values, dtype)} numbers that are nan or inf"
    if target is None or target == dtype:
        return None
    return beyond(widen(values, dtype), target)


def check_stored(array: StoredTensor, values: Array) -> None:
    """Refuse an array with nan or inf, before it is copied.

    Args:
        array: in a file.
        values: its numbers as stored, two-dimensional; may be mapped.

    Raises:
        UserError: nan or inf, by file and name.
    """
    step = max(1, _SLAB // max(1, values.shape[1]))
    for start in range(0, len(values), step):
        if not all_finite(values[start : start + step], array.dtype):
            raise UserError(_said(array, _count_bad(np.asarray(values), array.dtype)))


def _count_bad(values: Array, dtype: str = "") -> int:
    return int((~np.isfinite(widen(values, dtype))).sum())


def _said(tensor: _Readable, bad: int) -> str:
    return (
        f"{tensor.file}: {tensor.name} holds {bad} numbers that are nan or inf, with which no "
        "answer can be computed; fetch or make it again"
    )
