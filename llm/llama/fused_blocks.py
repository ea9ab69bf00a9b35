"""Networks for generation on GPUs: joined linears around Paddle's kernels for a paged cache.

Steps of packed tokens run :func:`external_ops.block_decoder.decoder_blocks`. Integer weights go
through Paddle's ``weight_only_linear`` where it has a form for them, and are widened elsewhere.

T packed tokens, N sequences, M blocks of the longest one, E hidden, O outputs, I inputs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor, nn

from external_ops import weight_only
from external_ops.block_decoder import (
    BLOCK_SIZES,
    DTYPES,
    HEAD_DIMS,
    BlockLayer,
    StepPlan,
    decoder_blocks,
    plan_step,
    rope_table,
)
from llm.llama.files.dtypes import dtype_name
from llm.llama.fused_layer import FusedLayer, joined
from llm.llama.modeling import LlamaDecoderLayer, LlamaForCausalLM
from llm.llama.quantization.linear import QuantizedLinear
from llm.llama.rope import inverse_frequencies
from llm.llama.seams import CacheLayout

# Positions of the smallest table of rotary angles; it doubles when a step needs more.
_FIRST_POSITIONS = 1024


def architecture() -> int:
    """Return the compute capability of the current GPU, 90 for 9.0."""
    major, minor = paddle.device.cuda.get_device_capability()
    return int(major) * 10 + int(minor)


def why_not(model: LlamaForCausalLM, traced: bool) -> str:
    """Return why Paddle's kernels do not run a network, or an empty string.

    Args:
        model: a whole network, or what a process of tensor parallelism holds.
        traced: steps will be traced for an exported program.
    """
    if traced:
        return (
            "block_multihead_attention wants whole prompts, later parts and single tokens told "
            "apart on the host, and an exported program is given a step on the device; "
            "predict_generation.py and server.py run the kernel from --model_name_or_path"
        )
    dtype = model.model.embed_tokens.type_name
    if dtype not in DTYPES:
        return f"block_multihead_attention is for {' and '.join(DTYPES)}, not {dtype}"
    if model.config.head_dim not in HEAD_DIMS:
        known = ", ".join(map(str, HEAD_DIMS))
        return f"block_multihead_attention has heads of {known}, not of {model.config.head_dim}"
    return ""


class JoinedLinear(nn.Layer):
    """A linear with the outputs of several; for inference.

    Args:
        weight: ``[I, O]``.
        bias: ``[O]``, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self.bias = bias

    @property
    def plain_weight(self) -> Tensor | None:
        """See ``llm.llama.layers.LinearLike``."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., I]`` to ``[..., O]``."""
        return nn.functional.linear(x, self.weight, self.bias)


class WeightOnlyLinear(nn.Layer):
    """A linear with integer weights as Paddle's kernel reads them; for inference.

    Args:
        weight: from :func:`external_ops.weight_only.pack`.
        bias: ``[O]``, or None.
    """

    plain_weight = None  # its weight is in another layout

    def __init__(self, weight: weight_only.WeightOnly, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., I]`` to ``[..., O]``."""
        return weight_only.multiply(x, self.weight, self.bias)


def _join_biases(linears: Sequence[nn.Layer]) -> Tensor | None:
    return None if linears[0].bias is None else paddle.concat([one.bias for one in linears])


def _join_quantized(linears: Sequence[QuantizedLinear], dtype: str) -> nn.Layer:
    first, outputs = linears[0], sum(one.out_features for one in linears)
    integers = np.concatenate([one.integers() for one in linears])
    scale = np.concatenate([one.weight_scale.numpy() for one in linears])
    here = architecture()
    rounds = first.config.activation_bits is not None
    if rounds or weight_only.why_not(outputs, first.in_features, scale.shape[1], here):
        whole = QuantizedLinear(first.in_features, outputs, first.config, _join_biases(linears))
        whole.fill(integers, scale)
        return whole
    options: dict[str, Any] = {"bits": first.bits, "dtype": dtype, "architecture": here}
    return WeightOnlyLinear(weight_only.pack(integers, scale, **options), _join_biases(linears))


def _join(linears: Sequence[nn.Layer], dtype: str) -> nn.Layer:
    """Return one linear with the outputs of several, one after the other."""
    if isinstance(linears[0], QuantizedLinear):
        return _join_quantized(linears, dtype)
    if len(linears) == 1:
        return linears[0]  # that of a process of tensor parallelism sums over them
    return JoinedLinear(
        paddle.concat([one.weight for one in linears], axis=1), _join_biases(linears)
    )


def join_layer(layer: LlamaDecoderLayer, _: bool) -> FusedLayer:
    """Return a layer with joined linears."""
    norms = layer.input_layernorm, layer.post_attention_layernorm
    dtype = dtype_name(norms[0].weight)
    return FusedLayer(layer, *norms, *(_join(linears, dtype) for linears in joined(layer)))


class BlockDecoder:
    """All decoder layers of a joined network; ``llm.llama.seams.PackedDecoder``.

    Args:
        model: a network whose layers :func:`join_layer` has made.
    """

    layout = CacheLayout(heads_first=True, block_sizes=BLOCK_SIZES, own_type=True)
    rows_too = True
    adds_low_rank = False

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._config = model.config
        shard = model.seams.shard
        self._groups = model.config.num_key_value_heads // (1 if shard is None else shard.parts)
        self._layers = [_for_kernel(layer) for layer in model.model.layers]
        self._architecture = architecture()
        self._plan: StepPlan | None = None
        self._rope: tuple[tuple[int, int], Tensor] | None = None
        self._positions = _FIRST_POSITIONS

    def prepare(
        self,
        sequence_T: NDArray[np.int32],
        position_T: NDArray[np.int32],
        block_table_NM: NDArray[np.int32],
        block_size: int,
    ) -> None:
        """See ``llm.llama.seams.PackedDecoder``."""
        while self._positions <= position_T.max():
            self._positions *= 2
        self._plan = plan_step(
            sequence_T,
            position_T,
            block_table_NM,
            heads=self._groups,
            block=block_size,
            positions=self._positions,
            architecture=self._architecture,
        )

    def __call__(
        self,
        x_TE: Tensor,
        sequence_T: Tensor,
        position_T: Tensor,
        block_table_NM: Tensor,
        caches: list[Tensor],
        length: int,
    ) -> Tensor:
        """Return hidden states ``[T, E]`` before the final norm.

        Args:
            x_TE: embedded tokens.
            sequence_T: as of ``LlamaForCausalLM.forward_paged``, like the rest; read from the
                device where :meth:`prepare` has not seen them.
            position_T: likewise.
            block_table_NM: likewise.
            caches: likewise, ``[blocks, G, block, D]``.
            length: the context that dynamic rotary scaling assumes.
        """
        if self._plan is None:
            places = (sequence_T, position_T, block_table_NM)
            self.prepare(*(one.numpy() for one in places), caches[0].shape[2])
        assert self._plan is not None
        plan, self._plan = self._plan, None
        rope = self._angles(plan.positions, length)
        return decoder_blocks(x_TE, self._layers, caches, plan, rope, eps=self._config.rms_norm_eps)

    def _angles(self, positions: int, length: int) -> Tensor:
        known = positions, length
        if self._rope is None or self._rope[0] != known:
            frequency = inverse_frequencies(self._config, length)
            scale = self._config.rope_scaling.cosine_scale
            self._rope = known, rope_table(frequency, positions, scale)
        return self._rope[1]


def _for_kernel(layer: FusedLayer) -> BlockLayer:
    norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    return BlockLayer(*norms, layer.qkv, layer.o, layer.gate_up, layer.down)
