"""Networks for generation on CPU: weights laid out for the native kernels, layers fused.

Packing replaces each decoder layer of a ``LlamaForCausalLM`` by one whose linears lie as the
kernels read them, and frees the originals, layer by layer. Steps of packed tokens then run all
layers in one kernel (:func:`external_ops.decoder.decoder_native`); whole rows run them op by op.

T packed tokens, E hidden, D head dimension, O outputs, I inputs.
"""

import logging
from collections.abc import Sequence
from typing import Any

import paddle
from paddle import Tensor, nn
from tqdm import tqdm

from common.devices import CPU
from common.errors import UserError
from external_ops import devices
from external_ops.decoder import DecoderLayer, DecoderWeights
from external_ops.linear import PackedWeight, pack_weight
from llm.llama.files.dtypes import dtype_name
from llm.llama.layers import SAME_INPUT, is_plain
from llm.llama.modeling import LlamaDecoderLayer, LlamaForCausalLM, RMSNorm
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.linear import QuantizedLinear, round_to_nearest
from llm.llama.rope import inverse_frequencies
from llm.llama.seams import Attend, PackedDecoder

_log = logging.getLogger(__name__)

HEAD_TYPES = ("model", "int8")


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


class PackedDecoderLayer(nn.Layer):
    """Stands in the place of a ``LlamaDecoderLayer``.

    Args:
        layer: the one that it is made from.
        round_activations: see :func:`pack`.
    """

    def __init__(self, layer: LlamaDecoderLayer, round_activations: bool) -> None:
        super().__init__()
        attention = layer.self_attn
        self.head_dim, self.index = attention.head_dim, attention.index
        self.rotary = attention.rotary
        self.input_layernorm = _wide_norm(layer.input_layernorm)
        self.post_attention_layernorm = _wide_norm(layer.post_attention_layernorm)
        linears = [_pack_linears(several, round_activations) for several in _joined(layer)]
        self.qkv, self.o, self.gate_up, self.down = linears

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, *prefix: Tensor
    ) -> Tensor:
        """Map float32 ``[..., E]`` to ``[..., E]``, op by op."""
        qkv = self.qkv(self.input_layernorm(x))
        qkv = qkv.reshape([0] * (x.ndim - 1) + [-1, self.head_dim])
        heads = self.o.weight.inputs // self.head_dim
        groups = (qkv.shape[-2] - heads) // 2
        q, k, v = paddle.split(qkv, [heads, groups, groups], axis=-2)
        q, k = self.rotary(q, cos, sin), self.rotary(k, cos, sin)
        x = x + self.o(attend(self.index, q, k, v, *prefix).flatten(-2))
        gate, up = self.gate_up(self.post_attention_layernorm(x)).chunk(2, axis=-1)
        return x + self.down(nn.functional.silu(gate) * up)

    def fused(self) -> DecoderLayer:
        """Return the layer as the fused kernel takes it."""
        linears = (self.qkv, self.o, self.gate_up, self.down)
        return DecoderLayer(
            self.input_layernorm.weight,
            self.post_attention_layernorm.weight,
            *(linear.weight for linear in linears),
            biases=tuple(linear.bias for linear in linears),
        )


