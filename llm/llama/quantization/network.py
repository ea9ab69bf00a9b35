"""Low-precision networks: built from a description, made of trained ones, and trained as such.

- :func:`install` puts empty quantized linears into a new network, which a checkpoint then fills.
- :func:`quantize_model` rounds a trained network's linears; the ``gptq`` module beside this one
  does better with calibration text.
- :func:`~llm.llama.quantization.qat.prepare_qat` lets a network train with the rounding in place.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from paddle import nn

from common.errors import UserError
from llm.llama.frozen import FrozenLinear
from llm.llama.layers import Linear, name_parameters, replace_layer
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.embedding import (
    dequantize_embedding,
    install_embedding,
    quantize_embedding,
)
from llm.llama.quantization.linear import QuantizedLinear, check_weight, round_to_nearest
from llm.llama.quantization.qat import QATLinear


def quantization_of(model: nn.Layer) -> QuantConfig | None:
    """Return what a network's linears are quantized with; None where no weight is an integer."""
    found = {name: layer.config for name, layer in quantized_linears(model)}
    if not found:
        return None
    config = min(found.values(), key=lambda config: config.weight_bits)
    return replace(config, wide=tuple(name for name, own in found.items() if own != config))


def is_quantized(model: nn.Layer) -> bool:
    """Say whether a network has integer weights, which cannot be trained."""
    return quantization_of(model) is not None


def check_trainable(model: nn.Layer) -> None:
    """Refuse to train all weights of a network with integer weights.

    Raises:
        UserError: with what can be done instead.
    """
    if is_quantized(model):
        raise UserError(
            "the model's weights are integers, which cannot be trained: train a LoRA adapter or a "
            "prefix on it, or start from the model that it was made from"
        )


def linears(model: nn.Layer, config: QuantConfig) -> dict[str, Linear | FrozenLinear]:
    """Return the plain linears that a description means, by name, all of them checked.

    Raises:
        UserError: none, or one whose inputs the groups do not divide.
    """
    found = {
        name: layer
        for name, layer in model.named_sublayers()
        if isinstance(layer, Linear | FrozenLinear) and config.quantizes(name)
    }
    if not found:
        raise UserError("the model has no linear to quantize: is it quantized already?")
    sizes = {name: layer.weight.shape[0] for name, layer in found.items()}
    for name, size in sizes.items():
        config.of(name).groups(size, name, sizes.values())
    return found


def replace_linear(
    model: LlamaForCausalLM,
    name: str,
    config: QuantConfig,
    values: tuple[np.ndarray, np.ndarray] | None = None,
) -> QuantizedLinear:
    """Put a quantized linear in the place of a plain one.

    Args:
        model: the network.
        name: of the linear.
        config: widths and groups.
        values: int8 integers ``[O, I]`` and float32 scales ``[O, N]``; zeros when not given.
    """
    plain = dict(model.named_sublayers())[name]
    size_in, size_out = plain.weight.shape
    layer = QuantizedLinear(size_in, size_out, config.of(name), plain.bias, name)
    if values is not None:
        layer.fill(*values)
    layer.training = plain.training
    layer.matmul = model.ops.frozen_matmul
    replace_layer(model, name, layer)
    return layer


def install(model: LlamaForCausalLM, config: QuantConfig) -> None:
    """Replace a new network's linears by quantized ones of zeros, in place.

    Raises:
        UserError: groups that do not divide the network's sizes.
    """
    for name in linears(model, config):
        replace_linear(model, name, config)
    install_embedding(model, config)


def read_floats(model: LlamaForCausalLM) -> None:
    """Let empty quantized linears be filled from floating-point files, rounded to the nearest."""
    for _, layer in quantized_linears(model):
        layer.reads_floats = True


def quantize_model(model: LlamaForCausalLM, config: QuantConfig) -> LlamaForCausalLM:
    """Round every linear to the nearest grid, in place.

    A network that trained with :func:`prepare_qat` of the same type and groups keeps its logits to
    the last bit.

    Args:
        model: a plain network, or one with quantization-aware linears.
        config: widths and groups.

    Returns:
        The same network.

    Raises:
        UserError: weights that are not finite, groups that do not fit, or a type other than the one
            that the network was trained for; the network is unchanged.
    """
    found = linears(model, config)
    for name, layer in found.items():
        if isinstance(layer, QATLinear) and layer.scheme != (config.kind, config.group_size):
            raise UserError(
                f"the model was trained for {layer.scheme[0]} with group size {layer.scheme[1]}, "
                f"not for {config.kind} with {config.group_size}"
            )
        check_weight(layer.weight, name)
    quantize_embedding(model, config)
    for name in list(found):
        values = round_to_nearest(found.pop(name).weight.T, config.of(name), name)
        replace_linear(model, name, config, values)
    return model


def dequantize_model(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Put plain linears with the widened weights in the place of quantized ones, in place.

    Inputs are not rounded any more; the weights stay on their grid.

    Returns:
        The same network, trainable.

    Raises:
        UserError: a network without quantized linears.
    """
    found = dict(quantized_linears(model))
    if not found:
        raise UserError("dequantize: the model has no integer weights to widen")
    dtype = model.model.embed_tokens.type_name
    for name, layer in found.items():
        weight = layer.create_parameter([layer.in_features, layer.out_features], dtype=dtype)
        weight.set_value(layer.widened().T.astype(dtype))
        plain = Linear.around(weight, layer.bias)
        plain.training = layer.training
        replace_layer(model, name, plain)
    dequantize_embedding(model, dtype)
    name_parameters(model)
    return model


def quantized_linears(model: nn.Layer) -> Iterator[tuple[str, QuantizedLinear]]:
    """Yield the quantized linears by name."""
    for name, layer in model.named_sublayers():
        if isinstance(layer, QuantizedLinear):
            yield name, layer
