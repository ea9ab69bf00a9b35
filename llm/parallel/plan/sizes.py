"""How many weights a pipeline stage holds on one tensor parallel rank."""

import heapq
from dataclasses import dataclass
from functools import lru_cache

from llm.llama.config import LlamaConfig
from llm.parallel.layout import Layout, Stage

_ROW = (3, 6)  # o_proj and down_proj are split along their inputs


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
    # Whole tensors go to ranks, the largest first, each to whom has the least, as in
    # llm.parallel.sharding.
    load = [0] * ranks
    for size in sorted(sizes.trained, reverse=True):
        heapq.heapreplace(load, load[0] + size)
    return max(load)


def linears(shape: LlamaConfig) -> list[tuple[int, int]]:
    """Return inputs and outputs of a layer's matrices, in the order q, k, v, o, gate, up, down."""
    q = shape.num_attention_heads * shape.head_dim
    kv = shape.num_key_value_heads * shape.head_dim
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    attention = [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden)]
    return [*attention, (hidden, ffn), (hidden, ffn), (ffn, hidden)]


def stage_sizes(shape: LlamaConfig, layout: Layout, stage: Stage, lora_rank: int = 0) -> Sizes:
    """Count what one rank of a stage holds.

    Norms, and the half of an adapter that is not split, are on every tensor parallel rank. Biases,
    which few Llamas have, are not counted.
    """
    tensor, hidden = layout.tensor, shape.hidden_size
    matrices = [size_in * size_out // tensor for size_in, size_out in linears(shape)]
    adapter: list[int] = []
    for index, (size_in, size_out) in enumerate(linears(shape)):
        row = index in _ROW
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
