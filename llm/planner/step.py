"""Work, communication and time of one update.

Times are an estimate for ranking layouts, not a promise: matrix products run at a fixed share of
the device's peak and everything else at the speed of its memory, one after another. With overlap
sums of gradients, transfers of sharded weights and copies of offloaded state cost only what is
longer than the computation that they run beside.
"""

from dataclasses import dataclass

from llm.llama.config import LlamaConfig
from llm.parallel.layout import Layout
from llm.planner.memory import layer_bytes, local_tokens
from llm.planner.sizes import stage_sizes
from llm.planner.workload import Hardware, Workload

# Share of the dense peak that large matrix products reach in practice, and share of a link's data
# sheet that a collective reaches. Assumptions, documented in docs/parallel.md.
PRODUCTS = 0.65
COLLECTIVES = 0.75
# How often each kept byte moves: written and read forward, read backward, its gradient written and
# read, and once more for what an operation makes and throws away.
MOVES = 6


@dataclass(frozen=True)
class Seconds:
    """Time of one update on the slowest stage, by what it is spent on.

    Args:
        products: matrix products.
        memory: everything else that computes.
        bubble: waiting for other stages.
        communication: with other ranks, hidden or not.
        update: of the weights, with copies of offloaded state, hidden or not.
        hidden: communication that overlap hides behind computation.
        hidden_copies: copies of offloaded state that it hides behind each other and the update.
        overlap: whether the run overlaps.
    """

    products: float
    memory: float
    bubble: float
    communication: float
    update: float
    hidden: float = 0.0
    hidden_copies: float = 0.0
    overlap: bool = False

    @property
    def exposed(self) -> float:
        """Communication that overlap does not hide."""
        return self.communication - self.hidden

    @property
    def in_turn(self) -> float:
        """All of it without overlap."""
        return self.products + self.memory + self.bubble + self.communication + self.update

    @property
    def overlapped(self) -> float:
        """All of it with overlap."""
        return self.in_turn - self.hidden - self.hidden_copies

    @property
    def total(self) -> float:
        """All of it, as the run does it."""
        return self.overlapped if self.overlap else self.in_turn


def _axis_bandwidth(layout: Layout, axis: str, hardware: Hardware, per_machine: int) -> float:
    """Return the bandwidth of one rank along an axis: the network's where it leaves a machine."""
    fastest_first = ("tensor", "context", "sharding", "pipeline", "data")
    span = 1
    for name in fastest_first:
        span *= getattr(layout, name)
        if name == axis:
            break
    return (hardware.inside if span <= per_machine else hardware.outside) * COLLECTIVES


def _ring(degree: int) -> float:
    """Return the share of a tensor that a rank sends in a gather or a scatter over a ring."""
    return (degree - 1) / degree


def communication(shape: LlamaConfig, layout: Layout, work: Workload) -> dict[str, float]:
    """Return the bytes that one rank of the busiest stage sends in an update, by axis.

    Ring algorithms: an all-reduce sends ``2 (n - 1) / n`` of a tensor, a gather or a scatter half
    of that. Tensor parallelism: two all-reduces of the hidden states forward and two backward in
    each layer (Shoeybi et al. 2019), or as many pairs of gather and scatter with sequence
    parallelism (Korthikanti et al. 2022).
    """
    stages = layout.stages(shape.num_hidden_layers)
    sizes = [stage_sizes(shape, layout, stage, work) for stage in stages]
    layers = max(size.layers for size in sizes)
    trained = max(sum(size.trained) for size in sizes)
    whole = max(size.total for size in sizes) * work.weight_bytes
    hidden = local_tokens(layout, work) * shape.hidden_size * work.activation_bytes
    passes = work.accumulation
    volume = {}
    if layout.tensor > 1:
        again = {"none": 0, "core_attn": 0, "full_attn": 1, "full": 2}[work.recompute]
        each = 2 * _ring(layout.tensor) * hidden
        # Once more for the embedding forward and for the head backward.
        volume["tensor"] = ((4 + again) * layers + 2) * each * passes
    if layout.context > 1:
        volume["context"] = _context_bytes(shape, layout, work) * layers * passes
    if layout.pipeline > 1:
        volume["pipeline"] = 2 * layout.virtual_pipeline * hidden * passes
    gradients = trained * work.gradient_bytes
    if layout.sharding > 1:
        volume["sharding"] = sum(_sharding_bytes(layout, work, trained, whole))
    if layout.data > 1:
        held = gradients / (layout.sharding if layout.sharding_stage else 1)
        volume["data"] = 2 * _ring(layout.data) * held
    return volume


def _sharding_bytes(
    layout: Layout, work: Workload, trained: float, whole: float
) -> tuple[float, float]:
    """Return what sharding sends of gradients and of weights in an update.

    Args:
        layout: degrees of parallelism.
        work: what a rank computes.
        trained: weights that are trained.
        whole: bytes of all weights.
    """
    part, passes = _ring(layout.sharding), work.accumulation
    reduce = part * trained * work.gradient_bytes * (passes if layout.sharding_stage >= 2 else 1)
    gather = part * trained * work.weight_bytes
    if layout.sharding_stage == 3:
        gather = 2 * part * whole * passes
    return reduce, gather


