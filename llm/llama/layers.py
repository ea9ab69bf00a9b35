"""Layers that the network is built of, what may stand in their place, and how that comes about.

I inputs, O outputs, T tokens, V vocabulary, E hidden.
"""

from typing import Any, Protocol, runtime_checkable

import paddle
from paddle import Tensor, nn

# Linears of a decoder layer that read the same inputs, in the order in which data flows.
SAME_INPUT = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@runtime_checkable
class LinearLike(Protocol):
    """What stands where the network had a linear: adapted, split, quantized or packed.

    ``plain_weight`` is the ``[I, O]`` of a layer that multiplies by it, adds a bias if it has one,
    and does nothing else; None of any other. Kernels read it instead of calling the layer.
    """

    @property
    def plain_weight(self) -> Tensor | None:
        """The weight, if that is all there is."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``[..., I]`` to ``[..., O]``."""


class EmbeddingLike(Protocol):
    """What stands where the network had an embedding: whole, split, quantized or packed.

    ``plain_weight`` is its ``[V, E]``, or this process's tokens of it; None where the numbers lie
    in another way.
    """

    @property
    def plain_weight(self) -> Tensor | None:
        """The weight, if that is all there is."""

    @property
    def type_name(self) -> str:
        """The type that the network was opened in, such as ``bfloat16``; its cache's too."""

    def scores(self, hidden: Tensor) -> Tensor:
        """Map ``[..., E]`` to ``[..., V]``: the output matrix of a tied network."""

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the rows of ids; trains."""

    def lookup(self, ids_T: Tensor) -> Tensor:
        """Return ``[T, E]`` of the few ids of a step; for inference."""


class Linear(nn.Linear):
    """A linear as the network is built with it."""

    @property
    def in_features(self) -> int:
        """I."""
        return int(self.weight.shape[0])

    @property
    def out_features(self) -> int:
        """O."""
        return int(self.weight.shape[1])

    @property
    def plain_weight(self) -> Tensor | None:
        """See :class:`LinearLike`."""
        return self.weight

    @classmethod
    def around(cls, weight: Tensor, bias: Tensor | None) -> "Linear":
        """Return a linear of parameters ``[I, O]`` and ``[O]`` that exist already."""
        linear = cls.__new__(cls)
        nn.Layer.__init__(linear)  # Linear's own would draw a second weight
        linear._dtype, linear._weight_attr, linear.name = weight.dtype, None, None
        linear.weight, linear.bias = weight, bias  # type: ignore[assignment]  # Paddle's may be None
        return linear


class Embedding(nn.Embedding):
    """An embedding as the network is built with it."""

    @property
    def plain_weight(self) -> Tensor | None:
        """See :class:`EmbeddingLike`."""
        return self.weight

    @property
    def type_name(self) -> str:
        """See :class:`EmbeddingLike`."""
        return str(self.weight.dtype).rsplit(".", 1)[-1]

    def scores(self, hidden: Tensor) -> Tensor:
        """See :class:`EmbeddingLike`."""
        product: Any = paddle.matmul
        out: Tensor = product(hidden, self.weight, transpose_y=True)
        return out

    @classmethod
    def around(cls, weight: Tensor) -> "Embedding":
        """Return an embedding of a parameter ``[V, E]`` that exists already."""
        embedding = cls(1, 1)  # its own weight of one number goes
        embedding.weight = weight
        return embedding

    def lookup(self, ids_T: Tensor) -> Tensor:
        """See :class:`EmbeddingLike`."""
        # Paddle's embedding starts threads for a few rows, which takes longer than its gather.
        return paddle.gather(self.weight, ids_T)


def is_plain(layer: nn.Layer | None) -> bool:
    """Say whether a layer multiplies by its ``weight``, adds a bias, and does nothing else."""
    return isinstance(layer, LinearLike) and layer.plain_weight is not None


def replace_layer(model: nn.Layer, name: str, layer: nn.Layer) -> None:
    """Put a layer in the place of the one of that name."""
    parent, _, attribute = name.rpartition(".")
    setattr(dict(model.named_sublayers(include_self=True))[parent], attribute, layer)


def name_parameters(model: nn.Layer) -> None:
    """Give every parameter the name by which the model lists it.

    Optimizer state is keyed by it; Paddle's own counters differ from run to run.
    """
    for name, parameter in model.named_parameters():
        parameter.name = name