class FusedDecoder:
    """All decoder layers of a packed network in one kernel.

    Args:
        model: a network that :func:`pack` is done with.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._config = model.config
        self._kernel = model.ops.decoder
        self._layers: Sequence[PackedDecoderLayer] = list(model.model.layers)
        self._constants: dict[int, tuple[DecoderWeights, Tensor]] = {}

    @paddle.jit.not_to_static  # traced, not translated: there is nothing in it to translate
    def __call__(
        self,
        x_TE: Tensor,
        sequence_T: Tensor,
        position_T: Tensor,
        block_table_NM: Tensor,
        caches: list[Tensor],
        length: int,
    ) -> Tensor:
        """Return float32 hidden states ``[T, E]`` before the final norm.

        Args:
            x_TE: embedded tokens.
            sequence_T: as of ``LlamaForCausalLM.forward_paged``, like the rest.
            position_T: likewise.
            block_table_NM: likewise.
            caches: likewise.
            length: the context that dynamic rotary scaling assumes.
        """
        weights, frequency = self._for_length(length)
        return self._kernel(
            x_TE.astype("float32"),
            weights,
            caches,
            block_table_NM,
            sequence_T,
            position_T,
            frequency,
            heads=self._config.num_attention_heads,
            eps=self._config.rms_norm_eps,
        )

    def _for_length(self, length: int) -> tuple[DecoderWeights, Tensor]:
        """Return weights and rotary frequencies; gathering them anew would cost 1 ms a step."""
        if length in self._constants and paddle.in_dynamic_mode():
            return self._constants[length]
        weights = DecoderWeights([layer.fused() for layer in self._layers])
        made = weights, paddle.to_tensor(inverse_frequencies(self._config, length))
        if paddle.in_dynamic_mode():  # what a program traces belongs to the program
            self._constants = {length: made}
        return made


def pack_where_possible(model: LlamaForCausalLM, **options: Any) -> bool:
    """Pack a network for generation, or leave it as it is where that cannot be.

    Args:
        model: any network.
        options: those of :func:`pack`.

    Returns:
        Whether it is packed.

    Raises:
        UserError: options or weights that only packed networks can have.
    """
    reason = why_not(model)
    if reason is None:
        pack(model, **options)
        return True
    for name, value in options.items():
        if value not in (False, "model"):
            raise UserError(f"{name}={value} needs packed layers, which cannot be: {reason}")
    bf16 = model.model.embed_tokens.weight.dtype == paddle.bfloat16
    if bf16 and devices.current() == CPU:
        raise UserError(
            f"bfloat16 on CPU needs packed layers, which cannot be: {reason}; or use float32"
        )
    _log.info("decoder layers run op by op: %s", reason)
    return False


def why_not(model: LlamaForCausalLM) -> str | None:
    """Return why a network cannot be packed, or None where it can."""
    if model.ops.decoder is None:
        return "there is no native kernel for decoder layers (not built, or --ops reference)"
    if model.seams.shard is not None or model.seams.stage is not None:
        return "processes share it"
    for number in model.model.layers.numbers:
        layer = model.model.layers[number]
        for linears in _joined(layer):
            for one in linears:
                if not isinstance(one, QuantizedLinear) and not is_plain(one):
                    return f"layer {number} has a {type(one).__name__}; merge the adapter first"
            if len({_traits(one) for one in linears}) > 1:
                return f"layer {number} has linears of different types side by side"
    return None


def pack(
    model: LlamaForCausalLM, *, round_activations: bool = False, head_type: str = "model"
) -> LlamaForCausalLM:
    """Lay a network out for generation, in place; it cannot be trained or saved afterwards.

    Float32 and bfloat16 weights stay what they are, integers of a quantized network too. Everything
    between the products is float32.

    Args:
        model: a network that :func:`why_not` has nothing against.
        round_activations: integer weights multiply inputs that are rounded to 8 bits for each
            token, also where the network's description (``W8``, ``W4``) does not ask for it:
            faster, and less exact.
        head_type: ``int8`` rounds a floating-point output matrix to 8 bits with a scale for each
            token of the vocabulary, its inputs too: faster, and less exact. ``model`` leaves it.

    Returns:
        The same network.

    Raises:
        UserError: a network that cannot be packed, or an unknown ``head_type``.
    """
    reason = why_not(model)
    if reason is not None:
        raise UserError(f"the model's layers cannot be packed: {reason}")
    if head_type not in HEAD_TYPES:
        raise UserError(f"head_type={head_type!r} is not one of {', '.join(HEAD_TYPES)}")
    if round_activations and not _has_integers_alone(model):
        raise UserError(
            "round_activations would have no effect: it is for models whose weights are integers "
            "and whose inputs are not (quant_type W8 or W4); drop it"
        )
    model.eval()
    layers = model.model.layers
    with paddle.no_grad():
        for number in tqdm(layers.numbers, desc="packing layers", disable=None, leave=False):
            packed = PackedDecoderLayer(layers[number], round_activations)
            packed.eval()
            layers.add_sublayer(str(number), packed)
        model.model.norm = _wide_norm(model.model.norm)
        model.lm_head = _pack_head(model, head_type, round_activations)
    model.seams.fused = FusedDecoder(model) if why_not_fused(model) is None else _op_by_op(model)
    return model


def _has_integers_alone(model: LlamaForCausalLM) -> bool:
    """Tell whether some linear multiplies integers with inputs that are not rounded."""
    return any(
        isinstance(layer, QuantizedLinear) and layer.config.activation_bits is None
        for layer in model.sublayers()
    )


def why_not_fused(model: LlamaForCausalLM) -> str | None:
    """Return why packed layers do not run in one kernel, or None where they do."""
    if model.config.rope_scaling.cosine_scale != 1:
        return "YaRN scales cosines and sines, which the kernel of whole layers does not"
    return None


def _op_by_op(model: LlamaForCausalLM) -> PackedDecoder:
    def decode(x_TE: Tensor, *others: Any) -> Tensor:
        return model.decode_step(x_TE.astype("float32"), *others)

    return decode


def _wide_norm(norm: RMSNorm) -> RMSNorm:
    """Return a norm that works in float32; those are a thousandth of the weights."""
    norm.weight = norm.create_parameter(
        norm.weight.shape,
        dtype="float32",
        default_initializer=nn.initializer.Assign(norm.weight.astype("float32")),
    )
    return norm


def _joined(layer: LlamaDecoderLayer) -> tuple[tuple[nn.Layer, ...], ...]:
    """Return a layer's linears, those together that become one."""
    held = dict(layer.named_sublayers())
    return tuple(tuple(held[name] for name in names) for names in SAME_INPUT)


