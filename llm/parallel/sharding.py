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
from functools import partial
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor, nn

from llm.parallel.exchange import exchanged
from llm.parallel.layout import largest_first
from llm.parallel.overlap import started, wait
from llm.parallel.topology import Topology

OUTER = -1  # stands for the weights outside of all units
Tasks = list[Any]


def partition(parameters: Sequence[Tensor], ranks: int) -> dict[str, int]:
    """Return the owner of each parameter by name, so that all own about as much.

    Parameters that several pipeline stages hold belong to rank 0, so that their owners match.
    """
    shared = {p.name: 0 for p in parameters if getattr(p, "stage_shared", False)}
    return largest_first({p.name: int(p.size) for p in parameters}, ranks, shared)


class Sharding:
    """Who owns which parameter, and where its weights are.

    Args:
        parameters: all of this process, frozen ones too, in an order that the ranks of the sharding
            group share.
        topology: the running job.
    """

    def __init__(self, parameters: Sequence[Tensor], topology: Topology) -> None:
        self.group = topology.sharding_group
        self.stage = topology.layout.sharding_stage if self.group is not None else 0
        self.rank = topology.at.sharding
        self.parameters = list(parameters)
        self._owner: dict[str, int] = {}
        if self.stage:
            self._owner = partition(self.parameters, topology.layout.sharding)
        self._store: _Store | None = None
        self._spread: _Spread | None = None

    def owns(self, parameter: Tensor) -> bool:
        """Whether this rank updates a parameter."""
        return not self.stage or self._owner[parameter.name] == self.rank

    def source(self, parameter: Tensor) -> int:
        """Return the job's rank that owns a parameter."""
        return int(self.group.ranks[self._owner[parameter.name]])

    def divide(self, units: Sequence[nn.Layer], ahead: bool) -> None:
        """Drop, at stage 3, the weights that other ranks own, and see to it that they come back.

        Args:
            units: layers that compute one after another. At stage 3 their weights are there only
                while they compute; all other weights from the first use in a step to its end.
            ahead: weights of a unit are on their way while the one before computes.
        """
        if self.stage == 3:
            self._store = _Store(self, units, ahead)
        elif self.stage:
            self._spread = _Spread(self, units, ahead)

    def send(self, parameters: Iterable[Tensor], places: Iterable[Tensor], ahead: bool) -> Tasks:
        """Start to bring weights from their owners.

        Args:
            parameters: whose weights.
            places: where they go to on other ranks, and where they are on their owner.
            ahead: all together, to be waited for by the caller; otherwise one after another.
        """
        calls = [
            partial(dist.broadcast, place, src=self.source(one), group=self.group, sync_op=False)
            for one, place in zip(parameters, places, strict=True)
        ]
        if ahead:
            return started(self.group, calls)
        for call in calls:
            wait([call()])
        return []

    def spread(self) -> None:
        """Give all ranks the weights that their owners have updated.

        With ``ahead`` they are on their way: :meth:`begin`, and the units, wait for them.
        """
        if self._store is not None:
            self._store.release_all()
        elif self._spread is not None:
            self._spread.start()

    def gather(self, parameters: Iterable[Tensor]) -> None:
        """Make weights whole on all ranks, until :meth:`release`. Collective at stage 3."""
        self.settle()
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
        elif self._spread is not None:
            self._spread.arrive(OUTER)

    def settle(self) -> None:
        """Wait for weights that are still on their way."""
        if self._store is not None:
            self._store.drop_coming()
        elif self._spread is not None:
            self._spread.settle()


