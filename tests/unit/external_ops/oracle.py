"""Kernels in NumPy and float64, each written in another form than the one under test."""

from collections.abc import Callable, Sequence

import numpy as np

FLOAT32_EPS = float(np.finfo(np.float32).eps)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, ties to even, kept as float32.

    Paddle has no bfloat16 arithmetic on CPU: a plain bfloat16 form is float32 arithmetic in which
    every intermediate that an operator would have stored goes through this.
    """
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), np.float32("nan"), rounded.view(np.float32))


def to_cached_int8(x: np.ndarray) -> np.ndarray:
    """Return heads ``[..., D]`` as a cache of int8 holds them: D integers, four bytes of scale."""
    x = x.astype(np.float32)
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(127), np.float32(1e-30))
    good = np.isfinite(scale)
    integers = np.where(good, np.rint(np.divide(x, scale, where=good, out=np.zeros_like(x))), 0)
    stored = np.where(good, scale, np.float32("nan")).view(np.int8)
    return np.concatenate([integers.astype(np.int8), stored], axis=-1)


def through_int8(x: np.ndarray) -> np.ndarray:
    """Return what heads become in a cache of int8, as float32."""
    stored = to_cached_int8(x)
    return stored[..., :-4] * np.ascontiguousarray(stored[..., -4:]).view(np.float32)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Normalise through the vector's length instead of its mean square."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    size = x.shape[-1]
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return x * weight * np.sqrt(size) / np.hypot(length, np.sqrt(size * eps))


def rms_norm_gradients(
    x: np.ndarray, weight: np.ndarray, eps: float, grad: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Multiply by the whole Jacobian, row by row."""
    rows, size = x.reshape(-1, x.shape[-1]).astype(np.float64), x.shape[-1]
    upstream = grad.reshape(-1, size).astype(np.float64)
    grad_x, grad_weight = np.zeros_like(rows), np.zeros(size)
    for i, (row, up) in enumerate(zip(rows, upstream, strict=True)):
        scale = np.sqrt(row @ row / size + eps)
        jacobian = np.diag(weight / scale) - np.outer(weight * row, row) / (size * scale**3)
        grad_x[i] = up @ jacobian
        grad_weight += up * row / scale
    return grad_x.reshape(x.shape), grad_weight


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, segments: np.ndarray | None = None
) -> np.ndarray:
    """Attend one query at a time to the keys that it may see: ``[S, H, D]``, ``[P + S, G, D]``."""
    length, heads, size = q.shape
    prefix = len(k) - length
    shared = heads // k.shape[1]
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    out = np.zeros_like(q)
    for row in range(length):
        seen = np.arange(row + 1)
        if segments is not None:
            seen = seen[segments[: row + 1] == segments[row]]
        seen = np.concatenate([np.arange(prefix), prefix + seen])
        for head in range(heads):
            scores = k[seen, head // shared] @ q[row, head] / np.sqrt(size)
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ v[seen, head // shared] / weights.sum()
    return out


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def within_twice(
    value: np.ndarray,
    plain: np.ndarray,
    exact: np.ndarray,
    terms: float = 0.0,
    dtype: str = "float32",
) -> bool:
    """The 2x rule: no further from the truth than twice a plain form, or than one rounding.

    Args:
        value: what is tested, widened to float32 or float64.
        plain: the plain form's result in the same storage, widened; for bfloat16 see
            :func:`to_bfloat16`.
        exact: the truth in float64.
        terms: the size of what was added up, where the sum cancels to less.
        dtype: how ``value`` is stored, "float32" or "bfloat16"; in the latter the truth rounded
            once is what no storage can beat.
    """
    if exact.size == 0:
        return value.shape == exact.shape
    floor = FLOAT32_EPS * max(terms, np.abs(exact).max())
    if dtype == "bfloat16":
        floor = max(floor, _rms(to_bfloat16(exact) - exact))
    return value.shape == exact.shape and _rms(value - exact) <= 2 * max(_rms(plain - exact), floor)


def by_parts(
    run: Callable[..., Sequence[np.ndarray]], arrays: Sequence[np.ndarray], parts: int = 4
) -> list[np.ndarray]:
    """Run on some rows of all arrays at a time, and put the results together.

    Results too large for the caches are written by other instructions. Those of parts are not, and
    are held to :func:`within_twice`; bit for bit the large ones have to be theirs.
    """
    size = -(-len(arrays[0]) // parts)
    starts = range(0, len(arrays[0]), size)
    found = [run(*(array[start : start + size] for array in arrays)) for start in starts]
    return [np.concatenate(results) for results in zip(*found, strict=True)]


def cross_entropy(
    hidden: np.ndarray, weight: np.ndarray, labels: np.ndarray, grad: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Score ``[n, E]`` by ``[E, V]`` a token at a time: losses, their gradients, likeliest tokens.

    Labels of -100 have no loss.
    """
    hidden, weight = hidden.astype(np.float64), weight.astype(np.float64)
    losses, best = np.zeros(len(labels)), np.zeros(len(labels), np.int64)
    grad_hidden, grad_weight = np.zeros_like(hidden), np.zeros_like(weight)
    for row, label in enumerate(labels):
        logits = hidden[row] @ weight
        best[row] = np.flatnonzero(logits == logits.max())[0]
        if label == -100:
            continue
        others = np.delete(logits, label) - logits[label]
        losses[row] = np.logaddexp.reduce(np.append(others, 0.0))
        chances = np.exp(logits - np.logaddexp.reduce(logits))
        chances[label] -= 1
        grad_hidden[row] = grad[row] * (weight @ chances)
        grad_weight += grad[row] * np.outer(hidden[row], chances)
    return losses, grad_hidden, grad_weight, best
