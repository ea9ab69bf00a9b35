"""Tensor parallelism: linears and the embedding of a network swapped for parts of them, by style.

The network stays as it was written for one process: a ``column`` linear takes whole inputs and
returns this rank's outputs, a ``row`` linear takes those and returns whole outputs (Shoeybi et al.
2019), and what lies between, such as attention over heads, just sees fewer of them. With sequence
parallelism (Korthikanti et al. 2022) the norms and residual sums outside of those pairs see this
rank's share of the sequence. Weights and their marks are fleet's.

B batch, S sequence, P ranks, s = S / P, E hidden, V vocabulary.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor, nn
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.meta_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from paddle.nn import functional as F

from external_ops.cross_entropy import VocabularyShard
from llm.parallel.exchange import exchanged
from llm.parallel.topology import Topology

# Swapped weights are filled afterwards; this only keeps paddle from drawing numbers for them.
_ZEROS = nn.initializer.Constant(0.0)


def _gathered(x: Tensor, group: Any) -> Tensor:
    """Return ``[B, S, …]`` of the ranks' ``[B, s, …]``."""
    ranks, (batch, length, *rest) = group.nranks, x.shape
    out = paddle.empty([ranks * batch, length, *rest], dtype=x.dtype)
    dist.stream.all_gather(out, x.contiguous(), group=group)
    out = out.reshape([ranks, batch, length, *rest]).transpose([1, 0, *range(2, out.ndim + 1)])
    return out.reshape([batch, ranks * length, *rest])


