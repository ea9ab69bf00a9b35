"""Compares each CUDA kernel with float64, on the CPU through the emulator or on a GPU.

The 2x rule: a kernel may be no further from the truth than twice a plain form that rounds every
intermediate to the same storage type. B batch, S queries, K keys, H heads, G key/value heads, D
head size, E hidden size.
"""

from typing import Any, Protocol

import numpy as np

from tests.native.cuda_interface import CudaOps
from tests.native.storage import rounded
from tests.unit.external_ops import oracle

Checked = dict[str, tuple[float, float]]  # name: rms error of the kernel, of the plain form


class Arrays(Protocol):
    """Moves numbers to where kernels read them, and back."""

    def put(self, x: np.ndarray, dtype: str) -> Any:
        """Return float32 numbers, which have to fit the type, as an input."""

    def get(self, x: Any, dtype: str) -> np.ndarray:
        """Return float64."""

    def integers(self, x: np.ndarray) -> Any:
        """Return integers as an input."""


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def compare(terms: float = 0.0, **cases: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Checked:
    """Apply the 2x rule to (value, plain form, float64) of each name.

    ``terms`` is the size of what was added up, where sums cancel to less.

    Raises:
        AssertionError: with both errors.
    """
    found = {}
    for name, (value, plain, exact) in cases.items():
        found[name] = _rms(value - exact), _rms(plain - exact)
        message = f"{name}: error {found[name][0]:.3g}, of the plain form {found[name][1]:.3g}"
        assert oracle.within_twice(value, plain, exact, terms), message
    return found


def normals(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    """Return normally distributed float32 numbers that the type can hold."""
    return rounded(rng.normal(size=shape), dtype)


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, dtype: str | None) -> np.ndarray:
    """Normalise, rounding to a type after each step; to none in float64."""
    if dtype is None:
        return oracle.rms_norm(x, weight, eps)
    mean = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
    return rounded(rounded(x / np.sqrt(mean + np.float32(eps)), dtype) * weight, dtype)


def check_rms_norm(
    ops: CudaOps, arrays: Arrays, rows: int, size: int, dtype: str, *, seed: int = 0
) -> Checked:
    """Check the sum with a residual, the norm of it and all gradients of ``[rows, size]``."""
    rng, eps = np.random.default_rng(seed), 1e-5
    x, residual, grad, grad_sum = (normals(rng, dtype, rows, size) for _ in range(4))
    weight = normals(rng, dtype, size)
    put = [
        None if a is None else arrays.put(a, dtype) for a in (x, residual, weight, grad, grad_sum)
    ]
    total, out, rstd = ops.rms_norm(put[0], put[1], put[2], eps, dtype)
    summed = arrays.get(total, dtype)
    np.testing.assert_array_equal(summed, rounded(x + residual, dtype).astype(np.float64))
    alone = ops.rms_norm(total, None, put[2], eps, dtype)[1]
    np.testing.assert_array_equal(arrays.get(alone, dtype), arrays.get(out, dtype))
    grad_x, again, grad_weight = ops.rms_norm_backward(total, put[2], rstd, put[3], put[4], dtype)
    np.testing.assert_array_equal(arrays.get(again, dtype), arrays.get(grad_x, dtype))
    exact = [
        oracle.rms_norm(summed, weight, eps),
        *_norm_gradients(summed, weight, eps, grad, None),
    ]
    exact[1] += grad_sum
    s32 = summed.astype(np.float32)
    plain = [_rms_norm(s32, weight, eps, dtype), *_norm_gradients(s32, weight, eps, grad, dtype)]
    plain[1] = rounded(plain[1] + grad_sum, dtype)
    values = [arrays.get(a, dtype) for a in (out, grad_x, grad_weight)]
    names = ("out", "grad_x", "grad_weight")
    return compare(**{n: t for n, *t in zip(names, values, plain, exact, strict=True)})


def _norm_gradients(
    x: np.ndarray, weight: np.ndarray, eps: float, grad: np.ndarray, dtype: str | None
) -> list[np.ndarray]:
    """Differentiate step by step; with a type, as plain operators do it, rounding each result."""

    def store(value: np.ndarray) -> np.ndarray:
        return value if dtype is None else rounded(value, dtype)

    kind = np.float64 if dtype is None else np.float32
    x, weight, grad = (a.astype(kind) for a in (x, weight, grad))
    rstd = (1 / np.sqrt(np.mean(x * x, -1, keepdims=True) + kind(eps))).astype(kind)
    normed = store(x * rstd)
    up = store(grad * weight)
    through = up * rstd - x * rstd**3 * np.mean(up * x, -1, keepdims=True)
    return [store(through), store(np.sum(store(grad * normed), axis=0))]


def check_rotary(
    ops: CudaOps, arrays: Arrays, rows: int, heads: tuple[int, int], size: int, dtype: str,
    table: str, *, seed: int = 0,
) -> Checked:  # fmt: skip
    """Check queries and keys in one launch, and that the inverse is the gradient."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(0, 2 * np.pi, size=(rows, size // 2))
    cos, sin = rounded(np.cos(angles), table), rounded(np.sin(angles), table)
    x = [normals(rng, dtype, rows, h, size) for h in heads]
    put_tables = [arrays.put(a, table) for a in (cos, sin)]
    put_x = [arrays.put(a, dtype) for a in x]
    found: Checked = {}
    for inverse in (False, True):
        outs = ops.rotary(*put_x, *put_tables, dtype, table, inverse=inverse)
        for name, one, out in zip(("q", "k"), x, outs, strict=True):
            number = (one[..., : size // 2] + 1j * one[..., size // 2 :]).astype(np.complex128)
            turn = (cos + 1j * (-sin if inverse else sin))[:, None].astype(np.complex128)
            exact = np.concatenate([(number * turn).real, (number * turn).imag], -1)
            sine = (-sin if inverse else sin)[:, None]
            real, imaginary = np.split(one, 2, axis=-1)
            halves = (
                rounded(real * cos[:, None], dtype) - rounded(imaginary * sine, dtype),
                rounded(imaginary * cos[:, None], dtype) + rounded(real * sine, dtype),
            )
            plain = rounded(np.concatenate(halves, -1), dtype)
            case = f"{name}{' inverse' if inverse else ''}"
            found |= compare(**{case: (arrays.get(out, dtype), plain, exact)})
    return found


def _pack(integers: np.ndarray, bits: int) -> np.ndarray:
    """Store integers ``[O, I]`` as checkpoints do: two 4-bit values a byte, both + 8."""
    if bits == 8:
        return integers.astype(np.int8)
    pairs = (integers + 8).astype(np.uint8).reshape(len(integers), -1, 2)
    return pairs[..., 0] + 16 * pairs[..., 1]


def check_linear(
    ops: CudaOps, arrays: Arrays, shape: tuple[int, int, int], bits: int, groups: int, dtype: str,
    *, bias: bool = False, seed: int = 0,
) -> Checked:  # fmt: skip
    """Check rows, outputs, inputs of ``shape``; the plain form multiplies with widened weights."""
    rng, (rows, outputs, inputs) = np.random.default_rng(seed), shape
    limit = 2 ** (bits - 1) - 1
    integers = rng.integers(-limit, limit + 1, size=(outputs, inputs))
    scale = rounded(rng.uniform(0.5, 2, size=(outputs, groups)) / 500, "bfloat16")
    x, added = normals(rng, dtype, rows, inputs), normals(rng, dtype, outputs)
    out = ops.linear(
        arrays.put(x, dtype), arrays.integers(_pack(integers, bits)), arrays.put(scale, "float32"),
        arrays.put(added, dtype) if bias else None, bits, dtype,
    )  # fmt: skip
    wide = integers * np.repeat(scale.astype(np.float64), inputs // groups, axis=1)
    exact = x.astype(np.float64) @ wide.T + (added if bias else 0)
    plain = rounded(x @ rounded(wide, dtype).T, dtype)
    plain = rounded(plain + added, dtype) if bias else plain
    return compare(out=(arrays.get(out, dtype), plain, exact))
