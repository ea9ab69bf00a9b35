"""Pipeline parallelism: fleet's schedules around the pieces of a network that exist already.

fleet decides when a stage computes which micro-batch (1F1B of Narayanan et al. 2019, interleaved
chunks of Narayanan et al. 2021) and moves hidden states forward and gradients back. Everything else
of a micro-batch, such as positions and document numbers, every stage has by itself: stages read the
same samples. So one tensor travels, whose size each stage can work out beforehand.

B batch, S sequence on this rank, E hidden, T tokens of the largest micro-batch of an update.
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.distributed import fleet
from paddle.distributed.fleet import meta_parallel
from paddle.nn import functional as F

from llm.parallel.rules import PipelineOptions, check_chunks, check_micro_batches
from llm.parallel.topology import Topology

Batch = dict[str, Tensor]
Objective = Callable[[Any, Batch], tuple[Tensor, float, dict[str, Any]]]


class Pieces(Protocol):
    """What this process runs of a network."""

    def shape(self, batch: Batch) -> tuple[int, int]:
        """Return B and S of a micro-batch."""
        ...

    def run(self, chunk: int, x_BSE: Tensor | None, batch: Batch) -> Tensor:
        """Return the hidden states ``[B, S, E]`` after one of this stage's chunks.

        The first piece of the network gets None and reads the batch.
        """
        ...

    def view(self, hidden_BSE: Tensor) -> Any:
        """Return what an objective takes for the network, given what the last piece returned."""
        ...


class Pipeline:
    """Runs the micro-batches of an update through all stages.

    Gradients of an update add up in the parameters of each stage. Making one is a collective call.

    Args:
        pieces: what this process runs.
        topology: the running job, of two stages or more.
        options: how stages talk to each other.

    Raises:
        UserError: chunks in a pipeline of two stages.
    """

    def __init__(
        self, pieces: Pieces, topology: Topology, options: PipelineOptions | None = None
    ) -> None:
        layout = topology.layout
        check_chunks(layout)
        self._pieces, self._topology = pieces, topology
        self._options = options or PipelineOptions()
        self._chunks = layout.virtual_pipeline
        # Sequence parallel ranks hold a share of each row between the layers.
        self._shards = layout.tensor if layout.sequence_parallel else 1
        self._batches: Sequence[Batch] = ()
        self._runs = [0] * self._chunks
        self._tokens = 0
        self._loss: Callable[[Any, Batch], Tensor] | None = None
        self._schedule = _schedule(
            [self._function(chunk) for chunk in range(self._chunks)],
            self._score,
            topology,
            self._options,
        )
        self._batched = self._schedule._use_batch_p2p_comm

    def forward_backward(
        self,
        micro_batches: Sequence[Batch],
        loss: Callable[[Any, Batch], Tensor],
        scaler: Any = None,
    ) -> Tensor:
        """Run an update's forward and backward passes.

        Args:
            micro_batches: the same on every stage, and the same number on every replica; their
                sizes may differ. With interleaved chunks at least as many as there are stages.
            loss: maps a view of the network and a micro-batch to a scalar, on the last stage only;
                gradients are those of the sum over micro-batches.
            scaler: multiplies losses before the backward pass (``paddle.amp.GradScaler``).

        Returns:
            the sum of the losses, float32, on every stage.

        Raises:
            UserError: fewer micro-batches than an interleaved schedule needs.
        """
        check_micro_batches(self._topology.layout, len(micro_batches), self._options)
        self._begin(micro_batches)
        self._loss = loss
        self._schedule.set_virtual_pipeline_rank(0)
        # Losses one by one: fleet's own sum is divided by their number.
        losses = self._schedule.forward_backward_pipeline(
            itertools.repeat((None, None)), scaler=scaler, return_micro_batch_loss=True
        )
        self._batches, self._loss = (), None
        return losses.astype("float32").sum()

    def evaluate(self, batch: Batch, objective: Objective) -> tuple[float, float, dict[str, Any]]:
        """Return an objective's loss sum, weight and figures of one batch, on every stage.

        Args:
            batch: the same on every stage.
            objective: as in ``llm.train.objectives``; called on the last stage only.
        """

        def measure(view: Any, batch: Batch) -> tuple[float, float, dict[str, Any]]:
            total, weight, figures = objective(view, batch)
            return total.item(), weight, figures

        return self.apply(measure, batch)

    @paddle.no_grad()
    def apply(self, function: Callable[[Any, Batch], Any], batch: Batch) -> Any:
        """Run the network on a batch, without gradients.

        Args:
            function: maps a view of the network and the batch to something picklable; called on the
                last stage only.
            batch: the same on every stage.

        Returns:
            the function's result, on every stage.
        """
        self._begin([batch])
        helper = self._schedule._p2p_helper
        result = None
        for chunk in range(self._chunks):
            first = self._topology.stage_first and chunk == 0
            x = helper.recv_forward(first, batch_p2p_comm=self._batched)
            x = self._run(chunk, x)
            if self._topology.stage_last and chunk == self._chunks - 1:
                result = function(self._pieces.view(x), batch)
            else:
                helper.send_forward(x, False, batch_p2p_comm=self._batched)
        self._batches = ()
        return self.from_last_stage(result)

    def from_last_stage(self, item: Any) -> Any:
        """Return the last stage's item on every stage; it has to be picklable."""
        group = self._topology.pipeline_group
        items = [item]
        dist.broadcast_object_list(items, src=group.ranks[-1], group=group)
        return items[0]

    def _begin(self, batches: Sequence[Batch]) -> None:
        tokens = max(rows * length for rows, length in map(self._pieces.shape, batches))
        if tokens != self._tokens:
            # Receivers would go on expecting the size of the update before.
            self._schedule._p2p_helper.clear_meta_cache()
            self._tokens = tokens
        self._batches, self._runs = batches, [0] * self._chunks
        self._schedule.accumulate_steps = len(batches)
        self._schedule._init_user_hooks()  # which count the micro-batches of an update

    def _function(self, chunk: int) -> Callable[[Tensor | None], Tensor]:
        def piece(x: Tensor | None) -> Tensor:
            return self._run(chunk, x)

        return piece

    def _run(self, chunk: int, carried_TE: Tensor | None) -> Tensor:
        """Run the next micro-batch of a chunk; every schedule takes a chunk's in rising order."""
        batch = self._batches[self._runs[chunk]]
        self._runs[chunk] += 1
        rows, length = self._pieces.shape(batch)
        x = carried_TE
        if x is not None:
            tokens = rows * length // self._shards
            x = x[:tokens].reshape([rows, length // self._shards, -1])
        x = self._pieces.run(chunk, x, batch)
        if self._topology.stage_last and chunk == self._chunks - 1:
            return x
        return self._carried(x)

    def _carried(self, x_BSE: Tensor) -> Tensor:
        """Return hidden states as ``[T, E]``, padded to the largest micro-batch of the update."""
        x_TE = x_BSE.flatten(0, 1)
        missing = self._tokens // self._shards - x_TE.shape[0]
        if missing:
            x_TE = F.pad(x_TE, [0, missing, 0, 0], pad_from_left_axis=True)
        if x_TE.stop_gradient:
            # All stages have to send gradients, or none; one behind may have something to train.
            # While evaluating too: receivers remember it for all tensors of a size, and would send
            # no gradients in the next update.
            x_TE = x_TE.detach()
            x_TE.stop_gradient = False
        return x_TE

    def _score(self, hidden_BSE: Tensor, _: None) -> Tensor:
        assert self._loss is not None
        batch = self._batches[self._runs[-1] - 1]
        return self._loss(self._pieces.view(hidden_BSE), batch)


def _schedule(
    functions: list[Callable[..., Tensor]],
    score: Callable[..., Tensor],
    topology: Topology,
    options: PipelineOptions,
) -> Any:
    """Return fleet's schedule over functions, one for each chunk of this stage."""
    layout, hybrid = topology.layout, topology.hybrid
    chunks = len(functions)
    strategy = fleet.DistributedStrategy()
    strategy.pipeline_configs = {
        # fleet's interleaved schedule asks for this many when it is made; each update says anew.
        "accumulate_steps": 2 * layout.pipeline,
        "micro_batch_size": 1,
        "enable_partial_send_recv": options.partial_send and not layout.sequence_parallel,
        "p2p_cache_shape": True,
    }
    described = strategy.hybrid_configs["pp_configs"]
    described.delay_scale_loss = True  # losses are sums: not to be divided by micro-batches
    described.use_batch_p2p_comm = options.batched
    described.overlap_p2p_comm = options.overlap
    described.best_unbalanced_scheduler = options.unbalanced
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No shared comm will be constructed")
        layers = meta_parallel.PipelineLayer(
            # A function for each piece of the network; those of other stages are never called.
            layers=[function for function in functions for _ in range(layout.pipeline)],
            topology=hybrid.topology(),
            loss_fn=score,
            seg_method=f"layer:{functions[0].__name__}",
            num_virtual_pipeline_stages=chunks,
        )
    kind = meta_parallel.PipelineParallelWithInterleave if chunks > 1 else None
    return (kind or meta_parallel.PipelineParallel)(layers, hybrid, strategy)