def _scattered_sum(x: Tensor, group: Any) -> Tensor:
    """Return this rank's ``[B, s, …]`` of the sum of the ranks' ``[B, S, …]``."""
    ranks, (batch, length, *rest) = group.nranks, x.shape
    parts = x.reshape([batch, ranks, length // ranks, *rest])
    parts = parts.transpose([1, 0, *range(2, parts.ndim)]).flatten(0, 1).contiguous()
    out = paddle.empty([batch, length // ranks, *rest], dtype=x.dtype)
    dist.stream.reduce_scatter(out, parts, group=group)
    return out


def _own_part(x: Tensor, axis: int, group: Any) -> Tensor:
    """Return this rank's part of what all ranks hold."""
    size = x.shape[axis]
    assert size % group.nranks == 0, (
        f"axis {axis} of {x.shape} does not split over {group.nranks} ranks: pad rows to a "
        "multiple of tensor_parallel_degree"
    )
    size //= group.nranks
    return paddle.slice(x, [axis], [group.rank * size], [(group.rank + 1) * size])


def _gather_and_sum(x_BsE: Tensor, group: Any) -> Tensor:
    """Return ``[B, S, E]``, which ranks use differently: gradients are summed."""
    return exchanged(x_BsE, partial(_gathered, group=group), partial(_scattered_sum, group=group))


def _sum_and_scatter(x_BSE: Tensor, group: Any) -> Tensor:
    """Return this rank's ``[B, s, E]`` of the sum of the ranks' terms ``[B, S, E]``."""
    return exchanged(x_BSE, partial(_scattered_sum, group=group), partial(_gathered, group=group))


def _gather(x_BsE: Tensor, group: Any) -> Tensor:
    """Return ``[B, S, E]``, which all ranks use alike: each gradient is the whole one."""
    return exchanged(
        x_BsE, partial(_gathered, group=group), partial(_own_part, axis=1, group=group)
    )


def _scatter(x_BSE: Tensor, group: Any) -> Tensor:
    """Return this rank's ``[B, s, E]`` of what all ranks hold."""
    return exchanged(
        x_BSE, partial(_own_part, axis=1, group=group), partial(_gathered, group=group)
    )


def _own_heads(x: Tensor, group: Any) -> Tensor:
    """Return this rank's heads of ``[…, G, D]`` that all ranks hold; the gradient is of all."""

    def all_heads(grad: Tensor) -> Tensor:
        parts: list[Tensor] = []
        dist.all_gather(parts, grad.contiguous(), group=group)
        return paddle.concat(parts, axis=-2)

    return exchanged(x, partial(_own_part, axis=x.ndim - 2, group=group), all_heads)


def _enter(x: Tensor, group: Any) -> Tensor:
    """Return ``x``; sum its gradient over the ranks."""
    return mp_ops._c_identity(x, group=group)


def _sum(x: Tensor, group: Any) -> Tensor:
    """Return the sum of the ranks' terms, in place; each term's gradient is the sum's."""
    return mp_ops._mp_allreduce(x, group=group, use_calc_stream=True, use_model_parallel=True)


class _Once:
    """A function of a tensor that linears of the same input share, as q, k and v do.

    Without it each of them would keep a copy of its own, and sum or gather on its own.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function
        self._known: Any = None
        self._result: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._known is not None and self._known() is x and self._result is not None:
            return self._result
        self._result = self._function(x)
        self._known = weakref.ref(x, self._forget)
        return self._result

    def _forget(self, known: Any) -> None:
        if known is self._known:  # and not of an input that was forgotten long ago
            self._known = self._result = None


class TensorLinear:
    """What the linears below share: whole sizes, and how a low-rank product beside them is split.

    A product ``(x A) B`` beside a column linear has its B split like the linear's weight, and
    beside a row linear its A. ``between`` stands between the two factors. Numbers for each output
    are split beside a column linear.

    Attributes:
        in_features, out_features: of the linear of one process.
        split: axes along which the factors "a" ``[in, r]`` and "b" ``[r, out]`` and numbers for
            outputs, "m" ``[out]``, are split.
        shares: which of them see this rank's share of the sequence only, so that their gradients
            are this rank's terms of a sum.
    """

    weight: Tensor
    model_parallel_group: Any
    in_features: int
    out_features: int
    split: Mapping[str, int] = MappingProxyType({})
    shares = ""

    @property
    def plain_weight(self) -> Tensor:
        """This rank's part of the weight; whoever reads it also enters and sums as this does."""
        return self.weight

    def between(self, x: Tensor) -> Tensor:
        """Bring the first factor's result to where the second needs it."""
        raise NotImplementedError

    def over_inputs(self, sums: Tensor) -> Tensor:
        """Return sums over all inputs from those over this rank's; no gradient."""
        return sums

    def whole_weight(self) -> Tensor:
        """Return the float32 weight of the linear of one process, ``[in, out]``; no gradient."""
        own = self.weight.detach().astype("float32").contiguous()
        parts: list[Tensor] = []
        dist.all_gather(parts, own, group=self.model_parallel_group)
        return paddle.concat(parts, axis=self.weight.split_axis)

    def own_matrix(self, whole: np.ndarray, axis: int) -> np.ndarray:
        """Return this rank's part of a matrix along an axis."""
        group = self.model_parallel_group
        return np.split(whole, group.nranks, axis)[group.rank]

    def whole_input(self, shape: list[int]) -> list[int]:
        """Return the shape that this rank's input has in one process."""
        return shape

    def own_input(self, whole: Tensor) -> Tensor:
        """Return this rank's part of something shaped like the input in one process."""
        return whole


class ColumnLinear(TensorLinear, ColumnParallelLinear):
    """Whole inputs to this rank's outputs.

    Attributes:
        enter: what is done to the input first.
    """

    split: Mapping[str, int] = MappingProxyType({"b": 1, "m": 0})

    def __init__(self, size_in: int, size_out: int, bias: bool, group: Any) -> None:
        ColumnParallelLinear.__init__(
            self, size_in, size_out, _ZEROS, has_bias=bias, gather_output=False, mp_group=group
        )
        self.in_features, self.out_features = size_in, size_out
        self.enter: Callable[[Tensor], Tensor] = self.between

    def forward(self, x: Tensor) -> Tensor:
        """Multiply what all ranks hold by this rank's columns."""
        return F.linear(self.enter(x), self.weight, self.bias)

    def between(self, x: Tensor) -> Tensor:
        """Give the second factor whole inputs."""
        return _enter(x, self.model_parallel_group)


class RowLinear(TensorLinear, RowParallelLinear):
    """This rank's inputs to whole outputs."""

    split: Mapping[str, int] = MappingProxyType({"a": 0})

    def __init__(self, size_in: int, size_out: int, bias: bool, group: Any) -> None:
        RowParallelLinear.__init__(
            self, size_in, size_out, _ZEROS, has_bias=bias, input_is_parallel=True, mp_group=group
        )

    def between(self, x: Tensor) -> Tensor:
        """Sum the first factor's results."""
        return _sum(x, self.model_parallel_group)

    def over_inputs(self, sums: Tensor) -> Tensor:
        """Return sums over all inputs from those over this rank's; no gradient."""
        whole = sums.detach().clone()
        dist.all_reduce(whole, group=self.model_parallel_group)
        return whole

    def whole_input(self, shape: list[int]) -> list[int]:
        """Return the shape that this rank's input has in one process."""
        return [*shape[:-1], self.in_features]

    def own_input(self, whole: Tensor) -> Tensor:
        """Return this rank's part of something shaped like the input in one process."""
        return _own_part(whole, whole.ndim - 1, self.model_parallel_group)


class ColumnSequenceLinear(ColumnLinear):
    """Shares of a sequence, ``[B, s, in]``, to outputs of all of it, ``[B, S, out / P]``."""

    shares = "a"

    def between(self, x: Tensor) -> Tensor:
        """Gather the sequence."""
        return _gather_and_sum(x, self.model_parallel_group)

    def whole_input(self, shape: list[int]) -> list[int]:
        """Return the shape that this rank's input has in one process."""
        return [shape[0], shape[1] * self.world_size, *shape[2:]]

    def own_input(self, whole: Tensor) -> Tensor:
        """Return this rank's part of something shaped like the input in one process."""
        return _own_part(whole, 1, self.model_parallel_group)


class RowSequenceLinear(RowLinear):
    """This rank's inputs of a sequence ``[B, S, in / P]`` to a share of outputs ``[B, s, out]``."""

    shares = "bm"

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, then sum over the ranks, each its share of the sequence."""
        out = self.between(F.linear(x, self.weight))
        return out if self.bias is None else out + self.bias

    def between(self, x: Tensor) -> Tensor:
        """Sum the first factor's results, each rank its share of the sequence."""
        return _sum_and_scatter(x, self.model_parallel_group)


class VocabularyEmbedding(VocabParallelEmbedding):
    """This rank's tokens of an embedding; rows of all tokens, summed over the ranks."""

    @property
    def plain_weight(self) -> Tensor | None:
        """This rank's tokens, ``[V / ranks, E]``."""
        return self.weight

    @property
    def type_name(self) -> str:
        """The weight's type."""
        return str(self.weight.dtype).rsplit(".", 1)[-1]

    def scores(self, hidden: Tensor) -> Tensor:
        """Return the logits of this rank's tokens."""
        return paddle.matmul(hidden, self.weight, transpose_y=True)

    def lookup(self, ids_T: Tensor) -> Tensor:
        """Return ``[T, E]`` of the ids of a step, outside of training."""
        if not self.weight.place.is_cpu_place():
            return self(ids_T)
        # Paddle's own (``c_embedding``) has no bfloat16 on CPUs; nor has its ``where``.
        local = ids_T - self.vocab_start_index
        own = paddle.logical_and(local >= 0, local < self.weight.shape[0])
        rows = paddle.gather(self.weight, paddle.where(own, local, paddle.zeros_like(local)))
        rows = rows.astype("float32")
        rows = paddle.where(own.unsqueeze(-1), rows, paddle.zeros_like(rows))
        whole: Tensor = _sum(rows, self.model_parallel_group).astype(self.weight.dtype)
        return whole


def _part(layer: nn.Layer, style: str, sequence: bool, group: Any) -> nn.Layer:
    """Return this rank's part of a linear or an embedding, without values."""
    size_in, size_out = layer.weight.shape
    if style == "vocab":
        return VocabularyEmbedding(size_in, size_out, _ZEROS, mp_group=group)
    plain, across = {
        "column": (ColumnLinear, ColumnSequenceLinear),
        "row": (RowLinear, RowSequenceLinear),
    }[style]
    return (across if sequence else plain)(size_in, size_out, layer.bias is not None, group)


def split_network(
    network: nn.Layer,
    topology: Topology,
    style: Callable[[str], str],
    *,
    heads: Iterable[str] = (),
    last: nn.Layer | None = None,
) -> None:
    """Swap a network's linears and embedding for this rank's parts of them, in place.

    Parameters keep their names. Those that are split have fleet's marks ``is_distributed`` and
    ``split_axis``; under sequence parallelism all others are marked ``sequence_parallel``: their
    gradients are this rank's terms of a sum over the tensor parallel ranks.

    Args:
        network: made under ``paddle.LazyGuard``, so that whole matrices never exist; this has to be
            called under it too.
        topology: the running job.
        style: of a parameter by name: ``column``, ``row``, ``vocab`` or ``replicated``.
        heads: linears that take whole sequences even under sequence parallelism.
        last: the layer after which sequences are whole again, if this network has it.
    """
    group, sequence = topology.tensor_group, topology.layout.sequence_parallel
    layers = dict(network.named_sublayers(include_self=True))
    enter = _Once(lambda x: _enter(x, group))
    gather = _Once(lambda x: _gather_and_sum(x, group))
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear | nn.Embedding):
            continue
        how = style(f"{name}.weight")
        if how == "replicated":
            continue
        part = _part(layer, how, sequence and name not in heads, group)
        if isinstance(part, ColumnLinear):
            part.enter = gather if isinstance(part, ColumnSequenceLinear) else enter
        parent, _, attribute = name.rpartition(".")
        setattr(layers[parent], attribute, part)
        if sequence and how == "vocab":
            part.register_forward_post_hook(lambda _, __, out: _scatter(out, group))
    if sequence:
        if last is not None:
            last.register_forward_post_hook(lambda _, __, out: _gather(out, group))
        for parameter in network.parameters():
            parameter.sequence_parallel = not parameter.is_distributed


def own_heads(topology: Topology) -> Callable[[Tensor], Tensor]:
    """Return what takes this rank's heads of ``[…, G, D]`` that every rank holds whole."""
    group = topology.tensor_group
    return lambda x: _own_heads(x, group)


def gathered_by_first(topology: Topology) -> Callable[[Tensor], Tensor]:
    """Return what puts the ranks' ``[…, V / P]`` together on the first rank alone.

    The others get back what they gave: it takes neither their time nor their memory.
    """
    group, first = topology.tensor_group, topology.at.tensor == 0
    chief = group.ranks[0]

    def gather(x: Tensor) -> Tensor:
        parts = [paddle.empty_like(x) for _ in range(group.nranks)] if first else None
        dist.gather(x.contiguous(), parts, dst=chief, group=group)
        return x if parts is None else paddle.concat(parts, axis=-1)

    return gather


def vocabulary_shard(topology: Topology, size: int) -> VocabularyShard:
    """Return how this rank scores its part of a vocabulary together with the others."""
    group = topology.tensor_group

    def reduced(kind: int) -> Callable[[Tensor], Tensor]:
        def reduce(x: Tensor) -> Tensor:
            out = x.detach().clone()
            dist.all_reduce(out, op=kind, group=group)
            return out

        return reduce

    return VocabularyShard(
        first=topology.at.tensor * (size // topology.layout.tensor),
        size=size,
        parts=topology.layout.tensor,
        enter=lambda x: _enter(x, group),
        largest=reduced(dist.ReduceOp.MAX),
        total=reduced(dist.ReduceOp.SUM),
        gather=lambda x: mp_ops._c_concat(x, group=group),
    )
