"""Training with the rounding in place, so that the network learns to live with it.

Quantization-aware linears keep ordinary weights, round them in every forward pass to the grid that
a ``QuantizedLinear`` would store, and let gradients pass through the rounding as if it were not
there (straight-through, Bengio et al. 2013; zero outside the range, as in Esser et al. 2020).
Parameter names do not change, so checkpoints are those of the plain network and training can stop
and go on.
"""

from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from common.errors import UserError
from external_ops.frozen_matmul import widen
from llm.llama.adapters.lora import LoRALinear
from llm.llama.layers import Linear, name_parameters, replace_layer
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.linear import (
    check_weight,
    fake_quantize_tokens,
    limit_of,
    round_weight,
    weight_scales,
)


class _RoundWeight(PyLayer):
    @staticmethod
    def forward(ctx, weight_OI, scale_ON, bits):
        rows = weight_OI.reshape([weight_OI.shape[0], scale_ON.shape[1], -1])
        outside = rows.abs() > scale_ON.unsqueeze(-1) * (limit_of(bits) + 0.5)
        ctx.outside = outside if bool(outside.any()) else None
        return widen(round_weight(weight_OI, scale_ON, bits), scale_ON)

    @staticmethod
    def backward(ctx, grad):
        if ctx.outside is None:
            return grad, None
        inside = (~ctx.outside).reshape(grad.shape)
        return grad * inside.astype(grad.dtype), None


def fake_quantize(weight_OI: Tensor, scale_ON: Tensor, bits: int) -> Tensor:
    """Round weights to a grid and pass gradients to those inside its range.

    Args:
        weight_OI: weights, a row per output.
        scale_ON: steps of the grid, one for each group of inputs; no gradient.
        bits: 8 or 4; the grid ends at 127 or 7 steps.

    Returns:
        float32 ``[O, I]`` on the grid.
    """
    scale_ON = scale_ON.detach()
    if paddle.is_grad_enabled() and not weight_OI.stop_gradient:
        return _RoundWeight.apply(weight_OI, scale_ON, bits)
    return widen(round_weight(weight_OI, scale_ON, bits), scale_ON)


class QATLinear(Linear):
    """A linear that computes with rounded weights, and rounded inputs where asked for.

    It takes over the parameters of the linear that it replaces.
    """

    plain_weight = None

    def __init__(self, plain: nn.Linear, config: QuantConfig, name: str) -> None:
        nn.Layer.__init__(self)  # Linear's own would make a second weight
        self.weight, self.bias = plain.weight, plain.bias
        self._dtype, self._weight_attr, self.name = plain._dtype, None, None
        self.config = config
        self.groups = config.groups(plain.weight.shape[0], name)
        self.training = plain.training

    @property
    def scheme(self) -> tuple[str, int | None]:
        """Type and group size that it trains for."""
        return self.config.kind, self.config.group_size

    def rounded(self, weight_IO: Tensor) -> Tensor:
        """Return ``[O, I]`` on the grid; differentiable."""
        weight_OI = weight_IO.T.astype("float32")
        bits = self.config.weight_bits
        with paddle.no_grad():
            scale = weight_scales(weight_OI, bits, self.groups)
        return fake_quantize(weight_OI, scale, bits)

    def product(self, x: Tensor, weight_IO: Tensor) -> Tensor:
        """Map ``[..., I]`` to ``[..., O]`` with a weight of the linear's shape."""
        if self.config.activation_bits is not None:
            x = fake_quantize_tokens(x)
        out = paddle.matmul(x, self.rounded(weight_IO).astype(x.dtype), transpose_y=True)
        return out if self.bias is None else out + self.bias

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., I]`` to ``[..., O]``."""
        return self.product(input, self.weight)


class QATLoRALinear(LoRALinear):
    """A LoRA linear that rounds the sum of base and product, which is what merging will store."""

    def __init__(self, adapted: LoRALinear, base: QATLinear) -> None:
        if adapted.dropout:
            raise UserError(
                f"lora_dropout={adapted.dropout} drops inputs of the product alone, which cannot "
                "be rounded together with the base weight; set it to 0 with qat"
            )
        nn.Layer.__init__(self)
        self.in_features, self.out_features = adapted.in_features, adapted.out_features
        self.base, self.config, self.name = base, adapted.config, adapted.name
        self.rank, self.scaling = adapted.rank, adapted.scaling
        self.dropout, self.disabled = adapted.dropout, adapted.disabled
        self.lora_A, self.lora_B = adapted.lora_A, adapted.lora_B
        self.start_A, self.start_B = adapted.start_A, adapted.start_B
        self.lora_magnitude_vector = adapted.lora_magnitude_vector
        self.forget_lengths()
        self.training = adapted.training

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., I]`` to ``[..., O]``."""
        if self.disabled:
            return self.base(x)
        weight = self.base.weight
        return self.base.product(x, self.merged(weight).astype(weight.dtype))


