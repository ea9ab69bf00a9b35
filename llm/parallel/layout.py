"""How many processes share what: degrees of parallelism, and the place of each process in them.

Pure arithmetic, without paddle, so that an impossible layout is refused before any process works.
The order of the axes is fleet's: ranks that differ only in their tensor coordinate are neighbours,
because tensor parallelism talks most.
"""

import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise, product
from typing import TypeVar

CONTEXT_KINDS = ("ulysses", "ring")


@dataclass(frozen=True)
class Coordinates:
    """Place of a process along every axis, slowest axis first."""

    data: int = 0
    pipeline: int = 0
    sharding: int = 0
    context: int = 0
    tensor: int = 0


@dataclass(frozen=True)
class Stage:
    """What a pipeline stage holds.

    Args:
        layers: decoder layers, one range for each chunk that the stage runs in turn; more than one
            under interleaving.
        first: it embeds tokens.
        last: it normalises and scores.
    """

    layers: tuple[range, ...]
    first: bool
    last: bool


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism of one job.

    Args:
        tensor: ranks that split every matrix (Shoeybi et al. 2019).
        pipeline: stages of layers (Huang et al. 2019, Narayanan et al. 2021).
        virtual_pipeline: chunks of layers in each stage.
        data: ranks with the same weights and other samples.
        sharding: ranks with other samples that also split the optimizer's state (ZeRO, Rajbhandari
            et al. 2020).
        sharding_stage: 1 splits moments, 2 gradients too, 3 weights too; 0 without sharding.
        context: ranks that split every sequence.
        context_kind: ``ulysses`` exchanges heads (Jacobs et al. 2023), ``ring`` passes keys and
            values around (Liu et al. 2023).
        sequence_parallel: tensor ranks also split the sequence between the matrices (Korthikanti et
            al. 2022).
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    data: int = 1
    sharding: int = 1
    sharding_stage: int = 0
    context: int = 1
    context_kind: str = "ring"
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return self.tensor * self.pipeline * self.data * self.sharding * self.context

    @property
    def data_ranks(self) -> int:
        """Groups of processes that each take other samples."""
        return self.data * self.sharding

    def coordinates(self, rank: int) -> Coordinates:
        """Return the place of a process."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not one of the {self.world_size} of {self}")
        places = []
        for axis in reversed(fields(Coordinates)):
            rank, place = divmod(rank, getattr(self, axis.name))
            places.append(place)
        return Coordinates(*reversed(places))

    def rank_of(self, at: Coordinates) -> int:
        """Return the process at a place."""
        rank = 0
        for axis in fields(Coordinates):
            rank = rank * getattr(self, axis.name) + getattr(at, axis.name)
        return rank

    def groups(self, *axes: str) -> list[list[int]]:
        """Return the sets of ranks that differ along these axes only, in rising order."""
        others = [axis.name for axis in fields(Coordinates) if axis.name not in axes]
        found = []
        for fixed in self._places(others):
            along = [Coordinates(**fixed, **moving) for moving in self._places(list(axes))]
            found.append(sorted(self.rank_of(at) for at in along))
        return found

    def _places(self, axes: list[str]) -> Iterator[dict[str, int]]:
        for places in product(*(range(getattr(self, axis)) for axis in axes)):
            yield dict(zip(axes, places, strict=True))

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """Cut decoder layers into stages whose sizes differ by one at most.

        The later chunks are the smaller ones, since the last also scores the vocabulary. Chunk c of
        stage s is the ``c * pipeline + s``-th piece of the network.
        """
        pieces = self.pipeline * self.virtual_pipeline
        small, larger = divmod(num_layers, pieces)
        bounds = [index * small + min(index, larger) for index in range(pieces + 1)]
        cut = [range(start, stop) for start, stop in pairwise(bounds)]
        return tuple(
            Stage(tuple(cut[stage :: self.pipeline]), stage == 0, stage == self.pipeline - 1)
            for stage in range(self.pipeline)
        )

    def bubble(self, micro_batches: int) -> float:
        """Return the share of a step in which a stage waits (Narayanan et al. 2021, eq. 2)."""
        idle = (self.pipeline - 1) / (self.virtual_pipeline * micro_batches)
        return idle / (1 + idle)

    def describe(self) -> str:
        """Return the degrees above one, such as ``tensor 4 x pipeline 2``."""
        parts = []
        for name in ("tensor", "pipeline", "context", "sharding", "data"):
            degree = getattr(self, name)
            if degree > 1:
                detail = {
                    "tensor": " (sequence parallel)" if self.sequence_parallel else "",
                    "pipeline": f" ({self.virtual_pipeline} chunks each)"
                    if self.virtual_pipeline > 1
                    else "",
                    "context": f" ({self.context_kind})",
                    "sharding": f" (stage {self.sharding_stage})",
                }.get(name, "")
                parts.append(f"{name} {degree}{detail}")
        return " x ".join(parts) or "one process"


Name = TypeVar("Name", str, int)


def largest_first(
    sizes: Mapping[Name, int], bins: int, fixed: Mapping[Name, int] | None = None
) -> dict[Name, int]:
    """Spread things over bins so that each holds about as much (Graham 1969).

    The largest go first, each to the bin that holds least; equal ones in the order of their names,
    equal bins in theirs, so that every process comes to the same result.

    Args:
        sizes: of each thing by name.
        bins: how many there are.
        fixed: bins of things that cannot choose.

    Returns:
        the bin of each thing, 0 … bins - 1.
    """
    load, chosen = [0] * bins, dict(fixed or {})
    least = [(0, number) for number in range(bins)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if name not in chosen:
            while least[0][0] != load[least[0][1]]:  # it got something since that was noted
                heapq.heappop(least)
            chosen[name] = least[0][1]
        number = chosen[name]
        load[number] += sizes[name]
        heapq.heappush(least, (load[number], number))
    return {name: chosen[name] for name in sizes}


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number in rising order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest(wanted: int, fitting: list[int]) -> int:
    """Return the degree nearest to a wanted one by ratio; the smaller of two equally near."""
    return min(fitting, key=lambda degree: (abs(math.log(degree / wanted)), degree))
