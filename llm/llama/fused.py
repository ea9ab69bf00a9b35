"""Networks for generation: linears of one input joined, weights laid out for kernels.

Packing replaces each decoder layer of a ``LlamaForCausalLM`` by one whose linears lie as the
kernels read them, and frees the originals, layer by layer. Steps of packed tokens then run all
layers in one kernel on CPUs (:func:`external_ops.decoder.decoder_native`) and in eight of Paddle's
operators a layer on GPUs (``llm.llama.fused_blocks``); whole rows run them op by op.

T packed tokens, E hidden, D head dimension, O outputs, I inputs.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import paddle
from paddle import Tensor, nn
from tqdm import tqdm

from common.devices import CPU
from common.errors import UserError
from external_ops import devices
from external_ops.cross_entropy import VocabularyShard
from external_ops.decoder import DecoderLayer, DecoderWeights
from external_ops.linear import pack_weight
from llm.llama import fused_blocks
from llm.llama.files.dtypes import dtype_name
from llm.llama.fused_layer import FusedLayer, joined
from llm.llama.layers import is_plain
from llm.llama.modeling import LlamaDecoderLayer, LlamaForCausalLM, RMSNorm
from llm.llama.packed_layers import (
    PackedEmbedding,
    PackedLinear,
    SharedEmbedding,
    SummedLinear,
)
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.embedding import QuantizedEmbedding
from llm.llama.quantization.linear import QuantizedLinear, round_to_nearest
from llm.llama.rope import inverse_frequencies
from llm.llama.seams import CacheLayout

_log = logging.getLogger(__name__)

HEAD_TYPES = ("model", "int8")
# Which of a layer's joined linears have inputs that processes share: o and down.
_SUMMED = (1, 3)


class FusedDecoder:
    """All decoder layers of a packed network in one kernel, on CPUs.

    Args:
        model: a network that :func:`pack` is done with.
    """

    layout = CacheLayout()
    rows_too = False
    adds_low_rank = True

    def prepare(self, *_: Any) -> None:
        """See ``llm.llama.seams.PackedDecoder``: the kernel plans for itself."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._config = model.config
        self._kernel = model.ops.decoder
        self._seams = model.seams
        self._layers: Sequence[FusedLayer] = list(model.model.layers)
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
            low_rank=self._seams.low_rank,
        )

    def _for_length(self, length: int) -> tuple[DecoderWeights, Tensor]:
        """Return weights and rotary frequencies; gathering them anew would cost 1 ms a step."""
        if length in self._constants and paddle.in_dynamic_mode():
            return self._constants[length]
        weights = DecoderWeights([_for_kernel(layer) for layer in self._layers])
        made = weights, paddle.to_tensor(inverse_frequencies(self._config, length))
        if paddle.in_dynamic_mode():  # what a program traces belongs to the program
            self._constants = {length: made}
        return made


def _for_kernel(layer: FusedLayer) -> DecoderLayer:
    """Return a layer as the native kernel takes it."""
    linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
    return DecoderLayer(
        layer.input_layernorm.weight,
        layer.post_attention_layernorm.weight,
        *(linear.weight for linear in linears),
        biases=tuple(linear.bias for linear in linears),
    )


def pack_where_possible(model: LlamaForCausalLM, traced: bool = False, /, **options: Any) -> bool:
    """Pack a network for generation, or leave it as it is where that cannot be.

    Args:
        model: any network.
        traced: steps will be traced for an exported program.
        options: those of :func:`pack`.

    Returns:
        Whether it is packed.

    Raises:
        UserError: options or weights that only packed networks can have.
    """
    reason = why_not(model, traced=traced)
    if reason is None:
        pack(model, **options)
        return True
    for name, value in options.items():
        if value not in (False, "model"):
            raise UserError(f"{name}={value} needs packed layers, which cannot be: {reason}")
    if model.model.embed_tokens.type_name == "bfloat16" and devices.current() == CPU:
        raise UserError(
            f"bfloat16 on CPU needs packed layers, which cannot be: {reason}; or use float32"
        )
    _log.info("decoder layers run op by op: %s", reason)
    return False


def why_not(model: LlamaForCausalLM, *, traced: bool = False) -> str | None:
    """Return why a network cannot be packed, or None where it can; ``traced`` is for an export."""
    if model.ops.decoder is None:
        choice = next((one for one in model.ops.choices if one.op == "decoder"), None)
        said = "" if choice is None or choice.why.startswith("reference") else f": {choice.why}"
        return f"there is no kernel for decoder layers{said or ' (not built, or --ops reference)'}"
    if model.seams.stage is not None:
        return "it is a stage of a pipeline"
    if _by_blocks(model) and (reason := fused_blocks.why_not(model, traced)):
        return reason
    for number in model.model.layers.numbers:
        layer = model.model.layers[number]
        for linears in joined(layer):
            for one in linears:
                if not isinstance(one, QuantizedLinear) and not is_plain(one):
                    return f"layer {number} has a {type(one).__name__}; merge the adapter first"
            if len({_traits(one) for one in linears}) > 1:
                return f"layer {number} has linears of different types side by side"
    return None


def _by_blocks(model: LlamaForCausalLM) -> bool:
    """Say whether the decoder's form is Paddle's operators, on a GPU."""
    return any(one.op == "decoder" and one.form == "paddle" for one in model.ops.choices)


