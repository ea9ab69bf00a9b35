"""Encoding in bulk: many texts to one array of ids."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

Ints = NDArray[np.int64]
# Ids of texts, of which some are bare, on a number of threads.
BatchEncode = Callable[[Sequence[str], Sequence[bool], int], list[list[int]]]


class PackedEncoder(ABC):
    """Texts to ids in one array of an integer type."""

    dtype: np.dtype[Any]

    @abstractmethod
    def encode(
        self, texts: Sequence[str], bare: Sequence[bool] | None = None
    ) -> tuple[NDArray[Any], Ints]:
        """Ids of all the texts joined, and the number of ids of each text.

        The texts must be valid Unicode (`check_text`); before those that are `bare` no space is
        put, since they go on from others.

        Raises:
            DataError: an id does not fit into `dtype`; the library cannot encode a text.
        """


class PlainEncoder(PackedEncoder):
    """The library's own batch call, on one thread.

    Args:
        encode_batch: ids of texts.
        dtype: of the ids.
    """

    def __init__(
        self,
        encode_batch: BatchEncode,
        dtype: np.dtype[Any],
    ) -> None:
        self.dtype = dtype
        self._encode_batch = encode_batch

    def encode(
        self, texts: Sequence[str], bare: Sequence[bool] | None = None
    ) -> tuple[NDArray[Any], Ints]:
        rows = self._encode_batch(texts, bare or [False] * len(texts), 1)
        sizes = np.fromiter(map(len, rows), np.int64, count=len(rows))
        ids = np.fromiter(chain.from_iterable(rows), np.int64, count=int(sizes.sum()))
        return narrow(ids, self.dtype), sizes


def packed_rows(ids: NDArray[Any], sizes: Ints) -> list[list[int]]:
    """The ids of each text, of ids laid end to end and the number of each."""
    bounds = [0, *np.cumsum(sizes).tolist()]
    flat: list[int] = ids.tolist()
    return [flat[start:stop] for start, stop in pairwise(bounds)]


def narrow(ids: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """`ids` as `dtype`; `DataError` if one does not fit."""
    limit = int(np.iinfo(dtype).max)
    if ids.size and (int(ids.max()) > limit or int(ids.min()) < 0):
        raise DataError(
            f"token ids from {ids.min()} to {ids.max()} do not fit into {dtype}, which holds "
            f"0 to {limit}: choose a wider type"
        )
    return ids.astype(dtype)