def _traits(linear: nn.Layer) -> tuple[Any, ...]:
    """Return what linears that become one have to share."""
    described = getattr(linear, "config", None)
    return type(linear), linear.weight.dtype, linear.bias is None, described


def _kind(linear: nn.Layer, round_activations: bool) -> str:
    """Return the kind of kernel that computes what a linear computes."""
    if isinstance(linear, QuantizedLinear):
        rounds = round_activations or linear.config.activation_bits is not None
        return f"int{linear.bits}" + ("" if rounds else "_weight_only")
    return dtype_name(linear.weight)


def _pack_linears(linears: Sequence[nn.Layer], round_activations: bool) -> PackedLinear:
    """Return one linear with the outputs of several, one after the other, and free theirs."""
    kind = _kind(linears[0], round_activations)
    if isinstance(linears[0], QuantizedLinear):
        integers = paddle.concat([one.weight for one in linears])
        packed = pack_weight(integers, kind, paddle.concat([one.weight_scale for one in linears]))
    else:
        wide = [one.weight.astype("float32").T for one in linears]
        packed = pack_weight(paddle.concat(wide), kind)
    bias = None
    if linears[0].bias is not None:
        bias = paddle.concat([one.bias.astype("float32") for one in linears])
    return PackedLinear(packed, bias)


def _pack_head(model: LlamaForCausalLM, head_type: str, round_activations: bool) -> PackedLinear:
    """Return the output matrix; of tied embeddings, a copy of them."""
    head = model.lm_head
    if isinstance(head, QuantizedLinear) or (head is not None and head_type == "model"):
        return _pack_linears((head,), round_activations)
    embedding = model.model.embed_tokens.weight
    weight_VE = (embedding if head is None else head.weight.T).astype("float32")
    if head_type == "model":
        return PackedLinear(pack_weight(weight_VE, dtype_name(embedding)))
    integers, scale = round_to_nearest(weight_VE, QuantConfig(8), "the output matrix")
    packed = pack_weight(paddle.to_tensor(integers), "int8", paddle.to_tensor(scale))
    return PackedLinear(packed)
