"""How quantized linears lie in safetensors files: the layouts of ``compressed-tensors``.

For a linear ``name`` with O outputs, I inputs and N groups:

========================  ===========  =================================================
``int-quantized``
``name.weight``           I8 [O, I]    the integers
``name.weight_scale``     float [O, N] weight = integer * scale
``pack-quantized``
``name.weight_packed``    I32 [O, I*b/32]  b bits each, first input in the lowest bits,
                                       offset by half the range (8 or 128)
``name.weight_scale``     float [O, N]
``name.weight_shape``     I64 [2]      O and I
========================  ===========  =================================================

Words are little-endian, so their bytes are what a ``QuantizedLinear`` holds.
"""

from functools import partial

import numpy as np
import paddle
from paddle import Tensor

from common.errors import UserError
from llm.llama.files.dtypes import FLOATS
from llm.llama.files.finite import read_finite
from llm.llama.files.safetensors import StoredTensor
from llm.llama.files.slots import Slot
from llm.llama.quant_config import QuantConfig


def quantized_slots(
    name: str, weight: Tensor, weight_scale: Tensor, config: QuantConfig
) -> dict[str, Slot]:
    """Return the tensors of a quantized linear under their names in the files.

    Args:
        name: of the linear.
        weight: int8 ``[O, I]``, or uint8 ``[O, I / 2]`` with two values a byte.
        weight_scale: float32 ``[O, N]``.
        config: widths and layout.
    """
    bits = config.weight_bits
    shape = (weight.shape[0], weight.shape[1] * 8 // bits)
    slots = {
        f"{name}.weight_scale": Slot(
            tuple(weight_scale.shape),
            "F32",  # shorter ones would lose nothing here, but readers widen weights in their type
            FLOATS,
            weight_scale.numpy,
            partial(_fill_scale, weight_scale, bits),
        )
    }
    if not config.packed:
        fill = partial(_fill, weight)
        return {f"{name}.weight": Slot(shape, "I8", ("I8",), weight.numpy, fill), **slots}
    return {
        f"{name}.weight_packed": Slot(
            (shape[0], shape[1] * bits // 32),
            "I32",
            ("I32",),
            partial(_to_words, weight, bits),
            partial(_from_words, weight, bits),
        ),
        **slots,
        f"{name}.weight_shape": Slot(
            (2,), "I64", ("I64", "I32"), lambda: np.array(shape), partial(_check_shape, shape)
        ),
    }


def _fill(weight: Tensor, tensor: StoredTensor) -> None:
    weight.set_value(paddle.to_tensor(np.array(read_finite(tensor))))


def _to_words(weight: Tensor, bits: int) -> np.ndarray:
    stored = weight.numpy()
    if bits == 8:
        stored = stored.view(np.uint8) ^ np.uint8(128)
    return np.ascontiguousarray(stored).view("<i4")


def _from_words(weight: Tensor, bits: int, tensor: StoredTensor) -> None:
    stored = np.array(tensor.read()).view(np.uint8)
    if bits == 8:
        stored = (stored ^ np.uint8(128)).view(np.int8)
    weight.set_value(paddle.to_tensor(stored))


def _fill_scale(weight_scale: Tensor, bits: int, tensor: StoredTensor) -> None:
    scale = np.array(tensor.read()).astype(np.float32)
    # Only the grid of 4 bits has a longer end, which a negative scale turns upwards.
    right, what = (scale != 0, "zero or no") if bits == 4 else (scale > 0, "not positive")
    bad = np.argwhere(~(np.isfinite(scale) & right))
    if bad.size:
        raise UserError(
            f"{tensor.file}: {tensor.name} is damaged: {len(bad)} scales are {what} numbers, "
            f"the first at {bad[0].tolist()} is {scale[tuple(bad[0])]}; fetch or make it again"
        )
    weight_scale.set_value(paddle.to_tensor(scale))


def _check_shape(shape: tuple[int, int], tensor: StoredTensor) -> None:
    stored = tuple(int(n) for n in tensor.read())
    if stored != shape:
        raise UserError(
            f"{tensor.file}: {tensor.name} says {list(stored)}, the config asks for {list(shape)}"
        )
