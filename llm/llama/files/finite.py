"""Weights looked at as they are read: one nan spoils every answer, and nothing would say so."""

from pathlib import Path
from typing import Protocol

import numpy as np

from common.errors import UserError
from llm.llama.files.dtypes import Array, all_finite

_FLOAT16_INF = 65520  # what rounds to it from here on


class _Readable(Protocol):
    """A tensor in files, stored whole or in pieces."""

    @property
    def file(self) -> Path: ...
    @property
    def name(self) -> str: ...
    def read(self, part: tuple[slice, ...] = ()) -> Array: ...


def read_finite(
    tensor: _Readable, part: tuple[slice, ...] = (), target: str | None = None
) -> Array:
    """Read a tensor, or part of it, and refuse numbers that are none.

    Args:
        tensor: in a file.
        part: as its ``read`` takes it.
        target: the header's name of the type that it is going to have; float16 holds less than
            others.

    Raises:
        UserError: nan or inf, by file and name.
    """
    values = tensor.read(part)
    if not all_finite(values):
        bad = int((~np.isfinite(values)).sum())
        raise UserError(
            f"{tensor.file}: {tensor.name} holds {bad} numbers that are nan or inf, with which no "
            "answer can be computed; fetch or make it again"
        )
    if target == "F16" and values.dtype.kind == "f" and values.dtype.itemsize > 2:
        largest = float(np.abs(values).max(initial=0))
        if largest >= _FLOAT16_INF:
            raise UserError(
                f"{tensor.file}: {tensor.name} holds {largest:g}, which is inf in float16 (up to "
                "65504); use bfloat16 or float32"
            )
    return values
