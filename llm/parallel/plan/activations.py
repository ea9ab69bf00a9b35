"""Bytes that the network keeps between its forward and its backward pass, operation by operation.

Counts are of ``llm/llama/modeling.py``: what each operation's gradient needs, with tensors that two
operations share counted once. B rows, S tokens, E hidden, F feed-forward, H heads, G key/value
heads, D head size, V vocabulary. The idea of the count is that of Korthikanti et al. 2022, section
4; their numbers are of GPT's layers.
"""

from dataclasses import dataclass

from llm.llama.config import LlamaConfig
from llm.parallel.layout import Layout
from llm.parallel.plan.sizes import linears
from llm.parallel.plan.workload import Workload

_TILE = 128  # rows of a tile in external_ops/tiled_attention.py
CHUNK_NUMBERS = 2**25  # scores of a chunk in external_ops/cross_entropy.py
KEPT_NUMBERS = 2**26  # scores that its native form keeps


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
    mlp = entry + (3 if work.native else 4) * ffn  # gate, its silu, up, their product
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
        (unit + 1) * size_in / (layout.tensor if index in (3, 6) else 1)
        for index, (size_in, _) in enumerate(linears(shape))
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
        chunk = min(tokens, max(1, CHUNK_NUMBERS // width))
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
