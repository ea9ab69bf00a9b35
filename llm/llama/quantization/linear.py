"""Linears whose weights are 8-bit or packed 4-bit integers, and the rounding that makes them.

O outputs, I inputs, N groups of inputs that share a scale. Integers lie ``[O, I]``, a row for each
output, as in the files; two 4-bit values share a byte, the even input in its lower half and both
offset by 8. Their product, and its gradient, is the op ``frozen_matmul``.
"""

from collections.abc import Callable

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from common.errors import UserError
from external_ops.frozen_matmul import frozen_matmul_ref, widened
from llm.llama.files.dtypes import FLOATS
from llm.llama.files.finite import read_finite
from llm.llama.files.safetensors import StoredTensor
from llm.llama.files.slots import Slot
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.files import quantized_slots

# A scale below this would overflow its reciprocal; rows of zeros get it.
SMALLEST_SCALE = 1e-30
_SLAB = 8192  # outputs that are rounded together: an embedding has a hundred thousand

Product = Callable[..., Tensor]


def limit_of(bits: int) -> int:
    """Return the largest integer in use: the range is symmetric, 127 or 7 on both sides."""
    return 2 ** (bits - 1) - 1


def weight_scales(weight_OI: Tensor, bits: int, groups: int) -> Tensor:
    """Return float32 scales ``[O, N]`` with which no weight is clipped.

    They have bfloat16's few digits. That loses nothing, since weights are rounded to what the scale
    really is, and makes every ``integer * scale`` exact in float32: quantizing weights that lie on
    the grid already finds the same grid again.
    """
    rows = weight_OI.astype("float32").reshape([weight_OI.shape[0], groups, -1])
    scale = rows.abs().max(-1) / limit_of(bits)
    scale = paddle.clip(scale, min=SMALLEST_SCALE)
    return scale.astype("bfloat16").astype("float32")


def round_weight(weight_OI: Tensor, scale_ON: Tensor, bits: int) -> Tensor:
    """Return the nearest integers ``[O, I]``, still in float32."""
    outputs, inputs = weight_OI.shape
    rows = weight_OI.astype("float32").reshape([outputs, scale_ON.shape[1], -1])
    limit = limit_of(bits)
    integers = paddle.clip(paddle.round(rows / scale_ON.unsqueeze(-1)), -limit, limit)
    return integers.reshape([outputs, inputs])


def round_tokens(x: Tensor, bits: int = 8) -> Tensor:
    """Round each token's inputs ``[..., I]`` to its own grid of integers; the result is widened."""
    wide = x.astype("float32")
    scale = paddle.clip(wide.abs().max(-1, keepdim=True) / limit_of(bits), min=SMALLEST_SCALE)
    return (paddle.round(wide / scale) * scale).astype(x.dtype)


