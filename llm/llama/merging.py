"""Adapters that become part of the weights, and what rounding costs on the way.

Beside weights that do not train in float32 (quantized ones, or bfloat16 under
:mod:`llm.llama.frozen`) a product is added to what they stand for, in float32: that is exact to
float32's last digit, and the result is an ordinary network. What is lost afterwards, by storing it
in half precision or by rounding it to integers again, is counted by :class:`Loss`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor, nn

from common.errors import UserError
from llm.llama.adapters.lora_linear import LoRALinear, adapted, mergeable
from llm.llama.files.dtypes import Array, header_type
from llm.llama.files.finite import unfit
from llm.llama.frozen import FrozenLinear, is_frozen, plain_linear, thaw
from llm.llama.layers import Linear, name_parameters, replace_layer
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.embedding import dequantize_embedding
from llm.llama.quantization.linear import QuantizedLinear, limit_of, round_to_nearest
from llm.llama.quantization.network import quantized_linears, replace_linear

# Largest change of a logit by merging, as a share of the largest logit. A merged weight is rounded
# once to its type, and the rounding of all layers adds up.
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
_TOO_LARGE = "the adapter is damaged, or too large for the type of the weights; merge in float32"


@dataclass
class Loss:
    """What rounding has changed in weights: differences, in the weights' unit.

    Args:
        what: the rounding, for :meth:`describe`.
        largest: of all differences.
        squares: sum of the differences' squares.
        of_weights: sum of the weights' squares.
        of_products: sum of the squares of what the adapter has added to them.
    """

    what: str
    largest: float = 0.0
    squares: float = 0.0
    of_weights: float = 0.0
    of_products: float = 0.0

    def add(self, exact: Tensor, stored: Tensor, product: Tensor | None = None) -> None:
        """Count a weight: as it was, as it is now, and the adapter's share of it."""
        wide = exact.astype("float32")
        change = (stored.astype("float32") - wide).abs()
        self.largest = max(self.largest, float(change.max()))
        self.squares += float((change * change).sum())
        self.of_weights += float((wide * wide).sum())
        if product is not None:
            self.of_products += float((product * product).sum())

    def describe(self) -> str:
        """Return one line: the largest difference, and root mean squares as shares."""
        line = (
            f"{self.what}: weights change by {self.largest:.3g} at most, by "
            f"{math.sqrt(self.squares / max(self.of_weights, 1e-300)):.3%} of their size"
        )
        if self.of_products:
            line += f" and {math.sqrt(self.squares / self.of_products):.1%} of the adapter's part"
        return line


def _probe(model: LlamaForCausalLM) -> Tensor:
    length = min(16, model.config.max_position_embeddings)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, [2, length])
    with paddle.no_grad():
        return model(paddle.to_tensor(ids))


def _stands_for_floats(base: nn.Layer) -> bool:
    """Say whether a base holds something else than weights that a product can be added to."""
    return isinstance(base, QuantizedLinear | FrozenLinear)


def product_of(layer: LoRALinear) -> Tensor:
    """Return float32 ``[in, out]``, what an adapter adds to a weight."""
    if layer.lora_magnitude_vector is None:
        return layer.product()
    weight = layer.base_weight()
    return layer.merged(weight) - weight


def _merge_one(name: str, layer: LoRALinear) -> nn.Layer:
    """Return the linear of a base and its product."""
    base = plain_linear(layer.base) if _stands_for_floats(layer.base) else layer.base
    weight = base.weight
    merged = layer.merged(weight)
    problem = unfit(merged.numpy(), "F32", header_type(weight))
    if problem is not None:
        raise UserError(f"merging gives {name} {problem}: {_TOO_LARGE}")
    weight.set_value(merged.astype(weight.dtype))
    return base


