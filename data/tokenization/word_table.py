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
COUNT_BITS = 31
COUNT_MASK = (1 << COUNT_BITS) - 1
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
        content = self.buffer[_spans(self.starts, sizes)].tobytes() + b"\xff" * SHORT
        return Ranges(content, stops - sizes, stops)

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
        # An empty slot has a first lane of 0: words with a NUL byte are never put here.
        self._keys = np.zeros((slots, 2), np.uint64)
        # Where a word's ids are: offset in `_ids` and count, as one number.
        self._places = np.zeros(slots, np.int64)
        self._clear()

    def _clear(self) -> None:
        self._keys.fill(0)
        self._long: dict[bytes, int] = {}
        self._ids = np.zeros(1 << 14, np.int64)
        self._short = 0
        self._used_ids = 0

    def lookup(self, words: Ranges) -> tuple[Ints, Ints]:
        """Ids of words [W], which must be in rising order in a buffer, and not empty.

        At least 16 bytes that are in no word must follow them.

        Returns:
            The ids of all words joined, and the number of ids of each word [W].
        """
        if self._short + len(self._long) > KEY_LIMIT or self._used_ids > ID_LIMIT:
            self._clear()
        short = words.stops - words.starts <= SHORT
        nul = np.flatnonzero(words.buffer == 0)
        short[np.searchsorted(words.starts, nul, side="right") - 1] = False
        lanes = _lanes(words)
        places, missing = self._find(lanes, short)
        try:
            self._add_short(words, lanes, missing, places)
            kept = self._add_long(words, np.flatnonzero(~short), places)
        except BaseException:
            # Words may be in the table already, but not their ids.
            self._clear()
            raise
        counts = places & COUNT_MASK
        result = self._ids[_spans(places >> COUNT_BITS, counts)]
        self._used_ids = kept
        return result, counts

    def _find(self, lanes: "_Lanes", short: NDArray[np.bool_]) -> tuple[Ints, Ints]:
        """Places [W] of the words in the table, and which short ones are not there."""
        slot = _slot(lanes.low, lanes.high)
        at = self._keys.take(slot, axis=0)
        found = (at[:, 0] == lanes.low) & (at[:, 1] == lanes.high) & short
        places = self._places.take(slot)
        which = np.flatnonzero(~found & short)
        at, slot, missing = at[which], slot[which], []
        # Few words are left, whose slot is empty or taken by another.
        while which.size:
            empty = at[:, 0] == 0
            missing.append(which[empty])
            which, slot = which[~empty], _next(slot[~empty])
            at = self._keys.take(slot, axis=0)
            found = (at[:, 0] == lanes.low[which]) & (at[:, 1] == lanes.high[which])
            places[which[found]] = self._places[slot[found]]
            which, slot, at = which[~found], slot[~found], at[~found]
        return places, np.concatenate([*missing, np.zeros(0, np.int64)])

    def _add_short(self, words: Ranges, lanes: "_Lanes", missing: Ints, places: Ints) -> None:
        """Put missing short words, which may repeat, into the table and fill their `places`."""
        fresh, slots = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        number = 0
        pending, slot = missing, _slot(lanes.low[missing], lanes.high[missing])
        while pending.size:
            empty = np.flatnonzero(self._keys[slot, 0] == 0)
            # Where several want one slot, the last of them writes it and so gets it.
            self._places[slot[empty]] = pending[empty]
            winner = empty[self._places[slot[empty]] == pending[empty]]
            taken, word = slot[winner], pending[winner]
            self._keys[taken, 0], self._keys[taken, 1] = lanes.low[word], lanes.high[word]
            # For now, the number among the new words.
            self._places[taken] = np.arange(number, number + len(word))
            number += len(word)
            fresh.append(word)
            slots.append(taken)
            at = self._keys.take(slot, axis=0)
            found = (at[:, 0] == lanes.low[pending]) & (at[:, 1] == lanes.high[pending])
            places[pending[found]] = self._places[slot[found]]
            pending, slot = pending[~found], _next(slot[~found])
        new = self._append(words.take(np.concatenate(fresh)))
        self._places[np.concatenate(slots)] = new
        places[missing] = new[places[missing]]
        self._short += number

    def _add_long(self, words: Ranges, which: Ints, places: Ints) -> int:
        """Fill `places` for the words that do not fit into the hash table.

        Returns the number of ids to keep: those of words too long to come again are stored
        last, for the caller to forget.
        """
        long = words.take(which).words()
        fresh = {word for word in long if word not in self._long}
        again = [word for word in fresh if len(word) <= LONGEST_KEPT]
        once = [word for word in fresh if len(word) > LONGEST_KEPT]
        self._long.update(zip(again, self._append(ranges_of(again)).tolist(), strict=True))
        kept = self._used_ids
        passing = dict(zip(once, self._append(ranges_of(once)).tolist(), strict=True))
        places[which] = [passing[word] if word in passing else self._long[word] for word in long]
        return kept

    def _append(self, words: Ranges) -> Ints:
        """Encode new words and store their ids; returns the words' places."""
        if not len(words):
            return np.zeros(0, np.int64)
        new = self._encode(words)
        first, end = self._used_ids, self._used_ids + len(new.ids)
        if end > len(self._ids):
            larger = np.zeros(max(2 * len(self._ids), end), np.int64)
            larger[:first] = self._ids[:first]
            self._ids = larger
        self._ids[first:end] = new.ids
        self._used_ids = end
        return (first + new.offsets) << COUNT_BITS | new.counts


def _spans(starts: Ints, sizes: Ints) -> Ints:
    """start, start + 1, ..., start + size - 1 of each span, one span after the other."""
    ends = np.cumsum(sizes)
    index = np.repeat(starts - (ends - sizes), sizes)
    index += np.arange(len(index))
    return index


@dataclass(frozen=True)
class _Lanes:
    """The first 8 and the next 8 bytes of words [W] as integers, zero beyond a word's end."""

    low: Words
    high: Words


def _lanes(words: Ranges) -> _Lanes:
    count = max(len(words.content) - 7, 0)
    view: Words = np.ndarray((count,), "<u8", buffer=words.content, strides=(1,))
    sizes = words.stops - words.starts
    low = view[words.starts] & _MASK[np.minimum(sizes, 8)]
    high = np.zeros(len(low), np.uint64)
    wide = np.flatnonzero(sizes > 8)
    high[wide] = view[words.starts[wide] + 8] & _MASK[np.minimum(sizes[wide], SHORT) - 8]
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
