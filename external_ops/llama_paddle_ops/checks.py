"""One small computation per operator, beside the same in NumPy and float64.

S sequence, T tokens, H query heads, G key/value heads, D head dimension, E hidden, F feed-forward.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
# Runs an operator on arrays and attributes.
Run = Callable[..., list[Array]]
Pairs = list[tuple[Array, Array]]

_EPS = 1e-5


def _normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype("float32")


def _softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _normed(x: Array, weight: Array) -> Array:
    x = x.astype("float64")
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + _EPS) * weight


def _turned(x_THD: Array, cos_TD: Array, sin_TD: Array) -> Array:
    real, imaginary = np.split(x_THD.astype("float64"), 2, -1)
    cos, sin = cos_TD[:, None], sin_TD[:, None]
    return np.concatenate([real * cos - imaginary * sin, imaginary * cos + real * sin], -1)


def _attended(q_SHD: Array, k_SGD: Array, v_SGD: Array) -> Array:
    (S, H, D), G = q_SHD.shape, k_SGD.shape[1]
    k, v = (np.repeat(x.astype("float64"), H // G, 1) for x in (k_SGD, v_SGD))
    scores = np.einsum("shd,khd->hsk", q_SHD, k) / np.sqrt(D)
    scores += np.where(np.tri(S, dtype=bool), 0, -np.inf)
    return np.einsum("hsk,khd->shd", _softmax(scores), v)


def rms_norm(run: Run) -> Pairs:
    """Check RMSNorm."""
    x, weight = _normal(5, 65), _normal(65)
    return [(run("rms_norm", x, weight, _EPS)[0], _normed(x, weight))]


def add_rms_norm(run: Run) -> Pairs:
    """Check RMSNorm behind a sum."""
    x, residual, weight = _normal(5, 65), _normal(5, 65)[::-1].copy(), _normal(65)
    out, total = run("add_rms_norm", x, residual, weight, _EPS)[:2]
    return [(out, _normed(x + residual, weight)), (total, x + residual)]


def rotary(run: Run) -> Pairs:
    """Check rotary positions."""
    x, angles = _normal(7, 3, 20), _normal(7, 10)
    cos, sin = np.cos(angles), np.sin(angles)
    return [(run("rotary", x, cos[:, None], sin[:, None])[0], _turned(x, cos, sin))]


def swiglu(run: Run) -> Pairs:
    """Check the gate of the feed-forward."""
    gate, up = _normal(5, 65), _normal(5, 66)[:, :65].copy()
    return [(run("swiglu", gate, up)[0], gate / (1 + np.exp(-gate.astype("float64"))) * up)]


def paged_attention(run: Run) -> Pairs:
    """Check attention over a cache whose blocks lie in disorder."""
    T, H, G, D, block = 21, 4, 2, 16, 8
    q, k, v = _normal(T, H, D), _normal(T, G, D), _normal(T, G, D)[::-1].copy()
    caches = [np.zeros([4, block, G, D], "float32") for _ in range(2)]
    table = np.array([[2, 0, 3]], "int32")
    sequence, position = np.zeros(T, "int32"), np.arange(T, dtype="int32")
    found = run("paged_attention", q, k, v, *caches, table, sequence, position)[0]
    return [(found, _attended(q, k, v))]


def flash_attention(run: Run) -> Pairs:
    """Check causal attention over two rows of a batch."""
    q, k, v = _normal(2, 37, 4, 16), _normal(2, 37, 2, 16), _normal(2, 37, 2, 17)[..., 1:].copy()
    expected = np.stack([_attended(*row) for row in zip(q, k, v, strict=True)])
    return [(run("flash_attention", q, k, v, None, None, True)[0], expected)]


def decoder(run: Run) -> Pairs:
    """Check a whole layer: norms, packed products, attention and feed-forward."""
    T, E, F, H, G, D, block = 9, 64, 72, 4, 2, 16, 8
    x, norms = _normal(T, E), [_normal(E), _normal(E + 1)[1:].copy()]
    shapes = ((H + 2 * G) * D, E), (E, H * D), (2 * F, E), (E, F)
    matrices = [_normal(*shape) / 8 for shape in shapes]
    packed = [run("linear_pack", one, None, 0, False, False)[0] for one in matrices]
    frequency = (0.1 ** np.arange(D // 2)).astype("float32")
    caches = [np.zeros([2, block, G, D], "float32") for _ in range(2)]
    position = np.arange(T, dtype="int32")
    tokens = (np.array([[1, 0]], "int32"), np.zeros(T, "int32"), position)
    sizes = ([0] * 4, [0] * 4, H, F, _EPS)
    inputs = (x, frequency, *tokens, [*norms, *packed], caches)
    found = run("decoder", *inputs, *sizes)[0]
    qkv, out, gate_up, down = matrices
    heads = (_normed(x, norms[0]) @ qkv.T).reshape(T, H + 2 * G, D)
    angles = np.outer(position, frequency)
    turned = _turned(heads[:, : H + G], np.cos(angles), np.sin(angles))
    attended = _attended(turned[:, :H], turned[:, H:], heads[:, H + G :])
    total = x + attended.reshape(T, -1) @ out.T
    gate, up = np.split(_normed(total, norms[1]) @ gate_up.T, 2, -1)
    last = total + (gate / (1 + np.exp(-gate)) * up) @ down.T
    # An adapter of the last token's only, beside `down`.
    a, b = _normal(3, F), _normal(3, x.shape[1])
    data, table = np.concatenate([a.ravel(), b.ravel()]), [[3, 0, F, x.shape[1], 3, 0, a.size]]
    rows = np.where(position == T - 1, 0, -1).astype("int32")
    adapter = (rows, [data], [np.array(table)], [np.array([0.5], "float32")])
    adapted = run("adapted_decoder", *inputs, *adapter, *sizes)[0]
    inner = (gate / (1 + np.exp(-gate)) * up)[-1:] @ a.T
    return [(found, last), (adapted, np.concatenate([last[:-1], last[-1:] + 0.5 * inner @ b]))]


def linear(run: Run) -> Pairs:
    """Check a product with a packed matrix, with bias and residual."""
    x, weight, bias, residual = _normal(5, 72), _normal(70, 72), _normal(70), _normal(5, 70)
    data, _ = run("linear_pack", weight, None, 0, False, False)
    found = run("linear", x, data, None, bias, residual, 0, 70)[0]
    ids = np.array([69, 0, 64])
    rows = run("linear_rows", ids, data, None, 0, 70, 72)[0]
    return [(found, x.astype("float64") @ weight.T + bias + residual), (rows, weight[ids])]


def low_rank(run: Run) -> Pairs:
    """Check the products of two adapters beside a linear, for some of its rows and outputs."""
    x, out = _normal(5, 72), _normal(5, 70)
    rows, scales = np.array([1, -1, 0, 1, 0], "int32"), [np.array([2], "float32")] * 2
    factors = [(_normal(3, 72), _normal(3, 65)), (_normal(9, 72), _normal(9, 65))]
    data = [np.concatenate([a.ravel(), b.ravel()]) for a, b in factors]
    tables = [np.array([[7, 4, 72, 65, len(a), 0, a.size]]) for a, _ in factors]
    expected = out.astype("float64")
    for row, adapter in enumerate(rows):
        if adapter >= 0:
            a, b = factors[adapter]
            expected[row, 4:69] += 2 * x[row].astype("float64") @ a.T @ b
    return [(run("low_rank", x, out, rows, data, tables, scales, 7, 0)[0], expected)]


def frozen_matmul(run: Run) -> Pairs:
    """Check products with 8-bit integers in two groups, as they lie and transposed."""
    random = np.random.default_rng(0)
    matrix, scale = random.integers(-127, 128, [70, 48]).astype("int8"), _normal(70, 2) / 64
    wide = matrix.astype("float64") * np.repeat(scale, 24, 1)
    x, grad = _normal(5, 48), _normal(5, 70)
    return [
        (run("frozen_matmul", x, matrix, scale, True, 70)[0], x @ wide.T),
        (run("frozen_matmul", grad, matrix, scale, False, 48)[0], grad @ wide),
    ]


def cross_entropy_statistics(run: Run) -> Pairs:
    """Check what a loss needs of logits."""
    logits, labels = _normal(5, 97), np.array([0, 96, 5, -100, 7])
    top, total, target, best = run("cross_entropy_statistics", logits, labels, 0, True)
    exact = np.exp(logits.astype("float64") - logits.max(-1, keepdims=True)).sum(-1)
    known = np.where(labels >= 0, logits[np.arange(5), labels.clip(0)], 0)
    pairs = [(top, logits.max(-1)), (total, exact), (target, known)]
    return [*pairs, (best, logits.argmax(-1))]


def cross_entropy_residual(run: Run) -> Pairs:
    """Check the gradient of logits."""
    logits, labels, scale = _normal(5, 97), np.array([0, 96, 5, 1, 7]), _normal(5)
    chances = _softmax(logits.astype("float64"))
    denominator = np.log(np.exp(logits.astype("float64")).sum(-1)).astype("float32")
    expected = (chances - np.eye(97)[labels]) * scale[:, None]
    return [(run("cross_entropy_residual", logits, labels, denominator, scale, 0)[0], expected)]


def adamw(run: Run) -> Pairs:
    """Check the first update of two weights."""
    weights, gradients = [_normal(65), _normal(3)], [_normal(66)[:65].copy(), _normal(4)[:3].copy()]
    zeros = [[np.zeros_like(one) for one in weights] for _ in range(2)]
    powers = [[np.array([beta], "float32")] * 2 for beta in (0.9, 0.95)]
    found = run(
        *("adamw", weights, gradients, *zeros, *powers, [0.1, 0.0]),
        *(1e-2, 0.9, 0.95, 1e-8, 1.0),
    )
    step = [1e-2 * g / (np.abs(g) + 1e-8) for g in (one.astype("float64") for one in gradients)]
    expected = [weights[0] * (1 - 1e-2 * np.float64(0.1)) - step[0], weights[1] - step[1]]
    return list(zip(found[: len(weights)], expected, strict=True))


def squares(run: Run) -> Pairs:
    """Check the sum of squares of arrays."""
    arrays = [_normal(65), _normal(3, 5)]
    exact = sum(np.square(one, dtype="float64").sum() for one in arrays)
    return [(run("squares", arrays)[0], np.array(exact))]


def sample(run: Run) -> Pairs:
    """Check a draw: the middle of the sum, and the likeliest of an edited row."""
    logits = _normal(2, 65)
    edited = np.where(logits[1:] < logits[1].max(), logits[1:], -np.inf).astype("float32")
    settings = np.array([[1, 0, 1, 0, 0.5], [0, 0, 1, 0, 0]], "float64")
    tokens, logprobs = run("sample", logits, edited, np.array([-1, 0]), settings)
    shares = _softmax(logits.astype("float64"))
    middle = int(np.searchsorted(np.cumsum(shares[0]), 0.5))
    expected = np.array([middle, np.argsort(logits[1])[-2]])
    return [(tokens, expected), (logprobs, np.log(shares[[0, 1], expected]))]


CHECKS: dict[str, Callable[[Run], Pairs]] = {
    check.__name__: check
    for check in (
        *(rms_norm, add_rms_norm, rotary, swiglu, flash_attention, paged_attention, linear),
        *(cross_entropy_statistics, cross_entropy_residual, adamw, squares, sample, decoder),
        *(frozen_matmul, low_rank),
    )
}
# Operators that the check of another one runs too.
ALSO = {"linear_pack": "linear", "linear_rows": "linear", "adapted_decoder": "decoder"}


def error(pairs: Pairs) -> float:
    """Return the largest error, in units of the largest number that is expected."""
    worst: float | Any = 0.0
    for found, expected in pairs:
        if found.shape != expected.shape:
            return float("inf")
        scale = np.abs(expected).max() or 1.0
        difference = np.abs(found.astype("float64") - expected).max() / scale
        worst = difference if not difference <= worst else worst
    return float(worst)
