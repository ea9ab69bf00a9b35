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

Words are little-endian, so their bytes are what :class:`QuantizedLinear` holds.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import paddle

from common.errors import UserError
from llm.llama.files.safetensors import FLOATS, StoredTensor, nbytes
from llm.llama.quantization.linear import QuantizedLinear


@dataclass(frozen=True)
class Slot:
    """One tensor of a network as the files have it."""

    shape: tuple[int, ...]
    dtype: str  # written
    accepts: tuple[str, ...]  # read
    fetch: Callable[[], np.ndarray]
    fill: Callable[[StoredTensor], None]

    @property
    def nbytes(self) -> int:
        """Size in the files."""
        return nbytes(self.shape, self.dtype)


def quantized_slots(name: str, layer: QuantizedLinear) -> dict[str, Slot]:
    """Return the tensors of a quantized linear under their names in the files."""
    shape = (layer.out_features, layer.in_features)
    scales = tuple(layer.weight_scale.shape)
    slots = {
        f"{name}.weight_scale": Slot(
            scales, "F32", FLOATS, layer.weight_scale.numpy, lambda t: _fill_scale(layer, t)
        )
    }
    if not layer.config.packed:
        fill = lambda t: layer.weight.set_value(paddle.to_tensor(np.array(t.read())))  # noqa: E731
        return {f"{name}.weight": Slot(shape, "I8", ("I8",), layer.weight.numpy, fill)} | slots
    words = (shape[0], shape[1] * layer.bits // 32)
    return {
        f"{name}.weight_packed": Slot(
            words, "I32", ("I32",), lambda: _to_words(layer), lambda t: _from_words(layer, t)
        ),
        **slots,
        f"{name}.weight_shape": Slot(
            (2,), "I64", ("I64", "I32"), lambda: np.array(shape), lambda t: _check_shape(shape, t)
        ),
    }


def _to_words(layer: QuantizedLinear) -> np.ndarray:
    stored = layer.weight.numpy()
    if layer.bits == 8:
        stored = stored.view(np.uint8) ^ np.uint8(128)
    return np.ascontiguousarray(stored).view("<i4")


def _from_words(layer: QuantizedLinear, tensor: StoredTensor) -> None:
    stored = np.array(tensor.read()).view(np.uint8)
    if layer.bits == 8:
        stored = (stored ^ np.uint8(128)).view(np.int8)
    layer.weight.set_value(paddle.to_tensor(stored))


def _fill_scale(layer: QuantizedLinear, tensor: StoredTensor) -> None:
    scale = np.array(tensor.read()).astype(np.float32)
    bad = np.argwhere(~(np.isfinite(scale) & (scale > 0)))
    if bad.size:
        raise UserError(
            f"{tensor.file}: {tensor.name} is damaged: {len(bad)} scales are not positive numbers, "
            f"the first at {bad[0].tolist()} is {scale[tuple(bad[0])]}; fetch or make it again"
        )
    layer.weight_scale.set_value(paddle.to_tensor(scale))


def _check_shape(shape: tuple[int, int], tensor: StoredTensor) -> None:
    stored = tuple(int(n) for n in tensor.read())
    if stored != shape:
        raise UserError(
            f"{tensor.file}: {tensor.name} says {list(stored)}, the config asks for {list(shape)}"
        )
