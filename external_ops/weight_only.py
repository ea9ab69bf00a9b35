"""Products with 8-bit and 4-bit weights by Paddle's CUDA kernel, ``weight_only_linear``.

The kernel reads integers in a layout of its own, interleaved for the tensor cores of capability 7.5
and newer; :func:`pack` makes it from integers and scales as checkpoints have them, which Paddle's
``weight_quantize`` cannot: that one chooses the scales itself. Inputs stay as they are.

O outputs, I inputs, N groups of inputs that share a scale.
"""

from dataclasses import dataclass

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor

# As Paddle 3.3.1's kernel lists them; 7.0 has another layout.
ARCHITECTURES = (75, 80, 86, 89, 90, 100)
GROUPS = (64, 128)
_TILE = 64


def why_not(outputs: int, inputs: int, groups: int, architecture: int) -> str:
    """Return why the kernel does not multiply with a weight, or an empty string.

    Args:
        outputs: O.
        inputs: I.
        groups: N; 1 is a scale for each output.
        architecture: compute capability of the GPU, 90 for 9.0.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(f"{one // 10}.{one % 10}" for one in ARCHITECTURES)
        found = f"{architecture // 10}.{architecture % 10}"
        return f"weight_only_linear is for compute capability {known}; this GPU has {found}"
    if outputs % _TILE or inputs % _TILE:
        return f"weight_only_linear has tiles of {_TILE}; the weight is {outputs} x {inputs}"
    if groups > 1 and inputs // groups not in GROUPS:
        sizes = " or ".join(map(str, GROUPS))
        return f"weight_only_linear has groups of {sizes}, not of {inputs // groups}"
    return ""


@dataclass(frozen=True)
class WeightOnly:
    """A weight as the kernel reads it.

    Args:
        data: int8 ``[O, I]``, or ``[O / 2, I]`` of 4-bit integers.
        scale: ``[O]``, or ``[N, O]`` of groups, in the type of the inputs.
        bits: 8 or 4.
        group: inputs of a group, -1 where an output has one scale.
        architecture: the compute capability that it was laid out for.
    """

    data: Tensor
    scale: Tensor
    bits: int
    group: int
    architecture: int


def interleaved(integers_OI: NDArray[np.int8], bits: int) -> NDArray[np.int8]:
    """Return integers in the kernel's layout (impl/weight_quantize_kernel_impl.h of Paddle).

    Inputs are reordered inside of 128 bits, 64 of them lie side by side for 2 or 4 outputs in turn,
    and of a 32-bit word those with even places come first. Integers are stored with an offset.

    Args:
        integers_OI: -127 … 127, or -7 … 7.
        bits: 8 or 4.
    """
    outputs, inputs = integers_OI.shape
    in_word, several = 32 // bits, 16 // bits
    half = in_word // 2
    rows = integers_OI.reshape(outputs, -1, half, 4, 2).swapaxes(2, 3)
    tiles = rows.reshape(outputs // several, several, -1, _TILE).swapaxes(1, 2)
    words = tiles.reshape(-1, half, 2).swapaxes(1, 2).reshape(-1)
    stored = (words.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 4:
        stored = stored[0::2] | (stored[1::2] << 4)
    return stored.view(np.int8).reshape(-1, inputs)


def pack(
    integers_OI: NDArray[np.int8],
    scale_ON: NDArray[np.float32],
    *,
    bits: int,
    dtype: str,
    architecture: int,
) -> WeightOnly:
    """Lay a weight out for :func:`multiply`, once :func:`why_not` has nothing against it.

    Args:
        integers_OI: integers, not packed.
        scale_ON: scales; float16 and bfloat16 hold those of this suite exactly.
        bits: 8 or 4.
        dtype: of the inputs, ``bfloat16`` or ``float16``.
        architecture: compute capability, 90 for 9.0.
    """
    groups = scale_ON.shape[1]
    scale = scale_ON.T if groups > 1 else scale_ON[:, 0]
    return WeightOnly(
        paddle.to_tensor(interleaved(integers_OI, bits)),
        paddle.to_tensor(np.ascontiguousarray(scale)).astype(dtype),
        bits,
        integers_OI.shape[1] // groups if groups > 1 else -1,
        architecture,
    )


def multiply(x: Tensor, weight: WeightOnly, bias: Tensor | None = None) -> Tensor:
    """Map ``[..., I]`` in bfloat16 or float16 to ``[..., O]``; there is no gradient for weights."""
    kind = f"int{weight.bits}"
    settings = (kind, weight.architecture, weight.group)
    out: Tensor = paddle._C_ops.weight_only_linear(x, weight.data, bias, weight.scale, *settings)
    return out
