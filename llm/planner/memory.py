"""Peak memory of one rank of each pipeline stage: the worst of the moments of a step.

What a micro-batch leaves in a rank beside its weights (:class:`LayerBytes`, :class:`HeadBytes`),
then both over a step (:func:`stage_memory`). What a rank holds of the weights is
:class:`llm.planner.sizes.Sizes`.
"""

from dataclasses import dataclass, fields

from llm.llama.config import LlamaConfig
from llm.parallel.layout import Layout, Stage
from llm.parallel.overlap import AHEAD, BUCKET_BYTES
from llm.planner.sizes import Sizes, by_inputs, stage_sizes
from llm.planner.workload import Workload

_TILE = 128  # rows of a tile in external_ops/tiled_attention.py
KEPT_NUMBERS = 2**26  # scores that its native form keeps


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one decoder layer and one micro-batch on one rank.

    Args:
        kept: between the passes, as the recompute mode has it.
        full: what its own backward pass finds once it is computed again.
        forward: at the worst moment of its forward pass.
        working: gradients of activations while it goes backward.
    """

    kept: float
    full: float
    forward: float
    working: float


def local_tokens(layout: Layout, work: Workload) -> int:
    """Return the tokens of one micro-batch on one rank, before sequence parallelism."""
    return work.tokens // layout.context


def _attention_weights(shape: LlamaConfig, layout: Layout, work: Workload) -> float:
    """Return bytes per token of the softmax that is kept for the gradient."""
    heads = shape.num_attention_heads / layout.tensor
    length = work.seq_length  # a rank's queries see the keys of all context ranks
    if not work.flash:
        # float32 weights, and in half precision their copy in that type for the product.
        return heads * length * (6 if work.half else 4)
    if work.tiled:
        return heads * (length + min(_TILE, length)) / 2 * 4
    # The logarithm of each row's sum; the native kernel keeps what rounding took from it too.
    return heads * (8 if work.native else 4)


def layer_bytes(shape: LlamaConfig, layout: Layout, work: Workload) -> LayerBytes:
    """Return what one decoder layer takes for one micro-batch."""
    tensor = layout.tensor
    spread = tensor if layout.sequence_parallel else 1
    unit = work.activation_bytes
    hidden = shape.hidden_size * unit
    q = shape.num_attention_heads * shape.head_dim * unit / tensor
    kv = shape.num_key_value_heads * shape.head_dim * unit / tensor
    ffn = shape.intermediate_size * unit / tensor
    # The norm's own: its input, which is the residual stream; the reference also keeps the
    # normalised rows and one number per token, and in half precision a float32 copy of the input.
    stream = hidden / spread
    norm = 0.0 if work.fused_norm else (stream + 4) + (4 * shape.hidden_size / spread) * work.half
    # Input of q, k and v, and of gate and up; tensor parallel ranks hold it whole, even where the
    # norm before it made a share of it.
    entry = hidden
    weights = _attention_weights(shape, layout, work)
    core = q + 2 * kv  # queries, keys, values
    attention = entry + core + q  # and the output, which o_proj multiplies
    mlp = (
        entry + (3 if work.native or work.fused_swiglu else 4) * ffn
    )  # gate, its silu, up, their product
    adapters = sum(_adapter_bytes(shape, layout, work))
    full = 2 * (stream + norm) + attention + weights + mlp + adapters
    away = work.recompute_offload  # what is computed from lies in host memory
    kept = {
        "none": full,
        "core_attn": full - weights - (core if away else 0),
        "full_attn": full - weights - attention + (0 if away else stream),
        "full": 0.0 if away else stream,
    }[work.recompute]
    tokens = local_tokens(layout, work)
    scores = 0.0 if work.flash else 4 * work.seq_length * shape.num_attention_heads / tensor
    working = max(3 * ffn + 2 * hidden, 2 * scores + 2 * q)
    # The reference's scores, their bias, the sum and its softmax are there at a time, before what
    # follows in the layer is.
    passing = max(0.0, 4 * scores - weights - mlp - stream - norm)
    return LayerBytes(kept * tokens, full * tokens, (full + passing) * tokens, working * tokens)


def _adapter_bytes(shape: LlamaConfig, layout: Layout, work: Workload) -> list[float]:
    """Return bytes per token of each linear's adapter: the narrow product, and dropped inputs."""
    if not work.lora_rank:
        return []
    unit = work.activation_bytes
    dropped = [
        (unit + 1) * size_in / (layout.tensor if by_inputs(name) else 1)
        for name, (size_in, _) in shape.linears.items()
    ]
    narrow = [work.lora_rank * unit + (extra if work.lora_dropout else 0) for extra in dropped]
    # Adapters of tensor parallel ranks read what the norm made, linears their copy of it.
    own = 2 * shape.hidden_size * unit if layout.tensor > 1 else 0
    return [*narrow, own / (layout.tensor if layout.sequence_parallel else 1)]


@dataclass(frozen=True)
class HeadBytes:
    """Bytes of the last norm, the head and the loss for one micro-batch on one rank.

    Args:
        kept: between the passes.
        loss: on top of it, while the loss or its gradient is computed.
        head: on top of it, while the matrix goes backward, without its weights' gradient.
        weights: bytes for each weight of the matrix while it goes backward, beside its gradient.
    """

    kept: float
    loss: float
    head: float
    weights: float = 0.0


