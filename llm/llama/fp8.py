"""Decoder layers that multiply in float8 while they train; parameters and files do not change."""

from paddle import Tensor, nn

from common.errors import UserError
from external_ops.fp8 import fp8_linear, why_not
from llm.llama.layers import SAME_INPUT, Linear, replace_layer


class FP8Linear(Linear):
    """A linear whose products are :func:`external_ops.fp8.fp8_linear`'s."""

    plain_weight = None  # it rounds

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., I]`` to ``[..., O]`` in bfloat16."""
        return fp8_linear(input, self.weight, self.bias)


def check_device() -> None:
    """Refuse a device without float8 products by block; Paddle is loaded on it.

    Raises:
        UserError: says what the device has instead.
    """
    if why := why_not():
        raise UserError(f"fp8: {why}; drop --fp8")


def use_fp8(model: nn.Layer) -> None:
    """Let the decoder layers' linears multiply in float8, in place; embedding and output stay.

    Args:
        model: a network, or a stage of one, whose linears are plain, of
            multiples of 128 inputs and outputs.
    """
    names = tuple(f".{name}" for joined in SAME_INPUT for name in joined)
    for name, layer in list(model.named_sublayers()):
        if isinstance(layer, Linear) and name.endswith(names):
            replace_layer(model, name, FP8Linear.around(layer.weight, layer.bias))
