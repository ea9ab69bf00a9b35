"""What one rank of a pipeline stage holds of a network's weights, and which of them it trains."""

from dataclasses import dataclass
from functools import cache, lru_cache

from llm.llama.config import LlamaConfig
from llm.llama.placement import style
from llm.parallel.layout import Layout, Stage, largest_first
from llm.planner.workload import Workload


@dataclass(frozen=True)
class Sizes:
    """Weights on one rank of a stage, before sharding.

    Args:
        layers: decoder layers of the stage.
        layer: weights of each tensor of one layer.
        adapter: weights of each LoRA matrix of one layer.
        prefix: weights of each tensor of a tuned prefix.
        embedding: weights of the embedding, where the stage looks tokens up or shares it.
        head: weights of the output matrix where it is one of its own.
        norm: weights of the last norm.
        scored: weights of the matrix that scores the vocabulary, on a last stage.
    """

    layers: int
    layer: tuple[int, ...]
    adapter: tuple[int, ...]
    prefix: tuple[int, ...]
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
        layers = self.layers * (sum(self.layer) + sum(self.adapter))
        return layers + self.outer + sum(self.prefix)

    @property
    def frozen(self) -> bool:
        """Whether the network's own weights have no gradients."""
        return bool(self.adapter or self.prefix)

    @property
    def trained(self) -> list[int]:
        """Weights of each tensor that is updated."""
        if self.frozen:
            return [*list(self.adapter) * self.layers, *self.prefix]
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
def by_inputs(linear: str) -> bool:
    """Say whether tensor parallel ranks split a linear along its inputs."""
    return style(f"{linear}.weight") == "row"


def _prefix(shape: LlamaConfig, work: Workload) -> tuple[int, ...]:
    """Return the tensors that a prefix is trained as (``llm.llama.adapters.prefix``)."""
    if not work.prefix:
        return ()
    channels = shape.num_key_value_heads * shape.head_dim
    width = 2 * shape.num_hidden_layers * channels
    if not work.prefix_projection:
        return (work.prefix * width,)
    hidden = work.prefix_hidden or channels
    return (work.prefix * channels, channels * hidden, hidden, hidden * width, width)


def stage_sizes(shape: LlamaConfig, layout: Layout, stage: Stage, work: Workload) -> Sizes:
    """Count what one rank of a stage holds.

    Norms, prefixes, and the half of an adapter that is not split, are on every tensor parallel
    rank. Biases, which few Llamas have, are not counted.
    """
    tensor, hidden, rank = layout.tensor, shape.hidden_size, work.lora_rank
    matrices = [size_in * size_out // tensor for size_in, size_out in shape.linears.values()]
    adapter: list[int] = []
    for name, (size_in, size_out) in shape.linears.items():
        if work.adapts(name):
            row = by_inputs(name)
            adapter.append(rank * (size_in // tensor if row else size_in))
            adapter.append(rank * (size_out if row else size_out // tensor))
    vocabulary = shape.vocab_size * hidden // tensor
    tied = shape.tie_word_embeddings
    return Sizes(
        layers=sum(len(chunk) for chunk in stage.layers),
        layer=(*matrices, hidden, hidden),
        adapter=tuple(adapter),
        prefix=_prefix(shape, work),
        embedding=vocabulary if stage.first or (tied and stage.last) else 0,
        head=vocabulary if stage.last and not tied else 0,
        norm=hidden if stage.last else 0,
        scored=vocabulary if stage.last else 0,
    )
