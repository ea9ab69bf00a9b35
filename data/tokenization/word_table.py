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


class WordTable:
    """Ids of words, given as ranges of a byte buffer.

    Args:
        encode: ids of some words that are not in the table yet.
    """

    def __init__(self, encode: Callable[[Sequence[bytes]], Encoded]) -> None:
        self._encode = encode
        slots = 1 << SLOTS_LOG2
        # An empty slot has low == 0: words with a NUL byte are never put here.
        self._low = np.zeros(slots, np.uint64)
        self._high = np.zeros(slots, np.uint64)
        self._entry = np.zeros(slots, np.int64)
        self._clear()

    def _clear(self) -> None:
        self._low.fill(0)
        self._long: dict[bytes, int] = {}
        self._offsets = np.zeros(1 << 12, np.int64)
        self._counts = np.zeros(1 << 12, np.int64)
        self._ids = np.zeros(1 << 14, np.int64)
        self._entries = 0
        self._used_ids = 0

    def lookup(self, content: bytes, starts: Ints, stops: Ints) -> tuple[Ints, Ints]:
        """Ids of the words `content[start:stop]`.

        Args:
            content: bytes, followed by at least 16 more that are in no word.
            starts, stops: [W] positions in rising order; no word is empty.

        Returns:
            The ids of all words joined, and the number of ids of each word [W].
        """
        if self._entries > KEY_LIMIT or self._used_ids > ID_LIMIT:
            self._clear()
        buffer = np.frombuffer(content, np.uint8)
        short = stops - starts <= SHORT
        nul = np.flatnonzero(buffer == 0)
        short[np.searchsorted(starts, nul, side="right") - 1] = False
        words = _Words(content, starts, stops, *_lanes(buffer, starts, stops - starts))
        entry = np.full(len(starts), -1, np.int64)
        self._add_short(words, self._find(words, np.flatnonzero(short), entry), entry)
        kept = self._add_long(words, np.flatnonzero(~short), entry)
        result = self._expand(entry)
        self._entries, self._used_ids = kept
        return result

    def _find(self, words: "_Words", which: Ints, entry: Ints) -> Ints:
        """Fill `entry` for the short words `which`; returns those not in the table."""
        missing = []
        slot = _slot(words.low[which], words.high[which])
        while which.size:
            at = self._low[slot]
            found = (at == words.low[which]) & (self._high[slot] == words.high[which])
            entry[which[found]] = self._entry[slot[found]]
            missing.append(which[at == 0])
            further = ~found & (at != 0)
            which, slot = which[further], _next(slot[further])
        return np.concatenate([*missing, np.zeros(0, np.int64)])

    def _add_short(self, words: "_Words", pending: Ints, entry: Ints) -> None:
        """Put missing short words, which may repeat, into the table and fill their `entry`."""
        fresh = []
        number = self._entries
        slot = _slot(words.low[pending], words.high[pending])
        while pending.size:
            empty = np.flatnonzero(self._low[slot] == 0)
            # Where several want one slot, the last of them writes it and so gets it.
            self._entry[slot[empty]] = pending[empty]
            winner = empty[self._entry[slot[empty]] == pending[empty]]
            taken, word = slot[winner], pending[winner]
            self._low[taken], self._high[taken] = words.low[word], words.high[word]
            self._entry[taken] = np.arange(number, number + len(word))
            number += len(word)
            fresh.append(word)
            found = (self._low[slot] == words.low[pending]) & (
                self._high[slot] == words.high[pending]
            )
            entry[pending[found]] = self._entry[slot[found]]
            pending, slot = pending[~found], _next(slot[~found])
        if fresh:
            self._append(words.take(np.concatenate(fresh)))

    def _add_long(self, words: "_Words", which: Ints, entry: Ints) -> tuple[int, int]:
        """Fill `entry` for the words that do not fit into the hash table.

        Returns the numbers of entries and ids to keep: words too long to come again are
        numbered last, for the caller to forget.
        """
        numbers: dict[bytes, int] = {}
        long = words.take(which)
        fresh = {word for word in long if word not in self._long}
        again = [word for word in fresh if len(word) <= LONGEST_KEPT]
        once = [word for word in fresh if len(word) > LONGEST_KEPT]
        self._long.update(zip(again, self._append(again), strict=True))
        kept = self._entries, self._used_ids
        numbers.update(zip(once, self._append(once), strict=True))
        entry[which] = [numbers[word] if word in numbers else self._long[word] for word in long]
        return kept

    def _append(self, words: list[bytes]) -> range:
        """Encode new words and store their ids; returns the words' numbers."""
        first = self._entries
        if not words:
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
class _Words:
    """Ranges of a buffer [W] and their first two 8-byte lanes [W]."""

    content: bytes
    starts: Ints
    stops: Ints
    low: Words
    high: Words

    def take(self, which: Ints) -> list[bytes]:
        content = self.content
        starts, stops = self.starts[which].tolist(), self.stops[which].tolist()
        return [content[start:stop] for start, stop in zip(starts, stops, strict=True)]


def _lanes(buffer: Bytes, starts: Ints, lengths: Ints) -> tuple[Words, Words]:
    """The first 8 and the next 8 bytes of each word as integers, zero beyond its end."""
    view: Words = np.ndarray((max(len(buffer) - 7, 0),), "<u8", buffer=buffer, strides=(1,))
    size = np.minimum(lengths, SHORT)
    low = view[starts] & _MASK[np.minimum(size, 8)]
    high = view[starts + 8] & _MASK[np.maximum(size - 8, 0)]
    return low, high


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
