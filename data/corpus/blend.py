"""Several datasets as one: in which order samples of each come, and what a longer run adds."""

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.errors import check_integer

__all__ = ["Blend", "Extended", "Later", "Mixture"]

BLOCK = 1024  # samples between two places at which the counts so far are kept


class Samples(Protocol):
    """A map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, NDArray[Any]]: ...


class Mixture:
    """Which source each sample of a blend is from: after any n samples, source i has given
    either the floor or the ceiling of n times its share.

    That is Baruah, Cohen, Plaxton and Varvel's proportionate progress (1996) on one processor,
    whose schedule is: of the sources that may give a sample without running ahead, the one that
    has to give its next one first; of equal ones the first. It depends on nothing but the shares,
    so a longer mixture begins with a shorter one, and computes in integers, so it is the same on
    every machine. (Megatron's rule, the largest error first, strays up to 1.6 samples.)

    Args:
        weights: of each source, in lowest terms; only their ratios count.
        length: samples.
    """

    def __init__(self, weights: Sequence[int], length: int) -> None:
        for number, weight in enumerate(weights):
            check_integer(f"weight {number}", weight, least=1)
        check_integer("length", length, least=0)
        common = math.gcd(*weights)
        self.weights = tuple(weight // common for weight in weights)
        self.length = length
        total = sum(self.weights)
        # When every source has given its weight in samples, all begins again.
        self._round = total if total < length else max(length, 1)
        self._sources = _schedule(self.weights, self._round)
        kept, sources = -(-self._round // BLOCK), len(weights)
        cells = np.arange(self._round) // BLOCK * sources + self._sources
        counts = np.bincount(cells, minlength=kept * sources).reshape(kept, sources)
        self._before = np.concatenate([np.zeros((1, sources), np.int64), counts.cumsum(axis=0)])

    def __len__(self) -> int:
        return self.length

    def counts(self, stop: int) -> list[int]:
        """Return how many of the first `stop` samples are from each source."""
        rounds, rest = divmod(stop, self._round)
        last = self._sources[rest - rest % BLOCK : rest]
        inside = self._before[rest // BLOCK] + np.bincount(last, minlength=len(self.weights))
        whole = self._before[-1]
        return [rounds * int(all_) + int(some) for all_, some in zip(whole, inside, strict=True)]

    def place(self, item: int) -> tuple[int, int]:
        """Return the source of a sample, and which of that source's samples it is."""
        rounds, rest = divmod(item, self._round)
        source = int(self._sources[rest])
        last = np.count_nonzero(self._sources[rest - rest % BLOCK : rest] == source)
        before = int(self._before[rest // BLOCK, source]) + int(last)
        return source, rounds * int(self._before[-1, source]) + before


def _schedule(weights: Sequence[int], length: int) -> NDArray[np.uint16]:
    """The sources of the first samples, uint16 [length]."""
    total = sum(weights)
    out = np.empty(length, np.uint16)
    given = [0] * len(weights)
    # The next sample of source i may come as sample given * total // weight + 1, counted from 1,
    # and has to be there by its deadline, the ceiling of (given + 1) * total / weight.
    ready = [(-(-total // weight), source) for source, weight in enumerate(weights)]
    heapq.heapify(ready)
    waiting: list[tuple[int, int]] = []
    for at in range(1, length + 1):
        while waiting and waiting[0][0] <= at:
            source = heapq.heappop(waiting)[1]
            deadline = -(-(given[source] + 1) * total // weights[source])
            heapq.heappush(ready, (deadline, source))
        source = heapq.heappop(ready)[1]
        out[at - 1] = source
        given[source] += 1
        heapq.heappush(waiting, (given[source] * total // weights[source] + 1, source))
    return out


class Blend:
    """Samples of several datasets, each in its own order, in the order of a mixture.

    Args:
        parts: a dataset for each source; None for one of which the mixture takes nothing.
        mixture: whose sample comes when.
    """

    def __init__(self, parts: Sequence[Samples | None], mixture: Mixture) -> None:
        for part, needed in zip(parts, mixture.counts(len(mixture)), strict=True):
            assert (0 if part is None else len(part)) >= needed
        self.parts = parts
        self.mixture = mixture

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, item: int) -> Mapping[str, NDArray[Any]]:
        if not 0 <= item < len(self):
            raise IndexError(f"sample {item} of {len(self)}")
        source, index = self.mixture.place(item)
        part = self.parts[source]
        assert part is not None
        return part[index]


class Extended:
    """The samples of a run that was given more of them than it was laid out for, in parts.

    Laying out more passes shuffles all of them in another way, so what a run has begun stays, and
    what it gets beyond that comes after, in an order of its own.

    Args:
        parts: datasets, in turn.
        counts: how many samples of each are taken.
    """

    def __init__(self, parts: Sequence[Samples], counts: Sequence[int]) -> None:
        self.parts = parts
        self._ends = np.cumsum(counts).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, item: int) -> Mapping[str, NDArray[Any]]:
        if not 0 <= item < len(self):
            raise IndexError(f"sample {item} of {len(self)}")
        number = int(np.searchsorted(self._ends, item, side="right"))
        return self.parts[number][item - (self._ends[number - 1] if number else 0)]


class Later:
    """Samples of a run that took its earlier ones from other data, which may be gone.

    Args:
        dataset: its samples from `first` on.
        first: samples that came before.
    """

    def __init__(self, dataset: Samples, first: int) -> None:
        self.dataset = dataset
        self.first = first

    def __len__(self) -> int:
        return self.first + len(self.dataset)

    def __getitem__(self, item: int) -> Mapping[str, NDArray[Any]]:
        if not self.first <= item < len(self):
            raise IndexError(f"sample {item} is not one of {self.first} to {len(self) - 1}")
        return self.dataset[item - self.first]
