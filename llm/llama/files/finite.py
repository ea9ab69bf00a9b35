"""Weights looked at as they are read: one nan spoils every answer, and nothing would say so."""

from pathlib import Path
from typing import Protocol

import numpy as np

from common.errors import UserError
from llm.llama.files.dtypes import ROOMIER, Array, all_finite, beyond, widen
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
        raise UserError(_said(tensor, int((~np.isfinite(values)).sum())))
    if target is not None and target != tensor.dtype:
        problem = beyond(values, target)
        if problem is not None:
            cure = f"; use {ROOMIER[target]}" if target in ROOMIER else ""
            raise UserError(f"{tensor.file}: {tensor.name} holds {problem}{cure}")
    return values


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
            bad = int((~np.isfinite(widen(np.asarray(values), array.dtype))).sum())
            raise UserError(_said(array, bad))


def _said(tensor: _Readable, bad: int) -> str:
    return (
        f"{tensor.file}: {tensor.name} holds {bad} numbers that are nan or inf, with which no "
        "answer can be computed; fetch or make it again"
    )