def head_bytes(shape: LlamaConfig, layout: Layout, work: Workload) -> HeadBytes:
    """Return what scoring the vocabulary takes for one micro-batch (external_ops/cross_entropy).

    Where only some tokens have labels, their hidden states are gathered, and nothing else scored.
    """
    tokens = local_tokens(layout, work)
    scored = tokens if work.scored is None else min(tokens, work.scored)
    hidden = shape.hidden_size * work.activation_bytes
    width = shape.vocab_size / layout.tensor
    scores = 4 * width  # float32 whatever the precision
    gathered = hidden * scored * (work.scored is not None)
    kept = (2 if work.fused_norm else 3) * hidden * tokens + gathered
    gradient = hidden * tokens + gathered
    # The gradient of the scores is copied where the matrix is in half precision.
    copy = scores / 2 if work.half else 0.0
    if work.fused_head:
        chunk = min(scored, max(1, work.chunk_numbers // width))
        if work.native and scored * width <= KEPT_NUMBERS:
            return HeadBytes(kept + scores * scored, 0.0, gradient)
        # The matrix's gradient adds up in float32; a chunk's comes on top in the matrix's type.
        each = 4 + work.weight_bytes + (4 if work.half else 0) - work.gradient_bytes
        passing = (1 if work.native else 2) * scores * chunk
        return HeadBytes(kept, passing, passing + copy * chunk + gradient, each)
    # The scores are kept; their exponentials and one step of the way to them come on top.
    kept += scores * scored
    return HeadBytes(kept, 2 * scores * scored, gradient + copy * scored)


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
    """Bytes of gradients before a backward pass, after it, and of some weights.

    Those that stay between updates, as zeros, are ``kept``.
    """

    before: float
    after: float
    unit: float
    kept: float

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
    # The embedding and the head are whole during a step; of the decoder layers one at a time is,
    # and with overlap the next one.
    shared = sizes.layers * (sum(sizes.layer) + sum(sizes.adapter))
    layer = shared / max(sizes.layers, 1)
    owned = shared / layout.sharding
    whole = min(1 + work.overlap, sizes.layers) * layer
    return (sizes.outer + owned + whole * (1 - 1 / layout.sharding)) * work.weight_bytes


def _gradients(sizes: Sizes, layout: Layout, work: Workload) -> _Gradients:
    whole = sum(sizes.trained) * work.gradient_bytes
    owned = sizes.owned(layout.sharding) * work.gradient_bytes
    adds = work.accumulation > 1
    if layout.sharding_stage >= 2:
        return _Gradients(owned if adds else 0.0, owned, work.gradient_bytes, 0.0)
    kept = 0.0 if work.master_grad else (owned if layout.sharding_stage else whole)
    return _Gradients(whole if adds else kept, whole, work.gradient_bytes, kept)


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
    sizes = stage_sizes(shape, layout, stage, work)
    layer = layer_bytes(shape, layout, work)
    gradients = _gradients(sizes, layout, work)
    owned = sizes.owned(layout.sharding) if layout.sharding_stage else sum(sizes.trained)
    flying = micro_batches_in_flight(layout, index, work.accumulation)
    fixed = {
        "parameters": _parameters(sizes, layout, work),
        "optimizer": 0.0 if work.offload else owned * work.state_bytes,
    }
    in_layers = _activations(stage, layer, work) * flying
    one_layer = sum(sizes.layer)
    last = 0 if sizes.frozen else sizes.embedding + one_layer
    end = max(gradients.before, gradients.after - last * gradients.unit)
    again = 0.0 if work.recompute == "none" else layer.full
    scored = 0 if sizes.frozen else sizes.scored
    passing = _passing(sizes, layout, work, gradients)
    # Squares of a gradient, for the norm; later its weight's offloaded state, with its neighbours'.
    numbers = max(4, work.state_bytes * (1 + work.overlap) if work.offload else 0)
    moments = [
        Memory(
            "update",
            gradients=gradients.after,
            activations=0,
            logits=0,
            working=max(sizes.trained) * float(numbers),
            **fixed,
        ),
        Memory(
            "forward pass",
            gradients=gradients.before,
            activations=in_layers - (0.0 if again else layer.full) + layer.forward,
            logits=0,
            working=0,
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
    if work.eval_batch:
        moments.append(_evaluation(shape, layout, work.evaluating(), stage, gradients, fixed))
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


def _evaluation(
    shape: LlamaConfig,
    layout: Layout,
    work: Workload,
    stage: Stage,
    gradients: _Gradients,
    fixed: dict[str, float],
) -> Memory:
    """Return the forward pass of an evaluation, between updates: nothing waits for a backward pass.

    Args:
        work: of its batches (:meth:`Workload.evaluating`).
    """
    layer = layer_bytes(shape, layout, work)
    head = head_bytes(shape, layout, work) if stage.last else HeadBytes(0.0, 0.0, 0.0)
    scoring = head.kept + head.loss
    return Memory(
        "evaluation",
        gradients=gradients.kept,
        activations=0.0 if scoring > layer.forward else layer.forward,
        logits=head.kept if scoring > layer.forward else 0.0,
        working=head.loss if scoring > layer.forward else 0.0,
        **fixed,
    )


def _passing(sizes: Sizes, layout: Layout, work: Workload, gradients: _Gradients) -> float:
    """Return bytes of gradients that are there before they are added up.

    The largest of a layer; with overlap and sharded gradients a bucket, and those on their way.
    """
    tensors = (*sizes.adapter, *sizes.prefix) or sizes.layer
    largest = max(tensors) * gradients.unit
    if layout.sharding_stage >= 2 and work.overlap:
        flying = (AHEAD + 1) * max(BUCKET_BYTES, largest)
        return min(flying, sum(sizes.trained) * gradients.unit)
    return largest if gradients.before or layout.sharding_stage >= 2 else 0.0
