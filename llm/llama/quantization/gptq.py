"""Rounding that makes up for itself: GPTQ (Frantar et al. 2022).

Weights are rounded input by input; what is lost is moved onto the inputs that are still to come, in
the way that changes a layer's outputs on the calibration text the least. O outputs, I inputs, N
groups of inputs that share a scale; the Hessian is ``X^T X`` of the inputs, ``[I, I]``.
"""

import numpy as np

from common.errors import UserError
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.linear import limit_of

DAMPING = 0.01
_BLOCK = 128
# Shares of the largest weight at which the grid may end; clipping a few pays at four bits.
_RANGES = np.linspace(1.0, 0.6, 21)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even, still in float32."""
    bits = values.astype(np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def search_scales(
    weight_OI: np.ndarray, importance_I: np.ndarray, bits: int, groups: int
) -> np.ndarray:
    """Return the scales with the least weighted squared error of rounding.

    Args:
        weight_OI: float64 weights.
        importance_I: weight of each input's error: the diagonal of the Hessian.
        bits: 8 or 4.
        groups: N.

    Returns:
        float32 ``[O, N]`` with bfloat16's digits.
    """
    rows = weight_OI.reshape(weight_OI.shape[0], groups, -1)
    importance = importance_I.reshape(groups, -1)
    limit = limit_of(bits)
    largest = np.maximum(np.abs(rows).max(-1), 1e-30 * limit)
    best, best_error = np.empty_like(largest), np.full_like(largest, np.inf)
    for share in _RANGES:
        scale = to_bfloat16(largest * share / limit).astype(np.float64)
        rounded = np.clip(np.rint(rows / scale[..., None]), -limit, limit)
        error = ((rows - rounded * scale[..., None]) ** 2 * importance).sum(-1)
        better = error < best_error
        best[better], best_error[better] = scale[better], error[better]
    return best.astype(np.float32)


def _inverse_factor(hessian: np.ndarray, damping: float, name: str) -> np.ndarray:
    """Return the upper Cholesky factor of the damped Hessian's inverse."""
    if not np.isfinite(hessian).all():
        raise UserError(f"the inputs of {name} on the calibration text are not finite")
    damped = hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    try:
        inverse = np.linalg.inv(np.linalg.cholesky(damped))
        return np.linalg.cholesky(inverse.T @ inverse).T
    except np.linalg.LinAlgError as error:
        raise UserError(
            f"the calibration text says too little about the inputs of {name}; give more of it, or "
            f"a larger damping than {damping}"
        ) from error


def gptq(
    weight_OI: np.ndarray,
    hessian_II: np.ndarray,
    config: QuantConfig,
    *,
    damping: float = DAMPING,
    name: str = "a linear",
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize one weight.

    Inputs with the largest activations come first, with scales fixed before ("act-order" with
    static groups), so the files need no permutation.

    Args:
        weight_OI: the weight.
        hessian_II: sum of outer products of its inputs.
        config: widths and groups.
        damping: added to the diagonal, as a share of its mean.
        name: in error messages.

    Returns:
        int8 integers ``[O, I]`` and float32 scales ``[O, N]``.

    Raises:
        UserError: groups that do not fit, or a Hessian that cannot be inverted.
    """
    groups = config.groups(weight_OI.shape[1], name)
    weight, hessian = weight_OI.astype(np.float64), hessian_II.astype(np.float64)
    silent = np.diag(hessian) == 0  # inputs that never occur; their weights do not matter
    hessian[silent, silent] = 1.0
    diagonal = np.diag(hessian).copy()
    scale = search_scales(weight, diagonal, config.weight_bits, groups)
    group_of = np.arange(weight.shape[1]) // (weight.shape[1] // groups)
    order = np.argsort(-diagonal, kind="stable")
    factor = _inverse_factor(hessian[np.ix_(order, order)], damping, name)
    steps = scale.astype(np.float64)[:, group_of[order]]
    integers = _round_in_order(weight[:, order], steps, factor, limit_of(config.weight_bits))
    result = np.empty(weight.shape, np.int8)
    result[:, order] = integers
    return result, scale


def _round_in_order(
    weight: np.ndarray, steps: np.ndarray, factor: np.ndarray, limit: int
) -> np.ndarray:
    """Round columns from left to right, moving each error onto the columns on its right."""
    weight = weight.copy()
    integers = np.empty(weight.shape, np.int8)
    for start in range(0, weight.shape[1], _BLOCK):
        end = min(start + _BLOCK, weight.shape[1])
        errors = np.empty((len(weight), end - start))
        for column in range(start, end):
            step = steps[:, column]
            rounded = np.clip(np.rint(weight[:, column] / step), -limit, limit)
            integers[:, column] = rounded
            error = (weight[:, column] - rounded * step) / factor[column, column]
            weight[:, column:end] -= np.outer(error, factor[column, column:end])
            errors[:, column - start] = error
        # Later blocks are touched once per block, as one product.
        weight[:, end:] -= errors @ factor[start:end, end:]
    return integers
