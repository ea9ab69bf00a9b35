"""Peak memory of one rank of each pipeline stage: the worst of the moments of a step.

First what a rank holds of the weights (:class:`Sizes`), then what a micro-batch leaves in it
(:class:`LayerBytes`, :class:`HeadBytes`), then both over a step (:func:`stage_memory`).
"""

from dataclasses import dataclass, fields
from functools import cache, lru_cache

from llm.llama.config import LlamaConfig
from llm.llama.placement import style
from llm.parallel.layout import Layout, Stage, largest_first
from llm.planner.workload import Workload

_TILE = 128  # rows of a tile in external_ops/tiled_attention.py
KEPT_NUMBERS = 2**26  # scores that its native form keeps


@dataclass(frozen=True)
class Sizes:
    """Weights on one rank of a stage, before sharding.

    Args:
        layers: decoder layers of the stage.
        layer: weights of each tensor of one layer.
        adapter: weights of each LoRA matrix of one layer.
        embedding: weights of the embedding, where the stage looks tokens up or shares it.
        head: weights of the output matrix where it is one of its own.
        norm: weights of the last norm.
        scored: weights of the matrix that scores the vocabulary, on a last stage.
    """

    layers: int
    layer: tuple[int, ...]
    adapter: tuple[int, ...]
    embedding: int
    head: int
    norm: int
    scored: int

    @property
    def outer(self) -> int:
        """Weights outside the decoder layers."""
        return self.embedding + self.head + self.norm

    @property
    def total(self) -> int:
        """All weights."""
        return self.layers * (sum(self.layer) + sum(self.adapter)) + self.outer

    @property
    def trained(self) -> list[int]:
        """Weights of each tensor that is updated."""
        if self.adapter:
            return list(self.adapter) * self.layers
        outer = [size for size in (self.embedding, self.head, self.norm) if size]
        return [*list(self.layer) * self.layers, *outer]

    def owned(self, ranks: int) -> int:
        """Return the trained weights of the sharding rank that owns most."""
        return _most(self, ranks)


@lru_cache(maxsize=4096)
def _most(sizes: Sizes, ranks: int) -> int:
    # Whole tensors go to ranks, as in llm.parallel.sharding.
    trained = dict(enumerate(sizes.trained))
    load = [0] * ranks
    for number, owner in largest_first(trained, ranks).items():
        load[owner] += trained[number]
    return max(load)


@cache
def _by_inputs(linear: str) -> bool:
    """Say whether tensor parallel ranks split a linear along its inputs."""
    return style(f"{linear}.weight") == "row"


def stage_sizes(shape: LlamaConfig, layout: Layout, stage: Stage, lora_rank: int = 0) -> Sizes:
    """Count what one rank of a stage holds.

    Norms, and the half of an adapter that is not split, are on every tensor parallel rank. Biases,
    which few Llamas have, are not counted.
    """
    tensor, hidden = layout.tensor, shape.hidden_size
    matrices = [size_in * size_out // tensor for size_in, size_out in shape.linears.values()]
    adapter: list[int] = []
    for name, (size_in, size_out) in shape.linears.items():
        row = _by_inputs(name)
        if lora_rank:
            adapter.append(lora_rank * (size_in // tensor if row else size_in))
            adapter.append(lora_rank * (size_out if row else size_out // tensor))
    vocabulary = shape.vocab_size * hidden // tensor
    tied = shape.tie_word_embeddings
    return Sizes(
        layers=sum(len(chunk) for chunk in stage.layers),
        layer=(*matrices, hidden, hidden),
        adapter=tuple(adapter),
        embedding=vocabulary if stage.first or (tied and stage.last) else 0,
        head=vocabulary if stage.last and not tied else 0,
        norm=hidden if stage.last else 0,
        scored=vocabulary if stage.last else 0,
    )


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one decoder layer and one micro-batch on one rank.

    Args:
        kept: between the passes, as the recompute mode has it.
        full: what its own backward pass finds once it is computed again.
        working: gradients of activations while it goes backward.
    """

    kept: float
    full: float
    working: float


def local_tokens(layout: Layout, work: Workload) -> int:
    """Return the tokens of one micro-batch on one rank, before sequence parallelism."""
    return work.micro_batch * work.seq_length // layout.context


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
    scores = 2 * 4 * work.seq_length * shape.num_attention_heads / tensor
    working = 3 * ffn + 2 * hidden if work.flash else max(3 * ffn + 2 * hidden, scores + 2 * q)
    return LayerBytes(kept * tokens, full * tokens, working * tokens)


def _adapter_bytes(shape: LlamaConfig, layout: Layout, work: Workload) -> list[float]:
    """Return bytes per token of each linear's adapter: the narrow product, and dropped inputs."""
    if not work.lora_rank:
        return []
    unit = work.activation_bytes
    dropped = [
        (unit + 1) * size_in / (layout.tensor if _by_inputs(name) else 1)
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
    """Return what scoring the vocabulary takes for one micro-batch (external_ops/cross_entropy)."""
    tokens = local_tokens(layout, work)
    hidden = shape.hidden_size * work.activation_bytes
    width = shape.vocab_size / layout.tensor
    scores = 4 * width  # float32 whatever the precision
    kept: float = (2 if work.fused_norm else 3) * hidden
    # The gradient of the scores is copied where the matrix is in half precision.
    copy = scores / 2 if work.half else 0.0
    if work.fused_head:
        chunk = min(tokens, max(1, work.chunk_numbers // width))
        gradient = hidden * tokens
        # The matrix's gradient adds up in float32; a chunk's comes on top in the matrix's type.
        each = 4 + work.weight_bytes + (4 if work.half else 0) - work.gradient_bytes
        if work.native and tokens * width <= KEPT_NUMBERS:
            return HeadBytes((kept + scores) * tokens, 0.0, gradient, work.weight_bytes)
        passing = (1 if work.native else 2) * scores * chunk
        return HeadBytes(kept * tokens, passing, passing + copy * chunk + gradient, each)
    # The scores are kept; their exponentials and one step of the way to them come on top.
    kept += scores
    return HeadBytes(kept * tokens, 2 * scores * tokens, (hidden + copy) * tokens)


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