def _targets(model: nn.Layer, config: QuantConfig) -> dict[str, Any]:
    """Return LoRA linears and the plain linears outside of them, by name."""
    found: dict[str, Any] = {}
    for name, layer in model.named_sublayers():
        if isinstance(layer, LoRALinear):
            takes = isinstance(layer.base, Linear)
        else:
            inside = name.rpartition(".")[0] in found
            takes = isinstance(layer, Linear) and not inside and config.quantizes(name)
        if takes:
            found[name] = layer
    return found


def prepare_qat(
    model: LlamaForCausalLM, kind: str = "A8W8", group_size: int | None = None
) -> LlamaForCausalLM:
    """Let a network's linears compute with rounding, in place; embedding and output stay.

    LoRA linears round the merged weight; adapters that are added later need
    :func:`round_adapters`.

    Args:
        model: a network, with or without a LoRA adapter.
        kind: ``A8W8``, ``W4``, ``A8W4`` or ``W8``.
        group_size: of 4-bit weights; None is one scale for each output.

    Returns:
        The same network; parameters keep their names.

    Raises:
        UserError: an unknown type, groups that do not fit, integer weights, LoRA with dropout, or
            weights that are not finite; the network is unchanged.
    """
    config = QuantConfig.of_type(kind, group_size)
    found = _targets(model, config)
    if not found:
        raise UserError("the model has no linear to round: its weights are integers already")
    made: dict[str, nn.Layer] = {}
    for name, layer in found.items():
        plain = layer.base if isinstance(layer, LoRALinear) else layer
        check_weight(plain.weight, name)
        rounding = QATLinear(plain, config, name)
        made[name] = rounding if plain is layer else QATLoRALinear(layer, rounding)
    for name, layer in made.items():
        replace_layer(model, name, layer)
    name_parameters(model)
    return model


def round_adapters(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Let LoRA linears that were added to a rounding network round the merged weight, in place.

    Raises:
        UserError: LoRA with dropout; the network is unchanged.
    """
    made = {
        name: QATLoRALinear(layer, layer.base)
        for name, layer in model.named_sublayers()
        if type(layer) is LoRALinear and isinstance(layer.base, QATLinear)
    }
    for name, layer in made.items():
        replace_layer(model, name, layer)
    return model


def finish_qat(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Put plain linears back, their weights moved to the grid they were trained for, in place.

    The result is an ordinary network in full precision, readable everywhere. Quantizing it with the
    same type and groups changes no weight.

    Args:
        model: a network of :func:`prepare_qat`; LoRA adapters have to be merged first.

    Returns:
        The same network.

    Raises:
        UserError: nothing to finish, or an adapter that is not merged.
    """
    found = {n: layer for n, layer in model.named_sublayers() if isinstance(layer, QATLinear)}
    if not found:
        raise UserError("the model has no quantization-aware linears")
    if any(isinstance(layer, LoRALinear) for layer in model.sublayers()):
        raise UserError("merge the LoRA adapter before the weights are moved to the grid")
    for name, layer in found.items():
        with paddle.no_grad():
            layer.weight.set_value(layer.rounded(layer.weight).T.astype(layer.weight.dtype))
        plain = Linear.around(layer.weight, layer.bias)
        plain.training = layer.training
        replace_layer(model, name, plain)
    name_parameters(model)
    return model
