"""Peak memory of one rank of each pipeline stage: the worst of the moments of a step."""

from dataclasses import dataclass, fields

from llm.llama.config import LlamaConfig
from llm.parallel.layout import Layout, Stage
from llm.parallel.plan.activations import LayerBytes, head_bytes, layer_bytes
from llm.parallel.plan.sizes import Sizes, stage_sizes
from llm.parallel.plan.workload import Workload


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the moment of a step when it holds most.

    Args:
        moment: which one.
        parameters: weights, with those that sharding stage 3 has gathered.
        gradients: of the weights.
        optimizer: moments and master weights.
        activations: what the backward pass waits for.
        logits: scores of the vocabulary and their softmax.
        working: tensors that live for one operation, gradients of activations, exchange buffers.
    """

    moment: str
    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    working: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Return bytes by name, the largest first."""
        named: dict[str, float] = {f.name: getattr(self, f.name) for f in fields(self)[1:]}
        return dict(sorted(named.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class _Gradients:
    """Bytes of gradients before a backward pass, after it, and of some weights."""

    before: float
    after: float
    unit: float

    def grown(self, weights: float) -> float:
        """Return them once those of some weights have come on top."""
        return min(self.before + weights * self.unit, max(self.before, self.after))


def micro_batches_in_flight(layout: Layout, stage: int, accumulation: int) -> float:
    """Return how many micro-batches' activations a stage holds at most.

    1F1B keeps as many as stages follow, itself included; interleaving warms up longer (Narayanan et
    al. 2021, section 2.2), in chunks that are a fraction of the stage.
    """
    pipeline, chunks = layout.pipeline, layout.virtual_pipeline
    if chunks == 1:
        return min(accumulation, pipeline - stage)
    warm_up = 2 * (pipeline - stage - 1) + (chunks - 1) * pipeline + 1
    return min(accumulation * chunks, warm_up) / chunks


def _parameters(sizes: Sizes, layout: Layout, work: Workload) -> float:
    if layout.sharding_stage < 3:
        return sizes.total * work.weight_bytes
    # The embedding and the head are whole during a step; of the decoder layers one at a time is.
    shared = sizes.layers * (sum(sizes.layer) + sum(sizes.adapter))
    layer = shared / max(sizes.layers, 1)
    owned = shared / layout.sharding
    return (sizes.outer + owned + layer * (1 - 1 / layout.sharding)) * work.weight_bytes


def _gradients(sizes: Sizes, layout: Layout, work: Workload) -> _Gradients:
    whole = sum(sizes.trained) * work.gradient_bytes
    owned = sizes.owned(layout.sharding) * work.gradient_bytes
    adds = work.accumulation > 1
    if layout.sharding_stage >= 2:
        return _Gradients(owned if adds else 0.0, owned, work.gradient_bytes)
    kept = 0.0 if work.master_grad else (owned if layout.sharding_stage else whole)
    return _Gradients(whole if adds else kept, whole, work.gradient_bytes)


def _activations(stage: Stage, layer: LayerBytes, work: Workload) -> float:
    """Return bytes of one micro-batch in the layers of a stage."""
    numbers = [number for chunk in stage.layers for number in chunk]
    limit = work.recompute_layers
    again = [number for number in numbers if limit is None or number < limit]
    if work.recompute == "none":
        again = []
    return len(again) * layer.kept + (len(numbers) - len(again)) * layer.full


def stage_memory(
    shape: LlamaConfig, layout: Layout, work: Workload, index: int, stage: Stage
) -> Memory:
    """Return the peak of one rank of a stage."""
    sizes = stage_sizes(shape, layout, stage, work.lora_rank)
    layer = layer_bytes(shape, layout, work)
    gradients = _gradients(sizes, layout, work)
    owned = sizes.owned(layout.sharding) if layout.sharding_stage else sum(sizes.trained)
    flying = micro_batches_in_flight(layout, index, work.accumulation)
    fixed = {
        "parameters": _parameters(sizes, layout, work),
        "optimizer": 0.0 if work.offload else owned * work.state_bytes,
    }
    in_layers = _activations(stage, layer, work) * flying
    one_layer = 0 if sizes.adapter else sum(sizes.layer)
    end = max(gradients.before, gradients.after - (sizes.embedding + one_layer) * gradients.unit)
    again = 0.0 if work.recompute == "none" else layer.full
    scored = 0 if sizes.adapter else sizes.scored
    passing = _passing(sizes, layout, gradients)
    moments = [
        Memory(
            "update",
            gradients=gradients.after,
            activations=0,
            logits=0,
            working=max(sizes.trained) * 4.0,  # squares of a gradient, for the norm
            **fixed,
        ),
        Memory(
            "first backward step",
            gradients=gradients.grown(scored),
            activations=in_layers + again,
            logits=0,
            working=layer.working + passing,
            **fixed,
        ),
        Memory(
            "last backward step",
            gradients=end,
            activations=in_layers / max(sizes.layers * flying, 1) + again,
            logits=0,
            working=layer.working + passing,
            **fixed,
        ),
    ]
    if stage.last:
        moments += _head_moments(shape, layout, work, in_layers, scored, gradients, fixed)
    return max(moments, key=lambda memory: memory.total)


def _head_moments(
    shape: LlamaConfig,
    layout: Layout,
    work: Workload,
    in_layers: float,
    scored: int,
    gradients: _Gradients,
    fixed: dict[str, float],
) -> list[Memory]:
    """Return the two moments between the forward and the backward pass of the layers."""
    head = head_bytes(shape, layout, work)
    # A gradient that is added to one that is there exists beside it for a moment.
    beside = scored * gradients.unit if gradients.before or layout.sharding_stage >= 2 else 0
    return [
        Memory(
            "loss",
            gradients=gradients.before,
            activations=in_layers,
            logits=head.kept,
            working=head.loss,
            **fixed,
        ),
        Memory(
            "head going backward",
            gradients=gradients.grown(scored),
            activations=in_layers,
            logits=head.kept,
            working=head.head + scored * head.weights + beside,
            **fixed,
        ),
    ]


def _passing(sizes: Sizes, layout: Layout, gradients: _Gradients) -> float:
    """Return bytes of the largest gradient of a layer, which is there before it is added up."""
    tensors = sizes.adapter or sizes.layer
    return max(tensors) * gradients.unit if gradients.before or layout.sharding_stage >= 2 else 0.0
