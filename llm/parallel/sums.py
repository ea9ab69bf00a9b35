"""Sums of gradients over processes that saw other tokens, as soon as the gradients are there.

Without overlap a parameter's gradient is summed over one group after another, and each sum is
waited for. With overlap gradients are summed in buckets, in the reverse order of the parameters,
which is about the order in which they come; sums begin while the backward pass goes on.

The order of buckets is fixed, and not the one observed in the first pass as in PyTorch's DDP (Li et
al. 2020): it is the same in every process, whatever a process has no gradient for, and after a
resume. Each number is summed over the same groups in the same order with overlap and without, so
both give the same bits wherever a sum over a group does not depend on its neighbours.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor

from llm.parallel.gradients import gradient, gradient_bytes, gradient_type, set_gradient
from llm.parallel.overlap import AHEAD, Overlap, cut, started, wait
from llm.parallel.sharding import Sharding
from llm.parallel.topology import Topology


@dataclass(eq=False)
class _Bucket:
    """Parameters whose gradients are summed together.

    Attributes:
        arrived: gradients by name that backward passes have brought since the last sum.
        rounds: sums of this update that have begun.
        last: no other sum of this update will follow.
        leg: which group the sum is over at the moment.
        values: what is summed, by member; None where another process owns it.
        tasks: what to wait for.
    """

    members: list[Tensor]
    arrived: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    last: bool = False
    leg: int = 0
    values: list[Tensor | None] = field(default_factory=list)
    tasks: list[Any] = field(default_factory=list)

    def has(self, passes: int) -> bool:
        """Whether so many passes have brought every member's gradient."""
        return all(self.arrived[p.name] >= passes for p in self.members)

    def reset(self) -> None:
        """Forget this update."""
        self.arrived.clear()
        self.rounds, self.last, self.leg = 0, False, 0
        self.values, self.tasks = [], []