def _hidden(layout: Layout, work: Workload, compute: float, waiting: dict[str, float]) -> float:
    """Return the seconds of communication that overlap hides in an update.

    Args:
        layout: degrees of parallelism.
        work: what a rank computes.
        compute: seconds of an update.
        waiting: seconds of ``reduce`` and ``gather`` of sharding and of ``data``, one link each.
    """
    passes = work.accumulation
    # A backward pass is two thirds of the work, or three quarters where it recomputes all.
    forward = compute / passes / (4 if work.recompute == "full" else 3)
    backward = compute / passes - forward
    if layout.sharding_stage == 3:
        # Weights come in both passes, gradients go in the backward ones; the link is the same.
        reduce = min(waiting["reduce"], backward * passes)
        hidden = reduce + min(waiting["gather"], compute - reduce)
    else:
        # Weights come after the update, in the next forward pass.
        room = backward * (passes if layout.sharding_stage == 2 else 1)
        reduce = min(waiting["reduce"], room)
        hidden = reduce + min(waiting["gather"], forward)
    # A bucket is summed over replicas behind the sum onto its owner, in the last backward pass.
    last = reduce / (passes if layout.sharding_stage >= 2 else 1)
    return hidden + min(waiting["data"], backward - last)


def _context_bytes(shape: LlamaConfig, layout: Layout, work: Workload) -> float:
    """Return bytes per layer and micro-batch: keys and values, or heads for tokens."""
    q = shape.num_attention_heads * shape.head_dim / layout.tensor
    kv = shape.num_key_value_heads * shape.head_dim / layout.tensor
    size = local_tokens(layout, work) * work.activation_bytes
    if layout.context_kind == "ring":
        # Keys and values forward; keys, values and both gradients backward.
        return (layout.context - 1) * 6 * kv * size
    return 2 * _ring(layout.context) * (2 * q + 2 * kv) * size


def stage_flops(shape: LlamaConfig, layout: Layout, work: Workload) -> float:
    """Return the FLOPs of a micro-batch on a rank of the busiest stage, recomputing included."""
    tokens = local_tokens(layout, work)
    each = {name: 2.0 * a * b / layout.tensor for name, (a, b) in shape.linears.items()}
    matrices = sum(each.values())
    seen = work.seq_length / 2 if work.flash else work.seq_length
    scores = 4.0 * shape.num_attention_heads / layout.tensor * shape.head_dim * seen
    # Frozen weights have no gradient: two thirds of the work of training them.
    factor = 2 if work.frozen else 3
    forward = matrices + scores
    attention = sum(f for name, f in each.items() if name.startswith("self_attn.")) + scores
    again = {"none": 0.0, "core_attn": scores, "full_attn": attention, "full": forward}
    layer = factor * matrices + 3 * scores + again[work.recompute]
    head = factor * 2.0 * shape.vocab_size * shape.hidden_size / layout.tensor
    stages = layout.stages(shape.num_hidden_layers)
    work_of = [
        sum(len(chunk) for chunk in stage.layers) * layer + (head if stage.last else 0)
        for stage in stages
    ]
    return max(work_of) * tokens


def step_seconds(
    shape: LlamaConfig, layout: Layout, work: Workload, hardware: Hardware, per_machine: int = 8
) -> Seconds:
    """Estimate the time of an update.

    Args:
        shape: the network.
        layout: degrees of parallelism.
        work: what a rank computes.
        hardware: the device.
        per_machine: devices of a machine, which talk over its own links.
    """
    peak = (hardware.half if work.half else hardware.single) * PRODUCTS
    passes = work.accumulation
    products = stage_flops(shape, layout, work) / peak * passes
    stages = layout.stages(shape.num_hidden_layers)
    sizes = [stage_sizes(shape, layout, stage, work) for stage in stages]
    layers = max(size.layers for size in sizes)
    layer = layer_bytes(shape, layout, work.replace(flash=True, tiled=False))
    moved = MOVES * layer.full * layers + MOVES * _score_bytes(shape, layout, work)
    if work.recompute == "full":
        moved += 2 * layer.full * layers
    memory = moved * passes / hardware.memory_bandwidth
    volumes = communication(shape, layout, work)
    waiting = {
        axis: volume / _axis_bandwidth(layout, axis, hardware, per_machine)
        for axis, volume in volumes.items()
    }
    inner = sum(seconds for axis, seconds in waiting.items() if axis in ("tensor", "context"))
    trained = max(sum(size.trained) for size in sizes)
    whole = max(size.total for size in sizes) * work.weight_bytes
    link = _axis_bandwidth(layout, "sharding", hardware, per_machine)
    reduce, gather = (sent / link for sent in _sharding_bytes(layout, work, trained, whole))
    beside = {"reduce": reduce, "gather": gather, "data": waiting.get("data", 0.0)}
    bubble = layout.bubble(passes)
    idle = (products + memory + inner) * bubble / (1 - bubble)
    owned = trained / (layout.sharding if layout.sharding_stage else 1)
    update = owned * 2 * (work.state_bytes + work.weight_bytes) / hardware.memory_bandwidth
    one_way = owned * work.state_bytes / hardware.host if work.offload else 0.0
    return Seconds(
        products,
        memory,
        idle,
        sum(waiting.values()),
        update + 2 * one_way,
        hidden=_hidden(layout, work, products + memory, beside),
        # Up and down at once, and the updates beside both.
        hidden_copies=one_way + min(one_way, update),
        overlap=work.overlap,
    )


def _score_bytes(shape: LlamaConfig, layout: Layout, work: Workload) -> float:
    return local_tokens(layout, work) * 4 * shape.vocab_size / layout.tensor
