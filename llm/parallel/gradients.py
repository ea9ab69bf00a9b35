"""Gradients over processes: summed where a weight has copies, measured once, clipped everywhere.

After the backward pass a process holds its own contribution to the gradient of the sum of losses.
Contributions add up over every axis along which processes saw other tokens (llm/parallel/sums.py)
or hold the same weight (here), and nothing is divided: an objective has divided by the number of
labels of the whole update already.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor, nn
from paddle.distributed.fleet.utils.mix_precision_utils import MixPrecisionLayer

from external_ops.adamw import squares
from llm.parallel.topology import Topology


def keep_master_gradients(network: nn.Layer, dtype: str) -> None:
    """Let the gradients of a half-precision network add up in float32, in place.

    They lie in ``main_grad`` from then on, which fleet's ``MixPrecisionOptimizer`` reads.

    Args:
        network: with the parameters.
        dtype: ``float16`` or ``bfloat16``.
    """
    MixPrecisionLayer(network, dtype)  # registers hooks; the wrapper itself is not needed


def gradient(parameter: Tensor) -> Tensor | None:
    """Return a parameter's gradient: the float32 one where mixed precision keeps that."""
    if hasattr(parameter, "main_grad"):
        return parameter.main_grad
    return parameter.grad


def set_gradient(parameter: Tensor, value: Tensor | None) -> None:
    """Replace what :func:`gradient` returns; None forgets it."""
    if hasattr(parameter, "main_grad"):
        parameter.main_grad = value
    elif value is None:
        parameter.clear_gradient(False)
    else:
        parameter.grad = value


def gradient_type(parameter: Tensor) -> paddle.dtype:
    """Return the type of what :func:`gradient` returns."""
    return paddle.float32 if hasattr(parameter, "main_grad") else parameter.dtype


def gradient_bytes(parameter: Tensor) -> int:
    """Return the size of what :func:`gradient` returns; the weights have to be there."""
    width = 4 if hasattr(parameter, "main_grad") else parameter.element_size()
    return int(parameter.size) * width


def is_split(parameter: Tensor) -> bool:
    """Whether tensor parallel ranks hold different parts of a parameter."""
    return bool(getattr(parameter, "is_distributed", False))


class SharedStages:
    """Parameters that lie on several pipeline stages, such as a tied embedding.

    Making one is a collective call: all processes agree on who shares what.

    Args:
        parameters: of this process; those with a true ``stage_shared`` take part.
        topology: the running job.
    """

    def __init__(self, parameters: Sequence[Tensor], topology: Topology) -> None:
        self._groups: list[tuple[Any, list[Tensor]]] = []
        self._first: set[str] = set()
        if topology.layout.pipeline == 1:
            return
        shared = {p.name: p for p in parameters if getattr(p, "stage_shared", False)}
        holders = topology.gather_objects(sorted(shared))
        for pipe in topology.layout.groups("pipeline"):
            sets: dict[tuple[int, ...], list[str]] = {}
            for name in sorted({name for rank in pipe for name in holders[rank]}):
                ranks = tuple(rank for rank in pipe if name in holders[rank])
                sets.setdefault(ranks, []).append(name)
            for ranks, names in sorted(sets.items()):
                if len(ranks) == 1:
                    continue
                # Every process of the job has to take part in making every group.
                group = dist.new_group(list(ranks))
                if topology.rank in ranks:
                    self._groups.append((group, [shared[name] for name in names]))
                    if topology.rank == ranks[0]:
                        self._first |= set(names)

    def sum(self, owned: set[str]) -> None:
        """Sum the gradients over the stages that hold each parameter."""
        for group, parameters in self._groups:
            _sum([p for p in parameters if p.name in owned], group)

    def counts(self, parameter: Tensor) -> bool:
        """Whether this stage is the one that a norm counts a parameter on."""
        shared = any(p is parameter for _, held in self._groups for p in held)
        return not shared or parameter.name in self._first


@paddle.no_grad()
def _sum(parameters: Iterable[Tensor], group: Any) -> None:
    """Sum the gradients of some parameters over a group, each in place."""
    for parameter in parameters:
        if parameter.stop_gradient:
            continue
        if gradient(parameter) is None:  # another rank of the group may have one
            zero = paddle.zeros_like(parameter, dtype=gradient_type(parameter))
            set_gradient(parameter, zero)
        dist.all_reduce(gradient(parameter), group=group)


@paddle.no_grad()
def sum_shared(owned: list[Tensor], topology: Topology, shared: SharedStages) -> None:
    """Sum the gradients of weights that ranks which split the work of a sample all hold.

    Args:
        owned: parameters that this process updates. Ranks of a group own the same ones.
        topology: the running job.
        shared: parameters on several stages.
    """
    if topology.tensor_group is not None:
        marked = [p for p in owned if getattr(p, "sequence_parallel", False)]
        _sum(marked, topology.tensor_group)
    shared.sum({p.name for p in owned})


@paddle.no_grad()
def global_norm(owned: list[Tensor], topology: Topology, shared: SharedStages) -> float:
    """Return the norm of the whole update's gradient, the same on all processes.

    Every number counts once, however many processes hold it.

    Args:
        owned: parameters that this process updates, with summed gradients.
        topology: the running job.
        shared: parameters on several stages.
    """
    at = topology.at
    counted = []
    if at.data == 0 and at.context == 0:
        counted = [p for p in owned if (at.tensor == 0 or is_split(p)) and shared.counts(p)]
    gradients = [found for found in map(gradient, counted) if found is not None]
    total = squares(gradients)
    if topology.layout.world_size > 1:
        dist.all_reduce(total)
    return math.sqrt(total.item())


class ScaledUpdates:
    """Multiplies each gradient just before the update that reads it, while caches still hold it.

    Args:
        optimizer: one of paddle's, or fleet's over one.

    Attributes:
        factor: of the next updates.
    """

    def __init__(self, optimizer: Any) -> None:
        self.factor = 1.0
        inner = getattr(optimizer, "_inner_opt", optimizer)
        self._update = inner._append_optimize_op
        inner._append_optimize_op = self._scaled

    def _scaled(self, block: Any, param_and_grad: tuple[Tensor, Tensor]) -> Any:
        if self.factor != 1.0:
            param_and_grad[1].scale_(self.factor)
        return self._update(block, param_and_grad)


@paddle.no_grad()
def scale_gradients(owned: list[Tensor], factor: float) -> None:
    """Multiply gradients in place."""
    for parameter in owned:
        found = gradient(parameter)
        if found is not None:
            found.scale_(factor)
