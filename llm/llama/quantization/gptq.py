"""Rounding that makes up for itself: GPTQ (Frantar et al. 2022).

Weights are rounded input by input; what is lost is moved onto the inputs that are still to come, in
the way that changes a layer's outputs on the calibration text the least. O outputs, I inputs, N
groups of inputs that share a scale; the Hessian is ``X^T X`` of the inputs, ``[I, I]``.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import paddle
from scipy.linalg import lapack

from common.errors import UserError
from external_ops.cpu_threads import map_slices
from llm.llama.files.dtypes import to_bfloat16
from llm.llama.quant_config import QuantConfig

DAMPING = 0.01
_BLOCK = 32
# Smallest and largest integers. Of 16 values, the one without a counterpart is used too.
RANGES = {4: (-8, 7), 8: (-127, 127)}
# Shares of the largest weight at which the grid may end; clipping a few pays at four bits.
_SHARES = np.linspace(1.0, 0.64, 10)


def search_scales(
    weight_IO: np.ndarray, importance_I: np.ndarray, bits: int, groups: int
) -> np.ndarray:
    """Return the scales with the least weighted squared error of rounding.

    Args:
        weight_IO: float32 weights, a group of inputs in neighbouring rows.
        importance_I: weight of each input's error: the diagonal of the Hessian.
        bits: 8 or 4.
        groups: N.

    Returns:
        float32 ``[N, O]`` with bfloat16's digits. Those of 4 bits may be negative, as llama.cpp's
        are: the largest weight of a group is then at the longer end, -8, whatever its sign.
    """
    rows = zip(np.split(weight_IO, groups), np.split(importance_I, groups), strict=True)
    return np.stack([_search_group(*group, bits) for group in rows])


def _search_group(weight_IO: np.ndarray, importance_I: np.ndarray, bits: int) -> np.ndarray:
    """Return the scales ``[O]`` of the inputs that one group has."""
    low, high = RANGES[bits]
    most, least = weight_IO.max(0), weight_IO.min(0)
    if low == -high:
        ends, extreme = (high,), np.maximum(most, -least)
    else:  # The end that reaches further takes the weight that does; the scale's sign makes it so.
        ends, extreme = (low, high), np.where(most > -least, most, least)
    extreme = np.where(np.abs(extreme) < 1e-30 * high, 1e-30 * high, extreme).astype(np.float32)
    # Plain loops: NumPy's products would start threads of their own within each of ours.
    root_I1 = np.sqrt(importance_I.astype(np.float32))[:, None]
    best, best_error = np.empty_like(extreme), np.full_like(extreme, np.inf)
    off = np.empty_like(weight_IO)
    for end, share in itertools.product(ends, _SHARES):
        scale = to_bfloat16(extreme * np.float32(share / end))
        np.divide(weight_IO, scale, out=off)
        np.clip(np.rint(off, out=off), low, high, out=off)
        off *= scale
        off -= weight_IO
        off *= root_I1
        error = np.square(off, out=off).sum(0)
        better = error < best_error
        best[better], best_error[better] = scale[better], error[better]
    return best


@dataclass(frozen=True)
class Curvature:
    """What GPTQ has to know of the inputs of linears, which several that read the same share.

    Args:
        diagonal_I: mean square of each input, 1 of those that never occur.
        order_I: inputs, those with the largest squares first.
        factor_II: upper triangle U in that order, float32: ``U^T U`` is the damped Hessian's
            inverse.
    """

    diagonal_I: np.ndarray
    order_I: np.ndarray
    factor_II: np.ndarray

    @classmethod
    def of(
        cls, hessian_II: np.ndarray, damping: float = DAMPING, name: str = "a linear"
    ) -> "Curvature":
        """Invert a Hessian, a mean of outer products of inputs.

        Args:
            hessian_II: float64.
            damping: added to the diagonal, as a share of its mean.
            name: of a linear, in error messages.

        Raises:
            UserError: a Hessian that is not finite, or cannot be inverted.
        """
        if not np.isfinite(hessian_II).all():
            raise UserError(f"the inputs of {name} on the calibration text are not finite")
        diagonal = np.diag(hessian_II).copy()
        diagonal[diagonal == 0] = 1.0  # weights of inputs that never occur do not matter
        order = np.argsort(-diagonal, kind="stable")
        # Backwards, since H = R R^T with an upper R gives U = 1 / R without inverting H itself.
        damped = hessian_II[np.ix_(order[::-1], order[::-1])]
        del hessian_II  # the caller's last one: two of its size are enough
        np.fill_diagonal(damped, diagonal[order[::-1]] + damping * diagonal.mean())
        # Transposed, a symmetric matrix is what Fortran takes without a copy.
        lower, failed = lapack.dpotrf(damped.T, lower=True, overwrite_a=True)
        del damped
        if not failed:
            lower, failed = lapack.dtrtri(lower, lower=True, overwrite_c=True)
        if failed:
            raise UserError(
                f"the calibration text says too little about the inputs of {name}; give more of "
                f"it, or a larger damping than {damping}"
            )
        return cls(diagonal, order, np.ascontiguousarray(lower[::-1, ::-1], np.float32))


def gptq(
    weight_OI: np.ndarray, curvature: Curvature, config: QuantConfig, name: str = "a linear"
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize one weight.

    Inputs with the largest activations come first, with scales fixed before ("act-order" with
    static groups), so the files need no permutation.

    Args:
        weight_OI: the weight.
        curvature: of its inputs.
        config: widths and groups.
        name: in error messages.

    Returns:
        int8 integers ``[O, I]`` and float32 scales ``[O, N]``.

    Raises:
        UserError: groups that do not fit.
    """
    groups = config.groups(weight_OI.shape[1], name)
    bits = config.weight_bits

    # Outputs do not know of each other; NumPy lets go of Python meanwhile.
    def some(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        return _round_outputs(weight_OI[rows], curvature, bits, groups)

    done = map_slices(some, len(weight_OI))
    integers, scales = zip(*done, strict=True)
    return np.concatenate(integers), np.concatenate(scales)


def _round_outputs(
    weight_OI: np.ndarray, curvature: Curvature, bits: int, groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize some of the outputs."""
    size, order = weight_OI.shape[1], curvature.order_I
    weight_IO = np.ascontiguousarray(weight_OI.T, np.float32)
    scale_NO = search_scales(weight_IO, curvature.diagonal_I, bits, groups)
    # Input by input: transposed, what is worked on lies side by side.
    steps_IO = scale_NO[order // (size // groups)]
    integers = np.empty(weight_IO.shape, np.int8)
    integers[order] = round_in_order(weight_IO[order], steps_IO, curvature.factor_II, RANGES[bits])
    return np.ascontiguousarray(integers.T), np.ascontiguousarray(scale_NO.T)


def round_in_order(
    weight_IO: np.ndarray, steps_IO: np.ndarray, factor_II: np.ndarray, ends: tuple[int, int]
) -> np.ndarray:
    """Round inputs from first to last, moving each error onto those to come; spends the weight."""
    integers = np.empty(weight_IO.shape, np.int8)
    for start in range(0, len(weight_IO), _BLOCK):
        end = min(start + _BLOCK, len(weight_IO))
        errors = np.empty((end - start, weight_IO.shape[1]), np.float32)
        for place in range(start, end):
            step = steps_IO[place]
            rounded = np.clip(np.rint(weight_IO[place] / step), *ends)
            integers[place] = rounded
            error = (weight_IO[place] - rounded * step) / factor_II[place, place]
            weight_IO[place + 1 : end] -= np.outer(factor_II[place, place + 1 : end], error)
            errors[place - start] = error
        if end < len(weight_IO):
            # Later blocks are touched once per block, as one product on this thread.
            block, lost = (paddle.to_tensor(x) for x in (factor_II[start:end, end:], errors))
            weight_IO[end:] -= paddle.matmul(block, lost, transpose_x=True).numpy()
    return integers
