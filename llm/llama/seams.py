"""Where others reach into the network: all of it in one object, which the network asks.

The network is written for one process that holds everything. What runs it differently fills a field
here, and nothing else of the network is set from outside; what replaces a linear or the embedding
offers what ``llm.llama.layers`` declares.

B batch, S sequence, K prefix and sequence, T packed tokens, H query heads, G key/value heads,
D head dimension, E hidden, P prefix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from paddle import Tensor, nn

from external_ops.cross_entropy import VocabularyShard
from external_ops.low_rank import LowRankStep

# Keys and values of each layer, [1, P, G, D].
Prefix = list[tuple[Tensor, Tensor]]
Attend = Callable[..., Tensor]  # (layer, q, k, v, *keys and values of the layer's prefix)


class Stage(Protocol):
    """What a part of a pipeline holds, such as ``llm.parallel.layout.Stage``."""

    @property
    def layers(self) -> Sequence[range]:
        """Numbers of the decoder layers, one range for each chunk that it runs in turn."""

    @property
    def first(self) -> bool:
        """Whether it embeds tokens."""

    @property
    def last(self) -> bool:
        """Whether it normalises and scores."""


class PrefixSource(Protocol):
    """Keys and values before every sequence."""

    length: int  # P

    def __call__(self) -> Prefix:
        """Return those of all layers, with the heads of this process, differentiable."""


class RowAttention(Protocol):
    """Causal attention over whole rows."""

    def __call__(
        self, q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, segments_BS: Tensor | None, /
    ) -> Tensor:
        """Return ``[B, S, H, D]``; every token sees the K - S keys of the prefix."""


@dataclass(frozen=True)
class CacheLayout:
    """How the blocks of the cache lie, which depends on who reads them.

    Args:
        heads_first: blocks are ``[G, block, D]`` instead of ``[block, G, D]``.
        block_sizes: that the reader takes, the best one first; empty where it takes any.
        own_type: numbers have the type of the network's, or there is no such reader.
    """

    heads_first: bool = False
    block_sizes: tuple[int, ...] = ()
    own_type: bool = False

    def filled(self, blocks: Tensor) -> Tensor:
        """Return ``[blocks, block, G, D]`` as it lies."""
        return blocks.transpose([0, 2, 1, 3]) if self.heads_first else blocks


class PackedDecoder(Protocol):
    """All decoder layers of a packed step at once.

    ``layout`` is of the cache that it reads and writes; ``rows_too`` says that whole rows run as
    fast, layer by layer, as steps do; ``adds_low_rank`` that it adds :attr:`Seams.low_rank` to its
    linears, which otherwise are called and add it themselves.
    """

    layout: CacheLayout
    rows_too: bool
    adds_low_rank: bool

    def prepare(
        self,
        sequence_T: NDArray[np.int32],
        position_T: NDArray[np.int32],
        block_table_NM: NDArray[np.int32],
        block_size: int,
    ) -> None:
        """See the next step's tokens while they are on the host; calls need not be prepared."""

    def __call__(
        self,
        x_TE: Tensor,
        sequence_T: Tensor,
        position_T: Tensor,
        block_table_NM: Tensor,
        caches: list[Tensor],
        length: int,
        /,
    ) -> Tensor:
        """Return ``[T, E]`` before the final norm; extends the caches in place."""


class Run(Protocol):
    """Calls a layer of the network."""

    def __call__(self, layer: nn.Layer, x: Tensor, /, *others: Any) -> Tensor:
        """Return ``layer(x, *others)``."""


def call(layer: nn.Layer, x: Tensor, /, *others: Any) -> Tensor:
    """Run a layer as it is."""
    out: Tensor = layer(x, *others)
    return out


@dataclass
class Seams:
    """What others have put into one network; its parts share the object.

    The defaults are a whole network in one process.
    """

    attention: RowAttention
    """The op's kernel. ``llm.train.processes`` wraps it for context parallelism, before the first
    step: each process then has a part of every row, and reaches the others' keys."""

    stage: Stage | None = None
    """What this part of a pipeline holds, given to the constructor; parameters keep the names that
    they have in the whole network. None: it embeds, holds all layers and scores."""

    shard: VocabularyShard | None = None
    """Which tokens of the vocabulary the output matrix scores where tensor parallel ranks share
    it, and how their statistics come together. ``llm.llama.build``, when it splits the network."""

    own_heads: Callable[[Tensor], Tensor] | None = None
    """Takes this process's heads of a prefix's ``[…, G, D]``, which all tensor parallel ranks hold.
    ``llm.llama.build``, together with ``shard``."""

    prefix: PrefixSource | None = None
    """What all tokens see and stand behind. ``llm.llama.adapters.prefix``, which also makes it a
    sublayer, so that its parameters are the network's."""

    run_layer: Run = call
    """Calls each decoder layer. ``llm.llama.recompute`` runs some of them twice;
    ``llm.llama.quantization.calibration`` stops at each, and puts back what it found."""

    run_attention: Run = call
    """Calls the attention inside each decoder layer. ``llm.llama.recompute``, to recompute it
    alone."""

    fused: PackedDecoder | None = None
    """Runs the decoder layers of packed steps, in one kernel where there is one. Set by
    ``llm.llama.fused`` when it has laid out all layers; nothing trains or saves the network
    afterwards."""

    low_rank: LowRankStep | None = None
    """What the adapters of a packed step's requests add to the layers' linears, while it runs.
    ``llm.llama.adapters.per_request``, before each step."""
