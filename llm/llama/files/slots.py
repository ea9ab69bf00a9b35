"""Tensors of a network as model files have them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from llm.llama.files.safetensors import StoredTensor, nbytes


@dataclass(frozen=True)
class Slot:
    """One tensor of a network as the files have it.

    Args:
        shape: of the complete tensor.
        dtype: type that is written, as the header names it.
        accepts: types that are read.
        fetch: returns the numbers to write.
        fill: takes what was read.
    """

    shape: tuple[int, ...]
    dtype: str
    accepts: tuple[str, ...]
    fetch: Callable[[], np.ndarray]
    fill: Callable[[StoredTensor], None]

    @property
    def nbytes(self) -> int:
        """Size in the files."""
        return nbytes(self.shape, self.dtype)


@runtime_checkable
class StoresItself(Protocol):
    """A layer that says how the files hold it, beside its parameters."""

    def slots(self, name: str) -> dict[str, Slot]:
        """Return its tensors by their names in the files; ``name`` is the layer's."""