def merge_lora(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Add every product to its linear's weight and put the linear back, in place.

    The logits of a probe before and after are compared. All weights are trainable afterwards; those
    that were integers, or bfloat16 under float32, are float32, adapted or not.

    Args:
        model: a network with an adapter.

    Returns:
        The same network, without an adapter.

    Raises:
        UserError: no adapter, or a base that no product can be added to (the network is unchanged);
            sums that are no numbers in the type of the weights, or logits that differ (the network
            is unusable and has to be loaded again).
    """
    adapters = adapted(model)
    if not adapters:
        raise UserError("the model has no LoRA adapter to merge")
    for name, layer in adapters.items():
        if not (mergeable(layer.base) or _stands_for_floats(layer.base)):
            raise UserError(
                f"cannot merge into {name}, a {type(layer.base).__name__}: load the base model in "
                "full precision to merge"
            )
    training = model.training
    rounds = any(one.config.activation_bits for _, one in quantized_linears(model))
    model.eval()
    wanted = _probe(model)
    for name, layer in adapters.items():
        replace_layer(model, name, _merge_one(name, layer))
    for name, layer in list(quantized_linears(model)):
        replace_layer(model, name, plain_linear(layer))
    dequantize_embedding(model, "float32")
    if is_frozen(model):
        thaw(model)
    for parameter in model.parameters():
        parameter.stop_gradient = False
    name_parameters(model)
    if not rounds:  # else inputs were rounded before, and are not any more
        _check_merged(wanted, _probe(model), model)
    if training:
        model.train()
    return model


def _check_merged(wanted: Tensor, got: Tensor, model: LlamaForCausalLM) -> None:
    dtype = model.model.embed_tokens.type_name
    limit = _TOLERANCE[dtype] * max(1.0, float(wanted.abs().max()))
    error = float((got - wanted).abs().max())
    if not error <= limit:  # also when it is not a number
        raise UserError(
            f"merging changed a logit by {error:.3g}, more than {limit:.3g} ({dtype}): {_TOO_LARGE}"
        )


def products(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """Return what an adapter will add to each weight, float32 ``[in, out]``, by linear."""
    return {name: product_of(layer) for name, layer in adapted(model).items()}


def requantize(
    model: LlamaForCausalLM,
    before: Mapping[str, QuantizedLinear],
    parts: Mapping[str, Tensor],
) -> Loss:
    """Round a merged network's linears to the nearest integers again, in place.

    Linears without a part of the adapter get their old integers back.

    Args:
        model: from :func:`merge_lora`.
        before: the quantized linears that it had.
        parts: from :func:`products`.

    Returns:
        What that changed in the linears that the adapter had changed.
    """
    narrow = min((old.config for old in before.values()), key=lambda config: config.weight_bits)
    loss = Loss(f"merged weights rounded to {narrow.kind}")
    for name, old in before.items():
        plain = dict(model.named_sublayers())[name]
        assert isinstance(plain, Linear)
        exact = plain.weight.T
        values = old.integers(), old.weight_scale.numpy()
        if name in parts:
            values = _nearest(exact, values[1], old.config, name)
        made = replace_linear(model, name, old.config, values)
        if name in parts:
            loss.add(exact, made.widened(), parts[name])
    return loss


def _nearest(
    exact_OI: Tensor, old_ON: Array, config: QuantConfig, name: str
) -> tuple[Array, Array]:
    """Return integers ``[O, I]`` and scales ``[O, N]``: old scales, or new ones where nearer.

    What GPTQ has rounded lies on a grid that the largest weight of a group does not give.
    """
    outputs, groups = old_ON.shape
    rows = exact_OI.numpy().reshape(outputs, groups, -1)
    top = limit_of(config.weight_bits)
    low = -top - 1 if config.weight_bits == 4 else -top
    on_old = np.clip(np.rint(rows / old_ON[..., None]), low, top).astype(np.int8)
    on_new, new_ON = round_to_nearest(exact_OI, config, name)
    on_new = on_new.reshape(rows.shape)

    def error(integers: Array, scale_ON: Array) -> Array:
        found: Array = np.square(integers * scale_ON[..., None] - rows).sum(-1, keepdims=True)
        return found

    old_is_nearer = error(on_old, old_ON) <= error(on_new, new_ON)
    integers = np.where(old_is_nearer, on_old, on_new).reshape(outputs, -1)
    return integers, np.where(old_is_nearer[..., 0], old_ON, new_ON)
