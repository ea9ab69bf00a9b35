"""Low-rank products of several adapters beside one linear: each row takes its own adapter's.

LoRA (Hu et al. 2021) adds ``scale * (x A^T) B`` to a linear. In a step of packed tokens rows belong
to requests that name different adapters, or none; those of one adapter are gathered (Punica, Chen
et al. 2023).

T rows, I inputs, O outputs, R ranks, P pieces of an adapter.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor

from external_ops import native
from external_ops.tensors import tensor_from

# Matrices begin at multiples of so many numbers: a line of the cache.
_LINE = 16


class Piece(NamedTuple):
    """What an adapter adds to neighbouring outputs of a linear.

    Args:
        linear: number of the linear; in :mod:`external_ops.decoder` ``4 * layer`` and then qkv, o,
            gate_up and down.
        first: the first of the outputs.
        a_RI: float32.
        b_RO: float32.
        scale: what the product is multiplied by.
    """

    linear: int
    first: int
    a_RI: NDArray[np.float32]
    b_RO: NDArray[np.float32]
    scale: float


class LowRank:
    """All products of an adapter, as the kernels take them.

    Args:
        pieces: of its linears.
        dtype: ``float32`` or ``bfloat16``, in which the matrices lie; products are float32.
    """

    def __init__(self, pieces: Sequence[Piece], dtype: str = "float32") -> None:
        # Columns: linear, first output, inputs, outputs, rank, and where A and B begin.
        self.table_P7 = np.zeros([len(pieces), 7], np.int64)
        whole: list[NDArray[np.float32]] = []
        place = 0
        for row, piece in zip(self.table_P7, pieces, strict=True):
            (rank, inputs), outputs = piece.a_RI.shape, piece.b_RO.shape[1]
            row[:5] = piece.linear, piece.first, inputs, outputs, rank
            for column, matrix in ((5, piece.a_RI), (6, piece.b_RO)):
                row[column] = place
                size = -(-matrix.size // _LINE) * _LINE
                whole.append(np.zeros(size, np.float32))
                whole[-1][: matrix.size] = matrix.ravel()
                place += size
        self.data = paddle.to_tensor(np.concatenate(whole)).astype(dtype)
        self.scales = [float(np.float32(piece.scale)) for piece in pieces]
        on_host = paddle.CPUPlace()  # the kernels' bindings read these two
        self.pieces = paddle.to_tensor(self.table_P7, place=on_host)
        self.scale_P = paddle.to_tensor(self.scales, dtype="float32", place=on_host)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        size = self.data.element_size() * int(self.data.size)
        return size + self.table_P7.nbytes + 4 * len(self.scales)

    def matrix(self, place: int, rows: int, columns: int) -> Tensor:
        """Return a copy of one matrix in float32."""
        flat = self.data[place : place + rows * columns]
        return flat.astype("float32").reshape([rows, columns])


class LowRankStep:
    """The adapters of a step, and which rows are whose.

    Args:
        adapters: those of which there are rows.
        adapter_T: int32 number of each row's adapter among them, -1 for none.
    """

    def __init__(self, adapters: Sequence[LowRank], adapter_T: NDArray[np.int32]) -> None:
        self.adapters = list(adapters)
        self.host_T = adapter_T
        self.adapter_T = tensor_from(adapter_T, on_host=True)

    @property
    def tensors(self) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """What the kernels take: rows' adapters, and of each adapter numbers, pieces, scales."""
        each = [(one.data, one.pieces, one.scale_P) for one in self.adapters]
        data, pieces, scales = (list(column) for column in zip(*each, strict=True))
        return self.adapter_T, data, pieces, scales


def low_rank_ref(
    x_TI: Tensor, out_TO: Tensor, step: LowRankStep, *, linear: int, first: int = 0
) -> Tensor:
    """Add the products of each row's adapter to what a linear has made of it.

    Args:
        x_TI: what the linear has read; multiplied in float32.
        out_TO: its result, which may be overwritten.
        step: adapters and rows.
        linear: the linear's number.
        first: outputs are those of the linear from this one on.

    Returns:
        ``[T, O]`` in the type of ``out_TO``.
    """
    for number, adapter in enumerate(step.adapters):
        rows = tensor_from(np.flatnonzero(step.host_T == number))
        x = paddle.gather(x_TI, rows).astype("float32")
        added = paddle.gather(out_TO, rows).astype("float32")
        for row, scale in zip(adapter.table_P7.tolist(), adapter.scales, strict=True):
            number_of, begin, inputs, outputs, rank, a, b = row
            begin -= first
            if number_of != linear or not 0 <= begin < out_TO.shape[1]:
                continue
            inner = paddle.matmul(x, adapter.matrix(a, rank, inputs).T) * scale
            more = paddle.matmul(inner, adapter.matrix(b, rank, outputs))
            added[:, begin : begin + outputs] += more
        out_TO = paddle.scatter(out_TO, rows, added.astype(out_TO.dtype))
    return out_TO


def low_rank_native(
    x_TI: Tensor, out_TO: Tensor, step: LowRankStep, *, linear: int, first: int = 0
) -> Tensor:
    """Compute :func:`low_rank_ref` with the kernel of csrc/cpu/low_rank.cc, in ``out_TO`` itself.

    A row's bits do not depend on other rows and their adapters.

    Raises:
        ValueError: shapes that do not fit, or types other than float32.
    """
    return native.run("low_rank", x_TI, out_TO, *step.tensors, linear, first)[0]
