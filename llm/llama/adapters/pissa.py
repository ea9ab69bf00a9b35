"""PiSSA (Meng et al. 2024): a low-rank product that starts as the principal part of its weight.

The trained factors start as the largest singular values and vectors of ``W``, and what is left of
``W`` stays frozen. The method takes that part off the weight; here the weight stays as it is, and
the frozen factors of the start are subtracted beside it, which is the same function:
``x (W - s A0 B0) + s (x A) B``. So a base in few bits keeps its numbers, and what was learned lies
in files as a plain product of twice the rank, over the model as it is published.

I inputs, O outputs, r rank, s scaling.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError

Array = NDArray[np.float32]

# Vectors beyond the rank that the subspace iteration carries, and drops at its end.
_SPARE = 8


@dataclass(frozen=True)
class Factors:
    """A product's factors ``a [I, r]`` and ``b [r, O]``, float32."""

    a: Array
    b: Array


def _whole_svd(weight_IO: Array, rank: int) -> tuple[Array, Array, Array]:
    # In float32 vectors of singular values that lie near each other have few right digits.
    left, values, right = np.linalg.svd(weight_IO.astype(np.float64), full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]


def _some_svd(
    weight_IO: Array, rank: int, iterations: int, rng: np.random.Generator
) -> tuple[Array, Array, Array]:
    """Return the largest singular values by subspace iteration (Halko et al. 2011, 4.4 and 5.1)."""
    width = min(rank + _SPARE, *weight_IO.shape)
    drawn = rng.standard_normal([weight_IO.shape[1], width], dtype=np.float32)
    basis, _ = np.linalg.qr(weight_IO @ drawn)
    for _ in range(iterations):
        other, _ = np.linalg.qr(weight_IO.T @ basis)
        basis, _ = np.linalg.qr(weight_IO @ other)
    left, values, right = np.linalg.svd(basis.T @ weight_IO, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank], right[:rank]


def principal_factors(
    weight_IO: Array,
    rank: int,
    scaling: float,
    *,
    iterations: int | None,
    rng: np.random.Generator,
    name: str,
) -> Factors:
    """Return the factors whose product, times ``scaling``, is nearest to a weight.

    Each takes the root of the singular values, as PEFT's ``pissa_init`` gives it.

    Args:
        weight_IO: float32.
        rank: r.
        scaling: s.
        iterations: of a subspace iteration; None computes all singular values.
        rng: draws where it starts.
        name: of the linear, in error messages.

    Raises:
        UserError: a rank that the weight does not have.
    """
    if rank > min(weight_IO.shape):
        raise UserError(
            f"pissa: rank {rank} is more than the {min(weight_IO.shape)} singular values of "
            f"{name}; lower lora_rank"
        )
    if iterations is None:
        left, values, right = _whole_svd(weight_IO, rank)
    else:
        left, values, right = _some_svd(weight_IO, rank, iterations, rng)
    roots = np.sqrt(values / scaling)
    return Factors(
        np.ascontiguousarray(left * roots, np.float32),
        np.ascontiguousarray(roots[:, None] * right, np.float32),
    )