class _RoundTokens(PyLayer):
    @staticmethod
    def forward(ctx, x):
        return round_tokens(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def fake_quantize_tokens(x: Tensor) -> Tensor:
    """Round each token's inputs to 8 bits and pass gradients through."""
    if paddle.in_dynamic_mode() and paddle.is_grad_enabled() and not x.stop_gradient:
        return _RoundTokens.apply(x)
    return round_tokens(x)


def pack(integers_OI: np.ndarray) -> np.ndarray:
    """Put two 4-bit integers (-8 … 7) into each byte: ``[O, I]`` int8 to ``[O, I / 2]`` uint8."""
    offset = (integers_OI.astype(np.int16) + 8).astype(np.uint8)
    return offset[:, 0::2] | (offset[:, 1::2] << 4)


def unpack(packed: np.ndarray) -> np.ndarray:
    """Undo :func:`pack`."""
    both = np.stack([packed & 15, packed >> 4], axis=-1).astype(np.int8) - 8
    return both.reshape(packed.shape[0], -1)


class QuantizedLinear(nn.Layer):
    """A linear with integer weights, which do not train; gradients reach its input.

    Args:
        in_features: I.
        out_features: O.
        config: widths and groups.
        bias: parameter ``[O]`` of the linear that this one replaces, or None.
        name: in error messages.

    Attributes:
        weight: int8 ``[O, I]`` or uint8 ``[O, I / 2]``.
        weight_scale: float32 ``[O, N]``.
        matmul: the product, with the signature of ``external_ops.frozen_matmul``'s reference.

    Raises:
        UserError: inputs that the groups do not divide.
    """

    plain_weight = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: QuantConfig,
        bias: Tensor | None = None,
        name: str = "a linear",
    ) -> None:
        super().__init__()
        groups = config.groups(in_features, name)
        self.in_features, self.out_features = in_features, out_features
        self.config = config
        self.bits = config.weight_bits
        self.reads_floats = False  # of the files, to round them
        self.matmul: Product = frozen_matmul_ref
        shape = [out_features, in_features if self.bits == 8 else in_features // 2]
        dtype = "int8" if self.bits == 8 else "uint8"
        self.register_buffer("weight", paddle.zeros(shape, dtype))
        self.register_buffer("weight_scale", paddle.ones([out_features, groups], "float32"))
        self.bias = bias

    def fill(self, integers_OI: np.ndarray, scale_ON: np.ndarray) -> None:
        """Take int8 integers ``[O, I]`` and float32 scales ``[O, N]``."""
        stored = integers_OI if self.bits == 8 else pack(integers_OI)
        self.weight.set_value(paddle.to_tensor(np.ascontiguousarray(stored)))
        self.weight_scale.set_value(paddle.to_tensor(np.ascontiguousarray(scale_ON)))

    def integers(self) -> np.ndarray:
        """Return int8 integers ``[O, I]``."""
        stored = self.weight.numpy()
        return stored if self.bits == 8 else unpack(stored)

    def widened(self) -> Tensor:
        """Return float32 weights ``[O, I]``."""
        return widened(self.weight, self.weight_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., I]`` to ``[..., O]``; gradients pass straight through rounding of inputs."""
        if self.config.activation_bits is not None:
            x = fake_quantize_tokens(x)
        out = self.matmul(x, self.weight, self.weight_scale, transposed=True)
        return out if self.bias is None else out + self.bias

    def slots(self, name: str) -> dict[str, Slot]:
        """See ``llm.llama.files.slots.StoresItself``."""
        if not self.reads_floats:
            return quantized_slots(name, self.weight, self.weight_scale, self.config)

        def fill(stored: StoredTensor) -> None:
            wide = paddle.to_tensor(read_finite(stored).astype(np.float32))
            self.fill(*round_to_nearest(wide, self.config, name))

        shape = (self.out_features, self.in_features)
        return {f"{name}.weight": Slot(shape, "F32", FLOATS, lambda: self.widened().numpy(), fill)}

    def extra_repr(self) -> str:
        """Describe the layer when a network is printed."""
        return f"in={self.in_features}, out={self.out_features}, {self.config.kind}"


def round_to_nearest(
    weight_OI: Tensor, config: QuantConfig, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 integers ``[O, I]`` and float32 scales ``[O, N]`` of a weight.

    Raises:
        UserError: a weight that is not finite, or groups that do not divide it.
    """
    groups = config.groups(weight_OI.shape[1], name)
    check_weight(weight_OI, name)
    integers, scales = [], []
    for top in range(0, weight_OI.shape[0], _SLAB):  # outputs are rounded each for itself
        rows = weight_OI[top : top + _SLAB]
        scales.append(weight_scales(rows, config.weight_bits, groups).numpy())
        rounded = round_weight(rows, paddle.to_tensor(scales[-1]), config.weight_bits)
        integers.append(rounded.astype("int8").numpy())
    return np.concatenate(integers), np.concatenate(scales)


def check_weight(weight_OI: Tensor, name: str) -> None:
    """Refuse weights that no scale can hold.

    Raises:
        UserError: with the number of values that are not finite.
    """
    bad = int((~paddle.isfinite(weight_OI)).sum())
    if bad:
        raise UserError(f"{name}.weight holds {bad} values that are NaN or infinite; nothing to do")
