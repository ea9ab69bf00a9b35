"""Rounding to the types that kernels store numbers in, in NumPy."""

import numpy as np


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return float32 numbers that the type can hold: the nearest, ties to even."""
    x = np.ascontiguousarray(x, np.float32)
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        return from_storage(to_storage(x, dtype), dtype)
    return x


def to_storage(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return the numbers as they lie in memory; bfloat16 is uint16 here."""
    x = np.ascontiguousarray(x, np.float32)
    if dtype == "bfloat16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return x.astype(dtype)


def from_storage(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return stored numbers as float32."""
    if dtype == "bfloat16":
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32)


class NumpyArrays:
    """Arrays of the emulated kernels.

    Each lies between two guards, which :meth:`check` compares: a write outside is seen. Outputs
    start as NaN: so is one that is not written.
    """

    GUARD = 256

    def __init__(self) -> None:
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []

    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Return an array of NaN."""
        storage = np.dtype("uint16" if dtype == "bfloat16" else dtype)
        size = int(np.prod(shape)) * storage.itemsize
        whole = np.full(size + 2 * self.GUARD + 16, 0xFF, np.uint8)
        start = self.GUARD + -(whole.ctypes.data + self.GUARD) % 16
        inner = whole[start : start + size]
        self._kept.append((whole, inner))
        return inner.view(storage).reshape(shape)

    def check(self) -> None:
        """Compare the guards of all arrays made since the last check, and forget them."""
        for whole, inner in self._kept:
            start = inner.ctypes.data - whole.ctypes.data
            assert (whole[:start] == 0xFF).all(), "a write before an array"
            assert (whole[start + inner.size :] == 0xFF).all(), "a write after an array"
        self._kept.clear()

    def put(self, x: np.ndarray, dtype: str) -> np.ndarray:
        """Return a guarded copy of float32 numbers."""
        out = self.empty(x.shape, dtype)
        out[...] = to_storage(x, dtype)
        return out

    def get(self, x: np.ndarray, dtype: str) -> np.ndarray:
        """Return the numbers of an array in float64."""
        return from_storage(x, dtype).astype(np.float64)

    def integers(self, x: np.ndarray) -> np.ndarray:
        """Return integers unchanged, where a kernel can read them."""
        out = self.empty(x.shape, str(x.dtype))
        out[...] = x
        return out

    @staticmethod
    def pointer(array: np.ndarray | None) -> int | None:
        """Return the address."""
        return None if array is None else array.ctypes.data

    @staticmethod
    def stream() -> None:
        """Return None: there is none."""