def pack(
    model: LlamaForCausalLM, *, round_activations: bool = False, head_type: str = "model"
) -> LlamaForCausalLM:
    """Lay a network out for generation, in place; it cannot be trained or saved afterwards.

    Weights stay what they are, integers of a quantized network too. On CPUs everything between the
    products is float32.

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
        UserError: a network that cannot be packed, an unknown ``head_type``, or one of the two
            options on a GPU.
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
    if round_activations and model.seams.shard is not None:
        raise UserError(
            "round_activations rounds all inputs of a token on one scale, and of processes that "
            "share a network none has all of them; drop it"
        )
    blocks = _by_blocks(model)
    if blocks and (round_activations or head_type != "model"):
        raise UserError("round_activations and head_type are for CPUs; leave them out on a GPU")
    model.eval()
    layers = model.model.layers
    with paddle.no_grad():
        for number in tqdm(layers.numbers, desc="packing layers", disable=None, leave=False):
            make = fused_blocks.join_layer if blocks else partial(_pack_layer, model.seams.shard)
            packed = make(layers[number], round_activations)
            packed.eval()
            layers.add_sublayer(str(number), packed)
        if blocks:
            model.seams.fused = fused_blocks.BlockDecoder(model)
            return model
        model.model.norm = _wide_norm(model.model.norm)
        tied = model.lm_head is None
        model.lm_head = _pack_head(model, head_type, round_activations)
        _pack_embedding(model, tied)
    run_packed(model)
    return model


def run_packed(model: LlamaForCausalLM) -> None:
    """Let steps of a packed network run in one kernel, where there is one for it."""
    model.seams.fused = FusedDecoder(model) if why_not_fused(model) is None else _OpByOp(model)


def _pack_layer(
    shard: VocabularyShard | None, layer: LlamaDecoderLayer, round_activations: bool
) -> FusedLayer:
    linears = [_pack_linears(several, round_activations) for several in joined(layer)]
    if shard is not None:
        for place in _SUMMED:
            linears[place] = SummedLinear(linears[place].weight, linears[place].bias, shard.total)
    norms = _wide_norm(layer.input_layernorm), _wide_norm(layer.post_attention_layernorm)
    return FusedLayer(layer, *norms, *linears)


def _has_integers_alone(model: LlamaForCausalLM) -> bool:
    """Tell whether some linear multiplies integers with inputs that are not rounded."""
    return any(
        isinstance(layer, QuantizedLinear) and layer.config.activation_bits is None
        for layer in model.sublayers()
    )


def why_not_fused(model: LlamaForCausalLM) -> str | None:
    """Return why packed layers do not run in one kernel, or None where they do."""
    if model.seams.shard is not None and not _by_blocks(model):
        return f"{model.seams.shard.parts} processes share each layer, and sum twice inside of it"
    if model.config.rope_scaling.cosine_scale != 1 and not _by_blocks(model):
        return "YaRN scales cosines and sines, which the kernel of whole layers does not"
    return None


class _OpByOp:
    """Packed layers that no kernel runs whole, on CPUs."""

    layout = CacheLayout()
    rows_too = False
    adds_low_rank = False

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._model = model

    def prepare(self, *_: Any) -> None:
        """See ``llm.llama.seams.PackedDecoder``: there is nothing to plan."""

    def __call__(self, x_TE: Tensor, *others: Any) -> Tensor:
        """Return float32 hidden states ``[T, E]`` before the final norm."""
        return self._model.decode_step(x_TE.astype("float32"), *others)


def _wide_norm(norm: RMSNorm) -> RMSNorm:
    """Return a norm that works in float32; those are a thousandth of the weights."""
    norm.weight = norm.create_parameter(
        norm.weight.shape,
        dtype="float32",
        default_initializer=nn.initializer.Assign(norm.weight.astype("float32")),
    )
    return norm


def _traits(linear: nn.Layer) -> tuple[Any, ...]:
    """Return what linears that become one have to share."""
    described = getattr(linear, "config", None)
    return type(linear), linear.weight.dtype, linear.bias is None, described


def _pack_embedding(model: LlamaForCausalLM, tied: bool) -> None:
    """Look tokens up in the packed output matrix where it is tied; untied floats stay."""
    embedding = model.model.embed_tokens
    shard = model.seams.shard
    if tied and shard is not None:
        model.model.embed_tokens = SharedEmbedding(model.lm_head, embedding.type_name, shard)
    elif tied:
        model.model.embed_tokens = PackedEmbedding(model.lm_head, embedding.type_name)
    elif isinstance(embedding, QuantizedEmbedding):
        matrix = _pack_linears((embedding.linear,), False)
        model.model.embed_tokens = PackedEmbedding(matrix, embedding.type_name, own=True)


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
        integers = _joined([one.weight for one in linears], 0)
        packed = pack_weight(integers, kind, _joined([one.weight_scale for one in linears], 0))
    else:
        packed = pack_weight(_joined([one.weight for one in linears], 1), kind, transposed=True)
    bias = None
    if linears[0].bias is not None:
        bias = _joined([one.bias.astype("float32") for one in linears], 0).detach()
    return PackedLinear(packed, bias)


def _joined(tensors: Sequence[Tensor], axis: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else paddle.concat(list(tensors), axis=axis)


def _pack_head(model: LlamaForCausalLM, head_type: str, round_activations: bool) -> PackedLinear:
    """Return the output matrix, which of a tied network is the embedding too."""
    tied = model.lm_head is None
    head = model.model.embed_tokens if tied else model.lm_head
    if isinstance(head, QuantizedEmbedding):
        head = head.linear
    if isinstance(head, QuantizedLinear):
        return _pack_linears((head,), round_activations or head_type == "int8")
    if head_type == "model":
        return PackedLinear(pack_weight(head.weight, dtype_name(head.weight), transposed=not tied))
    weight_VE = (head.weight if tied else head.weight.T).astype("float32")
    integers, scale = round_to_nearest(weight_VE, QuantConfig(8), "the output matrix")
    packed = pack_weight(paddle.to_tensor(integers), "int8", paddle.to_tensor(scale))
    return PackedLinear(packed)
