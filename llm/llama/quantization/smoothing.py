"""Moving outliers from activations into weights before both are rounded: SmoothQuant.

Xiao et al. 2022: a channel of a linear's input can be divided by a number if the weights that it
meets are multiplied by it. The division goes into whatever made the channel: the norm before the
linear, or, for the feed-forward's last linear, the one whose output is its factor. The network
computes the same function, with inputs that 8 bits represent better.
"""

import numpy as np
import paddle
from paddle import Tensor, nn

from common.errors import UserError
from llm.llama.layers import SAME_INPUT, Linear, is_plain
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.quantization.calibration import Stops, visit_layers

# What makes a channel, and the linears of a layer that read it.
_QKV, _, _GATE_UP, _DOWN = SAME_INPUT
MAKERS = {_QKV: "input_layernorm", _GATE_UP: "post_attention_layernorm", _DOWN: "mlp.up_proj"}


def smooth(model: LlamaForCausalLM, ids_NS: np.ndarray, strength: float = 0.5) -> LlamaForCausalLM:
    """Even out the inputs of a network's linears, in place.

    Args:
        model: a plain network.
        ids_NS: int64 calibration rows of equal length.
        strength: 0 leaves the weights even, 1 the activations; 0.5 shares the difficulty.

    Returns:
        The same network; its logits change by rounding errors only.

    Raises:
        UserError: a strength out of bounds, rows that are none, or a network that has no plain
            linears.
    """
    if not 0 < strength <= 1:
        raise UserError(f"smoothing strength {strength} has to be above 0 and at most 1")
    layers = dict(model.named_sublayers())
    readers = [f"model.layers.0.{name}" for names in MAKERS for name in names]
    if not all(is_plain(layers.get(name)) for name in readers):
        raise UserError("only plain linears can be smoothed: smooth before quantizing")

    def visit(prefix: str, stops: Stops) -> None:
        for names, inputs in stops:
            if names in MAKERS:
                linears = [layers[f"{prefix}.{name}"] for name in names]
                factor = _even(linears, _largest(inputs), strength)
                move(layers[f"{prefix}.{MAKERS[names]}"], linears, inputs, factor)

    visit_layers(model, ids_NS, visit, "smoothing layers")
    return model


def _largest(inputs: list[Tensor]) -> Tensor:
    """Return the largest magnitude ``[I]`` of every channel."""
    channels = [x.astype("float32").reshape([-1, x.shape[-1]]).abs().max(0) for x in inputs]
    return paddle.stack(channels).max(0)


def _even(linears: list[Linear], channels: Tensor, strength: float) -> Tensor:
    """Return what to divide inputs ``[I]`` by."""
    weights = paddle.stack([linear.weight.astype("float32").abs().max(1) for linear in linears])
    met = weights.max(0)
    factor = channels**strength / paddle.clip(met, min=1e-5) ** (1 - strength)
    # A channel that is silent, or that nothing reads, stays as it is.
    return paddle.where((channels > 0) & (met > 0), factor, paddle.ones_like(factor))


def move(maker: nn.Layer, linears: list[Linear], inputs: list[Tensor], factor: Tensor) -> None:
    """Divide what a layer makes, and multiply the weights ``[I, O]`` that read it.

    Args:
        maker: a norm or a linear.
        linears: all that read what it makes.
        inputs: what it made of the calibration rows, divided too.
        factor: float32 ``[I]``.
    """
    for linear in linears:
        dtype = linear.weight.dtype
        linear.weight.set_value((linear.weight * factor.unsqueeze(1)).astype(dtype))
    # The last axis is the channel, of a norm's weight as well as of a linear's weight and bias.
    for parameter in maker.parameters():
        parameter.set_value((parameter / factor).astype(parameter.dtype))
    for n, x in enumerate(inputs):
        inputs[n] = x / factor