class GradientSums:
    """Sums each gradient over the groups along which processes saw other tokens.

    From sharding stage 2 on every backward pass ends in a sum onto the owner, which adds those of
    all passes up; before, the update does. Backward passes bring gradients to the ranks of a group
    in the same order.

    Args:
        parameters: trained ones, in an order that the ranks of each group share; their weights are
            still there.
        sharding: who owns them.
        topology: the running job.
        overlap: None waits for each sum before the next begins.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        sharding: Sharding,
        topology: Topology,
        overlap: Overlap | None = None,
    ) -> None:
        self._sharding = sharding
        replicas = (topology.context_group, topology.data_group)
        self._groups = [sharding.group] if sharding.stage else []
        self._groups += [group for group in replicas if group is not None]
        self._each = sharding.stage >= 2
        self._passes = 0 if overlap is None else overlap.passes
        self._ahead = 0 if overlap is None else AHEAD
        late_first = list(parameters)[::-1]
        self._shapes = {p.name: list(p.shape) for p in late_first}
        sizes = [gradient_bytes(p) for p in late_first]
        limit = 0 if overlap is None else overlap.bucket_bytes
        self._buckets = [_Bucket(late_first[part]) for part in cut(sizes, limit)]
        self._next = 0  # of those that are summed once, which begin in order
        self._running: deque[_Bucket] = deque()
        self._totals: dict[str, Tensor] = {}
        if self._groups and (self._each or overlap is not None):
            for bucket in self._buckets:
                for parameter in bucket.members:
                    parameter._register_backward_hook(self._arrival(parameter.name, bucket))

    def _arrival(self, name: str, bucket: _Bucket) -> Callable[..., None]:
        def arrived(*_: Any) -> None:
            assert not bucket.last, f"{name}: more than {self._passes} backward passes in an update"
            bucket.arrived[name] += 1
            if self._each:
                if bucket.has(1):
                    self._start(bucket)
                return
            while self._next < len(self._buckets) and self._buckets[self._next].has(self._passes):
                self._start(self._buckets[self._next])

        return arrived

    def finish(self) -> None:
        """Complete the sums of an update: owners have its gradients then, other ranks none."""
        if not self._groups:
            return
        for bucket in self._buckets:
            if (self._each and bucket.arrived) or not (self._each or bucket.last):
                self._start(bucket)
        self._drain()
        for bucket in self._buckets:
            if not bucket.last:  # nobody could tell that its last pass was the last one
                self._conclude(bucket)
        self._drain()
        for bucket in self._buckets:
            bucket.reset()
        self._next = 0

    def _drain(self) -> None:
        while self._running:
            self._advance()

    @paddle.no_grad()
    def _start(self, bucket: _Bucket) -> None:
        """Start a bucket's sum over the first group."""
        while bucket in self._running:
            self._advance()
        bucket.values = [self._taken(p) for p in bucket.members]
        bucket.rounds += 1
        bucket.last = not self._each or bucket.rounds == self._passes
        bucket.leg = 0
        if self._each:
            bucket.arrived.clear()
        else:
            self._next += 1
        self._begin(bucket)

    def _gradient(self, parameter: Tensor) -> Tensor:
        """Return a parameter's gradient, which is zero where only other ranks have one."""
        found = gradient(parameter)
        if found is None:
            found = paddle.zeros(self._shapes[parameter.name], gradient_type(parameter))
            set_gradient(parameter, found)
        return found

    def _taken(self, parameter: Tensor) -> Tensor:
        """Return a gradient to be summed; at stages 2 and 3 the next pass begins another one."""
        found = self._gradient(parameter)
        if self._each:
            # Another tensor over the same memory: forgetting a gradient empties its own.
            kept = paddle.empty(self._shapes[parameter.name], found.dtype)
            found._share_buffer_to(kept)
            set_gradient(parameter, None)
            return kept
        return found

    def _begin(self, bucket: _Bucket) -> None:
        group, calls = self._groups[bucket.leg], []
        for parameter, value in zip(bucket.members, bucket.values, strict=True):
            if value is None:
                continue
            call: Callable[[], Any] = partial(dist.all_reduce, value, group=group, sync_op=False)
            if self._onto_owners(bucket):
                owner = self._sharding.source(parameter)
                call = partial(dist.reduce, value, dst=owner, group=group, sync_op=False)
            calls.append(call)
        bucket.tasks = started(group, calls)
        self._running.append(bucket)
        while len(self._running) > self._ahead:
            self._advance()

    def _onto_owners(self, bucket: _Bucket) -> bool:
        return bucket.leg == 0 and self._sharding.stage > 0

    @paddle.no_grad()
    def _advance(self) -> None:
        """Wait for the sum that began first, and go on to its next group."""
        bucket = self._running.popleft()
        wait(bucket.tasks)
        bucket.tasks = []
        if self._each and bucket.leg == 0:
            self._add(bucket)
        if bucket.last:
            self._conclude(bucket)

    def _add(self, bucket: _Bucket) -> None:
        """Add the sum of one pass to those of the passes before."""
        for parameter, value in zip(bucket.members, bucket.values, strict=True):
            if self._sharding.owns(parameter):
                before = self._totals.get(parameter.name)
                self._totals[parameter.name] = value if before is None else before.add_(value)
        bucket.values = []

    @paddle.no_grad()
    def _conclude(self, bucket: _Bucket) -> None:
        """Give owners the sums over the group that was waited for, and go on to the next one."""
        bucket.last = True
        if self._onto_owners(bucket):
            for parameter in bucket.members:
                if self._each:
                    set_gradient(parameter, self._totals.pop(parameter.name, None))
                elif not self._sharding.owns(parameter):
                    set_gradient(parameter, None)
        bucket.leg += 1
        bucket.values = []
        if bucket.leg < len(self._groups):
            owned = self._sharding.owns
            bucket.values = [self._gradient(p) if owned(p) else None for p in bucket.members]
            self._begin(bucket)
