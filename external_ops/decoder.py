"""Whole decoder layers over packed tokens and a paged cache as one kernel, for generation.

T packed tokens of N sequences, M cache blocks each, E hidden, D head dimension; tokens and cache
are those of :mod:`external_ops.paged_attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from paddle import Tensor

from external_ops import native
from external_ops.linear import PackedWeight
from external_ops.low_rank import LowRankStep


@dataclass(frozen=True)
class DecoderLayer:
    """What one layer multiplies with; all norms and biases are float32.

    Args:
        input_norm: ``[E]``, weight of the norm before attention.
        post_norm: ``[E]``, weight of the norm before the feed-forward.
        qkv: outputs are the query heads, then those of keys, then those of values.
        o: of the attention's output.
        gate_up: outputs are those of the gate, then those of its factor.
        down: of the feed-forward's output.
        biases: of the four, None where a linear has none.
    """

    input_norm: Tensor
    post_norm: Tensor
    qkv: PackedWeight
    o: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight
    biases: tuple[Tensor | None, ...] = (None,) * 4


class DecoderWeights:
    """The weights of layers as the kernel takes them.

    Args:
        layers: in their order.
    """

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        self.tensors: list[Tensor] = []
        self.kinds: list[int] = []
        self.biases: list[int] = []
        self.ffn = layers[0].down.inputs
        for layer in layers:
            self.tensors += [layer.input_norm, layer.post_norm]
            linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
            for weight, bias in zip(linears, layer.biases, strict=True):
                found = (weight.data, weight.scale, bias)
                self.tensors += [one for one in found if one is not None]
                self.kinds.append(weight.number)
                self.biases.append(int(bias is not None))


def decoder_native(
    x_TE: Tensor,
    weights: DecoderWeights,
    caches: list[Tensor],
    block_table_NM: Tensor,
    sequence_T: Tensor,
    position_T: Tensor,
    frequency: Tensor,
    *,
    heads: int,
    eps: float,
    low_rank: LowRankStep | None = None,
) -> Tensor:
    """Run decoder layers in one parallel region.

    Args:
        x_TE: float32 hidden states.
        weights: of all layers.
        caches: keys and values of each layer in turn, float32, bfloat16 or int8 (see
            :mod:`external_ops.paged_attention`); written in place.
        block_table_NM: int32.
        sequence_T: int32.
        position_T: int32.
        frequency: float32 ``[D / 2]``, rotary angles of position 1.
        heads: query heads.
        eps: of the norms.
        low_rank: what adapters add to the linears of some tokens; others keep their bits.

    Returns:
        float32 ``[T, E]``, before the final norm.

    Raises:
        ValueError: shapes or types that do not fit, or tokens outside the block table.
    """
    inputs = (x_TE, frequency, block_table_NM, sequence_T, position_T, weights.tensors, caches)
    attributes = (weights.kinds, weights.biases, heads, weights.ffn, eps)
    if low_rank is None:
        return native.run("decoder", *inputs, *attributes)[0]
    return native.run("adapted_decoder", *inputs, *low_rank.tensors, *attributes)[0]