class _Spread:
    """Stages 1 and 2: weights come from their owners after an update, and stay."""

    def __init__(self, sharding: Sharding, units: Sequence[nn.Layer], ahead: bool) -> None:
        self._sharding, self._ahead = sharding, ahead
        self._coming: dict[int, Tasks] = {}
        trained = [p for p in sharding.parameters if not p.stop_gradient]
        outer, inside = _by_unit(trained, units)
        self._parts = {OUTER: outer, **dict(enumerate(inside))}
        if ahead:
            for index, unit in enumerate(units):
                unit.register_forward_pre_hook(self._before(index))

    def _before(self, index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.arrive(index)

        return hook

    @paddle.no_grad()
    def start(self) -> None:
        """Send all weights, in the order in which the next forward pass wants them."""
        for index, part in self._parts.items():
            self._coming[index] = self._sharding.send(part, part, self._ahead)

    def arrive(self, index: int) -> None:
        """Wait for the weights of one unit."""
        wait(self._coming.pop(index, ()))

    def settle(self) -> None:
        """Wait for all."""
        for index in list(self._coming):
            self.arrive(index)


class _Store:
    """Stage 3: weights come from their owners when a layer needs them, and go again.

    With ``ahead`` those of the next unit come while one computes: the one behind it in a forward
    pass, the one before it in a backward pass.
    """

    def __init__(self, sharding: Sharding, units: Sequence[nn.Layer], ahead: bool) -> None:
        self.sharding, self._ahead = sharding, ahead
        self._shapes = {p.name: list(p.shape) for p in sharding.parameters}
        self._absent: set[str] = set()
        # On their way: the weights by name, with what to wait for.
        self._coming: dict[str, tuple[Tensor, Tasks]] = {}
        self._at, self._step = OUTER, 1  # the unit that computes, and where the next one is
        self.release(sharding.parameters)
        self._outer, self._units = _by_unit(sharding.parameters, units)
        for index, unit in enumerate(units):
            unit.register_forward_pre_hook(self._before(index))
            unit.register_forward_post_hook(self._after(index))

    def _before(self, index: int) -> Callable[..., Any]:
        held = self._units[index]

        def hook(_: nn.Layer, inputs: tuple[Any, ...]) -> Any:
            self._need(index)
            x, *others = inputs
            if paddle.is_grad_enabled() and not x.stop_gradient:
                # Its backward pass runs when the layer's is over.
                x = _on_backward(x, lambda: self.release(held))
            return (x, *others)

        return hook

    def _after(self, index: int) -> Callable[..., Any]:
        held = self._units[index]

        def hook(_: nn.Layer, __: Any, output: Tensor) -> Tensor:
            if paddle.is_grad_enabled() and not output.stop_gradient:
                output = _on_backward(output, lambda: self._need(index))
            self.release(held)
            return output

        return hook

    def _need(self, index: int) -> None:
        """Make a unit's weights whole, and start to bring those of the unit that comes next."""
        if index != self._at:
            self._step = 1 if index > self._at else -1
        self._at = index
        self.gather(self._units[index])
        following = index + self._step
        if self._ahead and 0 <= following < len(self._units):
            self._start(self._units[following])

    @paddle.no_grad()
    def gather(self, parameters: Iterable[Tensor]) -> None:
        parameters = list(parameters)
        self._start(parameters)
        for parameter in parameters:
            if parameter.name not in self._coming:
                continue
            whole, tasks = self._coming.pop(parameter.name)
            wait(tasks)
            if not self.sharding.owns(parameter):
                whole._share_buffer_to(parameter)
            self._absent.discard(parameter.name)

    @paddle.no_grad()
    def _start(self, parameters: Iterable[Tensor]) -> None:
        missing = [p for p in parameters if p.name in self._absent and p.name not in self._coming]
        places = []
        for parameter in missing:
            whole = paddle.empty(self._shapes[parameter.name], parameter.dtype)
            if self.sharding.owns(parameter):
                # Another tensor over the same memory: writing into a weight that a backward pass
                # is going to read would be taken for a mistake.
                parameter._share_buffer_to(whole)
            places.append(whole)
        tasks = self.sharding.send(missing, places, self._ahead)
        for parameter, whole in zip(missing, places, strict=True):
            self._coming[parameter.name] = (whole, tasks)

    def release(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            self._absent.add(parameter.name)
            if not self.sharding.owns(parameter):
                parameter._clear_data()

    def gather_outer(self) -> None:
        self._at, self._step = OUTER, 1
        self.gather(self._outer)

    def drop_coming(self) -> None:
        """Give up weights on their way, which nobody needed after all."""
        for _, tasks in self._coming.values():
            wait(tasks)
        self._coming.clear()

    def release_all(self) -> None:
        self.drop_coming()
        self.release([p for p in self.sharding.parameters if p.name not in self._absent])


def _by_unit(
    parameters: Sequence[Tensor], units: Sequence[nn.Layer]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return the parameters outside of all units, and those of each unit."""
    known = {p.name for p in parameters}
    inside = [[p for p in unit.parameters() if p.name in known] for unit in units]
    names = {p.name for part in inside for p in part}
    return [p for p in parameters if p.name not in names], inside


def _on_backward(x: Tensor, function: Callable[[], None]) -> Tensor:
    """Return ``x``, and call a function when the backward pass goes through it."""

    def called(grad: Tensor) -> Tensor:
        function()
        return grad

    return exchanged(x, paddle.clone, called)
