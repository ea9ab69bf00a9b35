"""Complete tensors from the pieces that ranks hold, and pieces of complete tensors.

Files hold complete tensors whatever the layout, so that any layout reads what another wrote. Which
process writes what follows from names, sizes and layout alone: no process has to ask another.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llm.parallel.layout import Layout, largest_first
from llm.parallel.topology import Topology


def stage_ranks(layout: Layout, stage: int) -> list[int]:
    """Return the processes that hold a pipeline stage, in rising order."""
    ranks = range(layout.world_size)
    return [rank for rank in ranks if layout.coordinates(rank).pipeline == stage]


def assign(sizes: Mapping[str, int], ranks: Sequence[int]) -> dict[str, int]:
    """Spread tensors over processes so that each writes about the same number of bytes.

    Args:
        sizes: bytes of each tensor by name.
        ranks: those who may write, in an order that all of them share.

    Returns:
        the writer of each tensor, the same in every process.
    """
    return {name: ranks[place] for name, place in largest_first(sizes, len(ranks)).items()}


def split_axis(parameter: Any) -> int | None:
    """Return the axis along which tensor ranks split a parameter; None where each holds all."""
    return getattr(parameter, "split_axis", None)


def share(shape: Sequence[int], axis: int | None, topology: Topology) -> tuple[slice, ...]:
    """Return which part of a complete tensor is this process's.

    Args:
        shape: of the complete tensor.
        axis: along which tensor ranks split it; None where each holds all of it.
        topology: this process.
    """
    degree = topology.layout.tensor
    if axis is None or degree == 1:
        return ()
    assert shape[axis] % degree == 0, (shape, axis, degree)
    size = shape[axis] // degree
    start = topology.at.tensor * size
    return (slice(None),) * axis + (slice(start, start + size),)


def whole_shape(shape: Sequence[int], axis: int | None, topology: Topology) -> tuple[int, ...]:
    """Return the complete shape of a tensor of which this process holds a piece."""
    factors = [topology.layout.tensor if index == axis else 1 for index in range(len(shape))]
    return tuple(size * factor for size, factor in zip(shape, factors, strict=True))


@dataclass(frozen=True)
class Gatherer:
    """Brings complete tensors together in the processes that write them.

    Args:
        topology: this process.
        full: yields a parameter's tensor-parallel piece where sharding has taken that apart too;
            entered by every process for every parameter.
    """

    topology: Topology
    full: Callable[[Any], AbstractContextManager[Any]] = nullcontext

    def parameter(self, parameter: Any, writer: int) -> np.ndarray | None:
        """Return a complete parameter to its writer, None to the others.

        All processes of the writer's stage call this for the same parameters in the same order.
        """
        with self.full(parameter) as tensor:
            return self.tensor(tensor, split_axis(parameter), writer)

    def tensor(self, piece: Any, axis: int | None, writer: int) -> np.ndarray | None:
        """Return the tensor whose pieces the writer's tensor ranks hold to the writer alone.

        Args:
            piece: of this process; None where this process is not among the writer's tensor ranks.
            axis: along which it is split; None where each rank holds all of it.
            writer: rank.
        """
        topology = self.topology
        if axis is None or topology.tensor_group is None:
            return piece.numpy() if topology.rank == writer else None
        if not self.beside(writer):
            return None
        import paddle.distributed

        pieces: list[Any] = []
        paddle.distributed.all_gather(
            pieces, piece.detach().contiguous(), group=topology.tensor_group
        )
        if topology.rank != writer:
            return None
        return np.concatenate([piece.numpy() for piece in pieces], axis=axis)

    def beside(self, rank: int) -> bool:
        """Whether a process differs from this one along the tensor axis at most."""
        other = self.topology.layout.coordinates(rank)
        return replace(other, tensor=0) == replace(self.topology.at, tensor=0)
