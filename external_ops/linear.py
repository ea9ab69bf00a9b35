"""Linears with weights packed for the native kernels: float32, bfloat16, 8-bit and 4-bit integers.

O outputs, I inputs, N groups of inputs that share a scale. Weights are packed once, for every
processor the same way (csrc/include/llama_ops/linear.h describes the layout), and used for 1 to
thousands of rows. There is no gradient: these are for inference.
"""

import paddle
from paddle import Tensor, nn

from external_ops import native

# As enum llama_ops_linear_kind counts them.
KINDS = ("float32", "bfloat16", "int8", "int8_weight_only", "int4", "int4_weight_only")


class PackedWeight(nn.Layer):
    """A packed weight; its tensors are buffers, so that exported programs hold them.

    Args:
        data: uint8 ``[panels, bytes]``.
        scale: float32 or bfloat16 ``[panels, N, 64]``; None for float32 and bfloat16 weights.
        kind: one of :data:`KINDS`.
        outputs: O.
        inputs: I.
    """

    def __init__(
        self, data: Tensor, scale: Tensor | None, kind: str, outputs: int, inputs: int
    ) -> None:
        super().__init__()
        self.kind, self.outputs, self.inputs = kind, outputs, inputs
        self.number = KINDS.index(kind)  # as operators take it
        self.register_buffer("data", data)
        self.scale: Tensor | None
        if scale is None:
            self.scale = None
        else:
            self.register_buffer("scale", scale)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Return :func:`packed_linear` of this weight."""
        return packed_linear(x, self, bias, residual)

    def rows(self, ids: Tensor) -> Tensor:
        """Return :func:`packed_rows` of this weight."""
        return packed_rows(ids, self)

    def extra_repr(self) -> str:
        """Describe the weight when a network is printed."""
        return f"in={self.inputs}, out={self.outputs}, {self.kind}"


def pack_weight(
    weight_OI: Tensor, kind: str, scale_ON: Tensor | None = None, *, transposed: bool = False
) -> PackedWeight:
    """Lay a weight out for :func:`packed_linear`.

    The kinds whose names do not end in ``weight_only`` round each row of inputs to 8 bits with a
    scale of its own (largest / 127), exactly as a quantized checkpoint with 8-bit activations says;
    the others multiply float32 inputs. ``bfloat16`` rounds inputs to bfloat16 on processors that
    multiply those, and leaves them elsewhere.

    Args:
        weight_OI: any floating type for the kinds ``float32`` and ``bfloat16``; int8 ``[O, I]`` for
            8-bit kinds; uint8 ``[O, I / 2]`` for 4-bit kinds, two integers a byte, the even input
            in the lower half, both offset by 8.
        kind: one of :data:`KINDS`.
        scale_ON: float32 scales of integers; N divides I, into multiples of 8 where N > 1.
        transposed: a floating weight is ``[I, O]``, as networks hold it.

    Raises:
        ValueError: another kind, or shapes and types that do not fit it.
        RuntimeError: the native ops are not there; the message says why.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    native.library()
    floating = kind in ("float32", "bfloat16")
    weight_OI = weight_OI.detach()
    if floating and weight_OI.dtype not in (paddle.float32, paddle.bfloat16):
        weight_OI = weight_OI.astype("float32")
    short = scale_ON is not None and _is_short(scale_ON)
    number = KINDS.index(kind)
    data, scale = native.run("linear_pack", weight_OI, scale_ON, number, short, transposed)
    outputs, columns = reversed(weight_OI.shape) if transposed else weight_OI.shape
    inputs = columns * 2 if kind.startswith("int4") else columns
    return PackedWeight(data, None if floating else scale, kind, outputs, inputs)


def _is_short(scale: Tensor) -> bool:
    """Tell whether scales lose nothing in bfloat16; the bytes saved are 10 % of 4-bit weights."""
    return bool((scale.astype("bfloat16").astype("float32") == scale).all())


def packed_linear(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Multiply with packed weights, in float32.

    Args:
        x: ``[..., I]``, float32, bfloat16 or float16; multiplied in float32.
        packed: from :func:`pack_weight`.
        bias: float32 ``[O]``.
        residual: float32 ``[..., O]``, added to the result.

    Returns:
        float32 ``[..., O]``.

    Raises:
        ValueError: shapes or types that do not fit, or an input that wants a gradient.
    """
    if not x.stop_gradient and paddle.in_dynamic_mode() and paddle.is_grad_enabled():
        raise ValueError(
            "packed weights have no gradient; run them under paddle.no_grad(), or keep the linear "
            "unpacked where you train"
        )
    # One row is multiplied in some tenths of a millisecond: look-ups through nn.Layer would show.
    held = packed._buffers
    weight = held["data"], held.get("scale")
    return native.run("linear", x, *weight, bias, residual, packed.number, packed.outputs)[0]


def packed_rows(ids: Tensor, packed: PackedWeight) -> Tensor:
    """Look weights of some outputs up, widened: an embedding that is the output matrix too.

    Args:
        ids: int64 ``[...]``, outputs.
        packed: from :func:`pack_weight`.

    Returns:
        float32 ``[..., I]``, ``integer * scale`` of integers.

    Raises:
        ValueError: an id that is no output.
    """
    held = packed._buffers
    sizes = packed.number, packed.outputs, packed.inputs
    return native.run("linear_rows", ids, held["data"], held.get("scale"), *sizes)[0]
