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
    return heads * 4  # the logarithm of each row's sum


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
    entry = hidden  # input of the column matrices; gathered where the sequence is split
    weights = _attention_weights(shape, layout, work)
    attention = q + 2 * kv + q  # queries, keys, values; the output, which o_proj multiplies
    mlp = 4 * ffn  # gate, its silu, up, their product
    adapters = sum(_adapter_bytes(shape, layout, work))
    full = 2 * (stream + norm + entry) + attention + weights + mlp + adapters
    kept = {
        "none": full,
        "core_attn": full - weights,
        "full_attn": full - weights - attention,
        "full": 0.0 if work.recompute_offload else stream,
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
    return [work.lora_rank * unit + (extra if work.lora_dropout else 0) for extra in dropped]


@dataclass(frozen=True)
class HeadBytes:
    """Bytes of the last norm, the head and the loss for one micro-batch on one rank.

    Args:
        kept: between the passes.
        forward: on top of it, at the end of the forward pass.
        backward: on top of it, while the head goes backward, without its weights' gradient.
    """

    kept: float
    forward: float
    backward: float


def head_bytes(shape: LlamaConfig, layout: Layout, work: Workload) -> HeadBytes:
    """Return what scoring the vocabulary takes for one micro-batch."""
    tokens = local_tokens(layout, work)
    hidden = shape.hidden_size * work.activation_bytes
    scores = 4 * shape.vocab_size / layout.tensor  # float32 whatever the precision
    norm = 0 if work.fused_norm else hidden
    kept = 2 * hidden + norm
    if work.fused_head:
        return HeadBytes(kept * tokens, 0.0, hidden * tokens)
    # The loss keeps the softmax; while it is computed the scores are there too. Its gradient takes
    # the softmax's place, and in half precision is then copied into that type.
    copy = scores / 2 if work.half else 0
    return HeadBytes((kept + scores) * tokens, scores * tokens, (hidden + copy) * tokens)
