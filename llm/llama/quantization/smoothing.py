"""Moving outliers from activations into weights before both are rounded: SmoothQuant.

Xiao et al. 2022: a channel of a linear's input can be divided by a number if the weights that it
meets are multiplied by it. The division goes into whatever made the channel: the norm before the
linear, or, for the feed-forward's last linear, the one whose output is its factor. The network
computes the same function, with inputs that 8 bits represent better.
"""

from collections.abc import Callable

import numpy as np
import paddle
from paddle import Tensor, nn

from common.errors import UserError
from llm.llama.layers import Linear, is_plain
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.quantization.calibration import visit_layers

# What makes a channel, and the linears of a layer that read it.
_PAIRS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)


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
    readers = [f"model.layers.0.{name}" for _, names in _PAIRS for name in names]
    if not all(is_plain(layers.get(name)) for name in readers):
        raise UserError("only plain linears can be smoothed: smooth before quantizing")

    def visit(prefix: str, forward: Callable[[], Tensor]) -> None:
        largest = _largest_inputs([layers[f"{prefix}.{names[0]}"] for _, names in _PAIRS], forward)
        for (maker, names), channels in zip(_PAIRS, largest, strict=True):
            linears = [layers[f"{prefix}.{name}"] for name in names]
            _move(layers[f"{prefix}.{maker}"], linears, channels, strength)

    visit_layers(model, ids_NS, visit, "smoothing layers")
    return model


def _largest_inputs(linears: list[Linear], forward: Callable[[], Tensor]) -> list[Tensor]:
    """Return the largest magnitude ``[I]`` of every channel that reaches each linear."""
    largest = [paddle.zeros([linear.weight.shape[0]]) for linear in linears]

    def watch(number: int) -> Callable[..., None]:
        def hook(_: nn.Layer, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].astype("float32")
            channels = x.reshape([-1, x.shape[-1]]).abs().max(0)
            largest[number] = paddle.maximum(largest[number], channels)

        return hook

    hooks = [linear.register_forward_pre_hook(watch(n)) for n, linear in enumerate(linears)]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def _move(maker: nn.Layer, linears: list[Linear], channels: Tensor, strength: float) -> None:
    """Divide what a layer makes, and multiply the weights ``[I, O]`` that read it."""
    weights = paddle.stack([linear.weight.astype("float32").abs().max(1) for linear in linears])
    met = weights.max(0)
    factor = channels**strength / paddle.clip(met, min=1e-5) ** (1 - strength)
    # A channel that is silent, or that nothing reads, stays as it is.
    factor = paddle.where((channels > 0) & (met > 0), factor, paddle.ones_like(factor))
    for linear in linears:
        dtype = linear.weight.dtype
        linear.weight.set_value((linear.weight * factor.unsqueeze(1)).astype(dtype))
    # The last axis is the channel, of a norm's weight as well as of a linear's weight and bias.
    for parameter in maker.parameters():
        parameter.set_value((parameter / factor).astype(parameter.dtype))
