"""ZeRO (Rajbhandari et al. 2020): replicas split optimizer state, gradients and weights.

Every trained parameter has one owner among the ranks of the sharding group, chosen by size so that
all ranks own about as much. Stage 1: gradients are summed onto the owner, which updates and sends
the new weights. Stage 2: that happens during the backward pass, and other ranks keep no gradient.
Stage 3: other ranks keep no weights either, but for the time in which a layer computes.

Whole parameters and not slices of a flattened buffer, unlike ``group_sharded`` in paddle: moments
then have their parameter's shape and name, tensor parallelism and norms need no special case, and
nothing depends on the device. At stage 1 the numbers are those of plain data parallelism; at stages
2 and 3 sums over ranks come before sums over micro-batches, which rounds differently.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor, nn

from llm.parallel.exchange import exchanged
from llm.parallel.gradients import gradient, set_gradient, zero_gradient
from llm.parallel.layout import largest_first
from llm.parallel.topology import Topology


def partition(parameters: Sequence[Tensor], ranks: int) -> dict[str, int]:
    """Return the owner of each parameter by name, so that all own about as much.

    Parameters that several pipeline stages hold belong to rank 0, so that their owners match.
    """
    shared = {p.name: 0 for p in parameters if getattr(p, "stage_shared", False)}
    return largest_first({p.name: int(p.size) for p in parameters}, ranks, shared)


class Sharding:
    """Who owns which parameter, and the exchange of gradients and weights.

    Args:
        parameters: all of this process, frozen ones too, in an order that the ranks of the sharding
            group share.
        topology: the running job.
        units: layers that compute one after another; at stage 3 their weights are there only while
            they compute. All other weights are there from the first use in a step to its end.
    """

    def __init__(
        self, parameters: Sequence[Tensor], topology: Topology, units: Sequence[nn.Layer] = ()
    ) -> None:
        self.group = topology.sharding_group
        self.stage = topology.layout.sharding_stage if self.group is not None else 0
        self.rank = topology.at.sharding
        self.parameters = list(parameters)
        self._owner: dict[str, int] = {}
        self._summed: dict[str, Tensor] = {}
        if self.stage:
            self._owner = partition(self.parameters, topology.layout.sharding)
        if self.stage >= 2:
            for parameter in self.parameters:
                if not parameter.stop_gradient:
                    parameter._register_backward_hook(self._reducer(parameter))
        self._store = _Store(self) if self.stage == 3 else None
        if self._store is not None:
            self._store.attach(units)

    def owns(self, parameter: Tensor) -> bool:
        """Whether this rank updates a parameter."""
        return not self.stage or self._owner[parameter.name] == self.rank

    def source(self, parameter: Tensor) -> int:
        """Return the job's rank that owns a parameter."""
        return int(self.group.ranks[self._owner[parameter.name]])

    def _reducer(self, parameter: Tensor) -> Callable[..., None]:
        @paddle.no_grad()
        def reduce(*_: Any) -> None:
            found = gradient(parameter)
            if found is None:
                return
            dist.reduce(found, dst=self.source(parameter), group=self.group)
            if self.owns(parameter):
                before = self._summed.get(parameter.name)
                total = found.clone() if before is None else before.add_(found)
                self._summed[parameter.name] = total
            set_gradient(parameter, None)

        return reduce

    @paddle.no_grad()
    def reduce(self) -> None:
        """Sum gradients onto their owners; other ranks have none afterwards."""
        if self.stage == 1:
            for parameter in self.parameters:
                if parameter.stop_gradient:
                    continue
                if gradient(parameter) is None:
                    set_gradient(parameter, zero_gradient(parameter))
                dist.reduce(gradient(parameter), dst=self.source(parameter), group=self.group)
                if not self.owns(parameter):
                    set_gradient(parameter, None)
        elif self.stage >= 2:
            for parameter in self.parameters:
                total = self._summed.pop(parameter.name, None)
                if total is not None:
                    set_gradient(parameter, total)

    @paddle.no_grad()
    def spread(self) -> None:
        """Give all ranks the weights that their owners have updated."""
        if self._store is not None:
            self._store.release_all()
        elif self.stage:
            for parameter in self.parameters:
                if not parameter.stop_gradient:
                    dist.broadcast(parameter, src=self.source(parameter), group=self.group)

    def gather(self, parameters: Iterable[Tensor]) -> None:
        """Make weights whole on all ranks, until :meth:`release`. Collective at stage 3."""
        if self._store is not None:
            self._store.gather(parameters)

    def release(self) -> None:
        """Drop the weights that other ranks own."""
        if self._store is not None:
            self._store.release_all()

    def release_one(self, parameter: Tensor) -> None:
        """Drop one parameter, if another rank owns it."""
        if self._store is not None:
            self._store.release([parameter])

    def begin(self) -> None:
        """Make the weights outside the units whole, for the passes of one step."""
        if self._store is not None:
            self._store.gather_outer()


class _Store:
    """Stage 3: weights come from their owners when a layer needs them, and go again."""

    def __init__(self, sharding: Sharding) -> None:
        self.sharding = sharding
        self._shapes = {p.name: list(p.shape) for p in sharding.parameters}
        self._absent: set[str] = set()
        self._outer: list[Tensor] = []
        self.release(sharding.parameters)

    def attach(self, units: Sequence[nn.Layer]) -> None:
        inside = {p.name for unit in units for p in unit.parameters()}
        self._outer = [p for p in self.sharding.parameters if p.name not in inside]
        for unit in units:
            held = [p for p in unit.parameters() if p.name in self._shapes]
            unit.register_forward_pre_hook(self._before(held))
            unit.register_forward_post_hook(self._after(held))

    def _before(self, held: list[Tensor]) -> Callable[..., Any]:
        def hook(_: nn.Layer, inputs: tuple[Any, ...]) -> Any:
            self.gather(held)
            x, *others = inputs
            if paddle.is_grad_enabled() and not x.stop_gradient:
                # Its backward pass runs when the layer's is over.
                x = _on_backward(x, lambda: self.release(held))
            return (x, *others)

        return hook

    def _after(self, held: list[Tensor]) -> Callable[..., Any]:
        def hook(_: nn.Layer, __: Any, output: Tensor) -> Tensor:
            if paddle.is_grad_enabled() and not output.stop_gradient:
                output = _on_backward(output, lambda: self.gather(held))
            self.release(held)
            return output

        return hook

    @paddle.no_grad()
    def gather(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            if parameter.name not in self._absent:
                continue
            owned = self.sharding.owns(parameter)
            whole = paddle.empty(self._shapes[parameter.name], parameter.dtype)
            if owned:
                # Another tensor over the same memory: writing into a weight that a backward pass
                # is going to read would be taken for a mistake.
                parameter._share_buffer_to(whole)
            dist.broadcast(whole, src=self.sharding.source(parameter), group=self.sharding.group)
            if not owned:
                whole._share_buffer_to(parameter)
            self._absent.discard(parameter.name)

    def release(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            self._absent.add(parameter.name)
            if not self.sharding.owns(parameter):
                parameter._clear_data()

    def gather_outer(self) -> None:
        self.gather(self._outer)

    def release_all(self) -> None:
        self.release([p for p in self.sharding.parameters if p.name not in self._absent])


def _on_backward(x: Tensor, function: Callable[[], None]) -> Tensor:
    """Return ``x``, and call a function when the backward pass goes through it."""

    def called(grad: Tensor) -> Tensor:
        function()
        return grad

    return exchanged(x, paddle.clone, called)
