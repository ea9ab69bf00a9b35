"""Whole decoder layers over packed tokens and a paged cache as one kernel, for generation.

T packed tokens of N sequences, M cache blocks each, E hidden, D head dimension; tokens and cache
are those of :mod:`external_ops.paged_attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import paddle
from paddle import Tensor

from external_ops import native
from external_ops.linear import KINDS, PackedWeight


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

    @property
    def linears(self) -> tuple[PackedWeight, ...]:
        """The four products in their order."""
        return self.qkv, self.o, self.gate_up, self.down

    def tensors(self) -> list[Tensor]:
        """Return everything in the order in which the kernel reads it."""
        found = [self.input_norm, self.post_norm]
        for weight, bias in zip(self.linears, self.biases, strict=True):
            found += [one for one in (weight.data, weight.scale, bias) if one is not None]
        return found


@paddle.jit.not_to_static  # traced, not translated: there is nothing in it for a program
def decoder_native(
    x_TE: Tensor,
    layers: Sequence[DecoderLayer],
    caches: Sequence[Tensor],
    block_table_NM: Tensor,
    sequence_T: Tensor,
    position_T: Tensor,
    frequency: Tensor,
    *,
    heads: int,
    eps: float,
) -> Tensor:
    """Run decoder layers in one parallel region.

    Args:
        x_TE: float32 hidden states.
        layers: in their order.
        caches: keys and values of each layer in turn, float32 or bfloat16; written in place.
        block_table_NM: int32.
        sequence_T: int32.
        position_T: int32.
        frequency: float32 ``[D / 2]``, rotary angles of position 1.
        heads: query heads.
        eps: of the norms.

    Returns:
        float32 ``[T, E]``, before the final norm.

    Raises:
        ValueError: shapes or types that do not fit, or tokens outside the block table.
    """
    weights = [tensor for layer in layers for tensor in layer.tensors()]
    kinds = [KINDS.index(one.kind) for layer in layers for one in layer.linears]
    biases = [int(bias is not None) for layer in layers for bias in layer.biases]
    inputs = (x_TE, frequency, block_table_NM, sequence_T, position_T, weights, list(caches))
    ffn = layers[0].down.inputs
    return native.run("decoder", *inputs, kinds, biases, heads, ffn, eps)[0]
