"""Linear and embedding whose weights lie as the native kernels read them; for inference on CPUs.

V vocabulary, E hidden, I inputs, O outputs.
"""

from collections.abc import Callable

import paddle
from paddle import Tensor, nn

from external_ops.cross_entropy import VocabularyShard
from external_ops.linear import PackedWeight


class PackedLinear(nn.Layer):
    """A linear whose weight lies as the native kernels read it; for inference.

    Args:
        weight: from :func:`external_ops.linear.pack_weight`.
        bias: ``[O]`` in float32, or None.
    """

    plain_weight = None  # its weight is in another layout

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias: Tensor | None
        if bias is None:
            self.bias = None
        else:
            self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., I]`` to float32 ``[..., O]``."""
        return self.weight(x, self.bias)


class SummedLinear(PackedLinear):
    """A linear whose inputs processes share: each multiplies its own.

    Args:
        weight: this process's inputs.
        bias: ``[O]`` in float32, or None; of the sum.
        total: sums over the processes.
    """

    def __init__(
        self, weight: PackedWeight, bias: Tensor | None, total: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(weight, bias)
        self._total = total

    def forward(self, x: Tensor) -> Tensor:
        """Map this process's ``[..., I]`` to float32 ``[..., O]`` of all."""
        out = self._total(self.weight(x))
        return out if self.bias is None else out + self.bias


class PackedEmbedding(nn.Layer):
    """An embedding of packed numbers: those of a tied network's output matrix, which lie once.

    Args:
        matrix: V outputs, E inputs; a tied output matrix, which stays the network's, or its own.
        type_name: of the network, see ``llm.llama.layers.EmbeddingLike``.
        own: the matrix is a part of this layer.
    """

    plain_weight = None

    def __init__(self, matrix: PackedLinear, type_name: str, *, own: bool = False) -> None:
        super().__init__()
        self._matrix = (matrix,)  # in a tuple, which keeps it from being a sublayer
        self.type_name = type_name
        if own:
            self.own = matrix

    @property
    def matrix(self) -> PackedLinear:
        """The matrix whose outputs are the tokens."""
        return self._matrix[0]

    def scores(self, hidden: Tensor) -> Tensor:
        """See ``llm.llama.layers.EmbeddingLike``."""
        out: Tensor = self.matrix(hidden)
        return out

    def lookup(self, ids_T: Tensor) -> Tensor:
        """Return float32 ``[T, E]``."""
        return self.matrix.weight.rows(ids_T)

    def forward(self, ids: Tensor) -> Tensor:
        """Return float32 ``[..., E]``."""
        return self.lookup(ids)


class SharedEmbedding(PackedEmbedding):
    """A packed embedding whose tokens processes share.

    Args:
        matrix: of this process's tokens.
        type_name: see :class:`PackedEmbedding`.
        shard: which tokens those are.
    """

    def __init__(self, matrix: PackedLinear, type_name: str, shard: VocabularyShard) -> None:
        super().__init__(matrix, type_name)
        self._shard = shard

    def lookup(self, ids_T: Tensor) -> Tensor:
        """Return float32 ``[T, E]`` of the tokens of all processes."""
        local = ids_T - self._shard.first
        own = paddle.logical_and(local >= 0, local < self.matrix.weight.outputs)
        rows = super().lookup(paddle.where(own, local, paddle.zeros_like(local)))
        return self._shard.total(paddle.where(own.unsqueeze(-1), rows, paddle.zeros_like(rows)))
