"""Transfers between processes that go on beside what computes.

A collective that nobody waits for yet runs on the stream of its group, behind what the device was
given before; a wait makes what is given to the device afterwards run behind the collective. Over
NCCL several are launched as one kernel, straight from where their numbers lie, so that a bucket
takes neither a buffer nor a copy. CPUs and other devices run them one by one; on a CPU each ends
where it begins.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

# Large enough to fill a link, small enough that little is left to send when the last gradient
# comes. fleet's sharding takes 256 MB, PyTorch's DDP 25.
BUCKET_BYTES = 128 * 2**20
# Buckets that may be on their way at a time: while one is sent, the next one waits behind it.
AHEAD = 2
# Process groups that launch several collectives as one.
_GROUPING = ("NCCL", "BKCL", "FLAGCX")


@dataclass(frozen=True)
class Overlap:
    """What of an update runs beside computation.

    Args:
        passes: backward passes of an update; sums begin in the last of them.
        bucket_bytes: gradients that are summed at once, at least one.
    """

    passes: int
    bucket_bytes: int = BUCKET_BYTES


def started(group: Any, calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Start collectives of one group, together where its backend can.

    Args:
        group: paddle's.
        calls: each starts a collective with ``sync_op=False`` and returns its task.

    Returns:
        the tasks, for :func:`wait`. What they read and write must live until then.
    """
    # Here, so that the planner knows the sizes above without Paddle.
    from paddle.distributed.communication.batch_isend_irecv import _coalescing_manager

    tasks: list[Any] = []
    together = len(calls) > 1 and group.process_group.name() in _GROUPING
    with _coalescing_manager(group, tasks) if together else nullcontext():
        for call in calls:
            tasks.append(call())
    return tasks


def wait(tasks: Iterable[Any]) -> None:
    """Let what is given to the device from here on run behind these collectives."""
    for task in tasks:
        task.wait()


def cut(sizes: Sequence[int], limit: int) -> list[slice]:
    """Cut a sequence into buckets, each as large as the limit allows and of one item at least.

    Args:
        sizes: of the items, in their order.
        limit: of the sum of a bucket's sizes.
    """
    edges, total = [0], 0
    for index, size in enumerate(sizes):
        if index > edges[-1] and total + size > limit:
            edges.append(index)
            total = 0
        total += size
    return [slice(a, b) for a, b in zip(edges, [*edges[1:], len(sizes)], strict=True) if a < b]
