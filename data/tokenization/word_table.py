"""A table from words to ids that looks up a whole text's words at once.

Keys of at most 16 bytes, nearly all words, live in an open-addressing hash table of numpy arrays,
which is compared exactly (no word is ever taken for another with the same hash). Longer
keys live in a dict.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

SLOTS_LOG2 = 19
# Half the slots; with the arrays below, about 17 MB in each process.
KEY_LIMIT = 1 << (SLOTS_LOG2 - 1)
ID_LIMIT = 1 << 22
SHORT = 16
# Longer "words" (whole sentences where a language has no spaces) hardly ever come again.
LONGEST_KEPT = 64

_MASK = np.array([(1 << (8 * k)) - 1 for k in range(8)] + [(1 << 64) - 1], np.uint64)
_MIX_LOW = np.uint64(
    0x9E3779B97F4A7C15
)  # odd constants with well-spread bits (2^64 / golden ratio)
_MIX_HIGH = np.uint64(0xC2B2AE3D27D4EB4F)
_SHIFT = np.uint64(64 - SLOTS_LOG2)
_FOLD = np.uint64(29)


@dataclass(frozen=True)
class Encoded:
    """Ids of some words: those of word w are `ids[offsets[w] : offsets[w] + counts[w]]`."""

    ids: Ints
    offsets: Ints
    counts: Ints


@dataclass(frozen=True)
class Ranges:
    """Words as ranges of a buffer: word w is `content[starts[w] : stops[w]]`."""

    content: bytes
    starts: Ints
    stops: Ints

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def buffer(self) -> Bytes:
        """The content as an array."""
        return np.frombuffer(self.content, np.uint8)

    def take(self, which: Ints | NDArray[np.bool_]) -> "Ranges":
        """Some of the words."""
        return Ranges(self.content, self.starts[which], self.stops[which])

    def compact(self) -> "Ranges":
        """The same words one after the other, with nothing between and room behind them."""
        sizes = self.stops - self.starts
        stops = np.cumsum(sizes)
        starts = stops - sizes
        index = np.repeat(self.starts - starts, sizes)
        index += np.arange(len(index))
        content = self.buffer[index].tobytes() + b"\xff" * SHORT
        return Ranges(content, starts, stops)

    def words(self) -> list[bytes]:
        """The words themselves."""
        starts, stops = self.starts.tolist(), self.stops.tolist()
        content = self.content
        return [content[start:stop] for start, stop in zip(starts, stops, strict=True)]


class WordTable:
    """Ids of words, given as ranges of a byte buffer.

    Args:
        encode: ids of some words that are not in the table yet.
    """

    def __init__(self, encode: Callable[[Ranges], Encoded]) -> None:
        self._encode = encode
        slots = 1 << SLOTS_LOG2
        # An empty slot has low == 0: words with a NUL byte are never put here.
        self._keys = np.zeros((slots, 2), np.uint64)
        self._entry = np.zeros(slots, np.int64)
        self._clear()

    def _clear(self) -> None:
        self._keys.fill(0)
        self._long: dict[bytes, int] = {}
        self._offsets = np.zeros(1 << 12, np.int64)
        self._counts = np.zeros(1 << 12, np.int64)
        self._ids = np.zeros(1 << 14, np.int64)
        self._entries = 0
        self._used_ids = 0

    def lookup(self, words: Ranges) -> tuple[Ints, Ints]:
        """Ids of words [W], which must be in rising order in a buffer, and not empty.

        At least 16 bytes that are in no word must follow them.

        Returns:
            The ids of all words joined, and the number of ids of each word [W].
        """
        if self._entries > KEY_LIMIT or self._used_ids > ID_LIMIT:
            self._clear()
        short = words.stops - words.starts <= SHORT
        nul = np.flatnonzero(words.buffer == 0)
        short[np.searchsorted(words.starts, nul, side="right") - 1] = False
        lanes = _lanes(words)
        entry = np.full(len(words), -1, np.int64)
        missing = self._find(lanes, np.flatnonzero(short), entry)
        self._add_short(words, lanes, missing, entry)
        kept = self._add_long(words, np.flatnonzero(~short), entry)
        result = self._expand(entry)
        self._entries, self._used_ids = kept
        return result

    def _find(self, lanes: "_Lanes", which: Ints, entry: Ints) -> Ints:
        """Fill `entry` for the short words `which`; returns those not in the table."""
        missing = []
        low, high = lanes.low[which], lanes.high[which]
        slot = _slot(low, high)
        while which.size:
            at = self._keys.take(slot, axis=0)
            found = (at[:, 0] == low) & (at[:, 1] == high)
            entry[which[found]] = self._entry[slot[found]]
            empty = at[:, 0] == 0
            missing.append(which[empty])
            further = np.flatnonzero(~(found | empty))
            which, low, high = which[further], low[further], high[further]
            slot = _next(slot[further])
        return np.concatenate([*missing, np.zeros(0, np.int64)])

    def _add_short(self, words: Ranges, lanes: "_Lanes", pending: Ints, entry: Ints) -> None:
        """Put missing short words, which may repeat, into the table and fill their `entry`."""
        fresh = []
        number = self._entries
        slot = _slot(lanes.low[pending], lanes.high[pending])
        while pending.size:
            empty = np.flatnonzero(self._keys[slot, 0] == 0)
            # Where several want one slot, the last of them writes it and so gets it.
            self._entry[slot[empty]] = pending[empty]
            winner = empty[self._entry[slot[empty]] == pending[empty]]
            taken, word = slot[winner], pending[winner]
            self._keys[taken, 0], self._keys[taken, 1] = lanes.low[word], lanes.high[word]
            self._entry[taken] = np.arange(number, number + len(word))
            number += len(word)
            fresh.append(word)
            at = self._keys.take(slot, axis=0)
            found = (at[:, 0] == lanes.low[pending]) & (at[:, 1] == lanes.high[pending])
            entry[pending[found]] = self._entry[slot[found]]
            pending, slot = pending[~found], _next(slot[~found])
        if fresh:
            self._append(words.take(np.concatenate(fresh)))

    def _add_long(self, words: Ranges, which: Ints, entry: Ints) -> tuple[int, int]:
        """Fill `entry` for the words that do not fit into the hash table.

        Returns the numbers of entries and ids to keep: words too long to come again are
        numbered last, for the caller to forget.
        """
        numbers: dict[bytes, int] = {}
        long = words.take(which).words()
        fresh = {word for word in long if word not in self._long}
        again = [word for word in fresh if len(word) <= LONGEST_KEPT]
        once = [word for word in fresh if len(word) > LONGEST_KEPT]
        self._long.update(zip(again, self._append(ranges_of(again)), strict=True))
        kept = self._entries, self._used_ids
        numbers.update(zip(once, self._append(ranges_of(once)), strict=True))
        entry[which] = [numbers[word] if word in numbers else self._long[word] for word in long]
        return kept

    def _append(self, words: Ranges) -> range:
        """Encode new words and store their ids; returns the words' numbers."""
        first = self._entries
        if not len(words):
            return range(first, first)
        new = self._encode(words)
        self._offsets = _room(self._offsets, first, len(words))
        self._counts = _room(self._counts, first, len(words))
        self._ids = _room(self._ids, self._used_ids, len(new.ids))
        self._offsets[first : first + len(words)] = self._used_ids + new.offsets
        self._counts[first : first + len(words)] = new.counts
        self._ids[self._used_ids : self._used_ids + len(new.ids)] = new.ids
        self._entries += len(words)
        self._used_ids += len(new.ids)
        return range(first, self._entries)

    def _expand(self, entry: Ints) -> tuple[Ints, Ints]:
        counts = self._counts[entry]
        ends = np.cumsum(counts)
        index = np.repeat(self._offsets[entry] - (ends - counts), counts)
        index += np.arange(len(index))
        return self._ids[index], counts


