"""Encoding in bulk: many texts to one array of ids, much faster than one call a text.

Both kinds of Llama tokenizer encode a text in parts that do not influence each other, so equal
parts need to be encoded only once. The texts are cut where that is proved (`CutRule`), each part
is looked up in a table of words, and only parts that are new go to the library. Everything is
done for all the words at once in numpy, because a Python step per word costs as much as
the library's encoding of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from data.tokenization.word_table import SHORT, Bytes, Encoded, Ints, Ranges, WordTable, ranges_of

SEPARATOR = 0xFF  # a byte that UTF-8 never uses
NEWLINE = ord("\n")
SPACE = ord(" ")


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

    def warm_up(self) -> None:
        """Do once what makes encoding of much text faster; the results stay the same."""
        return


class PlainEncoder(PackedEncoder):
    """The library's own batch call, on one thread.

    Args:
        encode_batch: ids of texts, of which some are bare, on a number of threads.
        dtype: of the ids.
    """

    def __init__(
        self,
        encode_batch: Callable[[Sequence[str], Sequence[bool], int], list[list[int]]],
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


@dataclass(frozen=True)
class SpaceRuns:
    """Runs of spaces in a buffer: first and last position, and the bytes around each run."""

    first: Ints
    last: Ints
    before: Bytes
    after: Bytes


class CutRule(ABC):
    """Where texts may be cut, and how a part between two cuts is encoded.

    The ids of a text must be the ids of its parts one after the other.
    """

    prefix: bytes  # what stands before each text that is neither empty nor bare
    pairs: NDArray[np.bool_]  # [65536] 256 * a + b: whether to cut between bytes a and b, always

    @abstractmethod
    def mark(self, buffer: Bytes, runs: SpaceRuns, cuts: NDArray[np.bool_]) -> None:
        """Set or clear `cuts[p]`, which says that a part begins at byte p.

        `pairs` has been applied already; this is for what takes more than two bytes to tell.
        Texts are separated by `SEPARATOR`; cuts around it are made by the caller.
        """

    @abstractmethod
    def encode(self, parts: Ranges) -> Encoded:
        """Ids of each part, in the place where it stood."""

    def encode_whole(self, text: str) -> list[int] | None:
        """Ids of a text that is not to be cut by this rule; None for all others."""
        del text
        return None

    @abstractmethod
    def frequent(self) -> list[bytes]:
        """Parts that are likely to come in any text, all different."""


class WordEncoder(PackedEncoder):
    """`PackedEncoder` by a table of words; exact as far as its rule is."""

    def __init__(self, rule: CutRule, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._rule = rule
        self._table = WordTable(self._encode_parts)

    def _encode_parts(self, parts: Ranges) -> Encoded:
        # Separators are parts too, of no ids.
        real = parts.buffer[parts.starts] != SEPARATOR
        encoded = self._rule.encode(parts.take(real))
        offsets, counts = np.zeros(len(parts), np.int64), np.zeros(len(parts), np.int64)
        offsets[real], counts[real] = encoded.offsets, encoded.counts
        return Encoded(encoded.ids, offsets, counts)

    def warm_up(self) -> None:
        self._table.lookup(ranges_of(self._rule.frequent()))

    def encode(
        self, texts: Sequence[str], bare: Sequence[bool] | None = None
    ) -> tuple[NDArray[Any], Ints]:
        bare = bare or [False] * len(texts)
        whole = [self._rule.encode_whole(text) for text in texts]
        if all(ids is None for ids in whole):
            return self._encode(texts, bare)
        rows = [
            self._encode([text], [inside])[0] if ids is None else narrow(np.array(ids), self.dtype)
            for text, inside, ids in zip(texts, bare, whole, strict=True)
        ]
        return np.concatenate(rows), np.fromiter(map(len, rows), np.int64, count=len(rows))

    def _encode(self, texts: Sequence[str], bare: Sequence[bool]) -> tuple[NDArray[Any], Ints]:
        if not texts:
            return np.zeros(0, self.dtype), np.zeros(0, np.int64)
        separator, prefix = bytes([SEPARATOR]), self._rule.prefix
        framed = (
            separator + (b"" if inside or not text else prefix) + text.encode()
            for text, inside in zip(texts, bare, strict=True)
        )
        content = b"".join(chain(framed, [separator * (1 + SHORT)]))
        buffer = np.frombuffer(content, np.uint8)[:-SHORT]
        separators = np.flatnonzero(buffer == SEPARATOR)
        starts = self._cut(buffer, separators)
        stops = np.append(starts[1:], len(buffer))
        ids, counts = self._table.lookup(Ranges(content, starts, stops))
        before = np.append(0, np.cumsum(counts))
        sizes = np.diff(before[np.searchsorted(starts, separators)])
        return narrow(ids, self.dtype), sizes

    def _cut(self, buffer: Bytes, separators: Ints) -> Ints:
        """Where parts begin."""
        pairs = buffer[:-1].astype(np.uint16)
        pairs <<= 8
        pairs |= buffer[1:]
        cuts = np.zeros(len(buffer), bool)
        np.take(self._rule.pairs, pairs, out=cuts[1:])
        self._rule.mark(buffer, find_runs(buffer), cuts)
        cuts[separators] = True
        cuts[separators[:-1] + 1] = True
        return np.flatnonzero(cuts)


def find_runs(buffer: Bytes) -> SpaceRuns:
    """Runs of spaces; the buffer begins and ends with a separator."""
    spaces = np.flatnonzero(buffer == SPACE)
    breaks = np.flatnonzero(np.diff(spaces) != 1)
    first = spaces[np.concatenate([[0], breaks + 1])] if spaces.size else spaces
    last = spaces[np.append(breaks, len(spaces) - 1)] if spaces.size else spaces
    return SpaceRuns(first, last, buffer[first - 1], buffer[last + 1])


def packed_rows(ids: NDArray[Any], sizes: NDArray[np.int64]) -> list[list[int]]:
    """The ids of each text, of ids laid end to end and the number of each."""
    bounds = [0, *np.cumsum(sizes).tolist()]
    flat: list[int] = ids.tolist()
    return [flat[start:stop] for start, stop in pairwise(bounds)]


def narrow(ids: Ints, dtype: np.dtype[Any]) -> NDArray[Any]:
    """`ids` as `dtype`; `DataError` if one does not fit."""
    limit = int(np.iinfo(dtype).max)
    if ids.size and (int(ids.max()) > limit or int(ids.min()) < 0):
        raise DataError(
            f"token ids from {ids.min()} to {ids.max()} do not fit into {dtype}, which holds "
            f"0 to {limit}: choose a wider type"
        )
    return ids.astype(dtype)