@dataclass(frozen=True)
class _Lanes:
    """The first 8 and the next 8 bytes of words [W] as integers, zero beyond a word's end."""

    low: Words
    high: Words


def _lanes(words: Ranges) -> _Lanes:
    count = max(len(words.content) - 7, 0)
    view: Words = np.ndarray((count,), "<u8", buffer=words.content, strides=(1,))
    size = np.minimum(words.stops - words.starts, SHORT)
    low = view[words.starts] & _MASK[np.minimum(size, 8)]
    high = view[words.starts + 8] & _MASK[np.maximum(size - 8, 0)]
    return _Lanes(low, high)


def ranges_of(words: Sequence[bytes]) -> Ranges:
    """Words put one after the other into a buffer, with room behind them."""
    sizes = np.fromiter(map(len, words), np.int64, count=len(words))
    stops = np.cumsum(sizes)
    return Ranges(b"".join(words) + b"\xff" * SHORT, stops - sizes, stops)


def _slot(low: Words, high: Words) -> Ints:
    mixed = (low ^ (low >> _FOLD)) * _MIX_LOW ^ (high ^ (high >> _FOLD)) * _MIX_HIGH
    return (mixed >> _SHIFT).astype(np.int64)


def _next(slot: Ints) -> Ints:
    return (slot + 1) & ((1 << SLOTS_LOG2) - 1)


def _room(array: Ints, used: int, more: int) -> Ints:
    """`array`, or a larger copy that has room for `more` values after the first `used`."""
    if used + more <= len(array):
        return array
    larger = np.zeros(max(2 * len(array), used + more), array.dtype)
    larger[:used] = array[:used]
    return larger
