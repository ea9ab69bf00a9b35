"""Flash attention and its gradients against float64; see cuda_checks.py for the rule.

B batch, S queries, K keys, P prefix, H query heads, G key/value heads, D head size.
"""

from dataclasses import dataclass

import numpy as np

from tests.native.cuda_checks import Arrays, Checked, compare, normals
from tests.native.cuda_interface import EVERY_SEGMENT, CudaOps
from tests.native.storage import rounded


@dataclass(frozen=True)
class Case:
    """One call: ``documents`` are the lengths of what a row packs, -n for n of padding."""

    queries: int
    size: int
    heads: int = 2
    groups: int = 1
    prefix: int = 0
    extra_keys: int = 0  # keys after the last that any query sees
    documents: tuple[tuple[int, ...], ...] | None = None
    every: bool = True  # the prefix is seen by all documents, or belongs to the first
    dtype: str = "bfloat16"
    seed: int = 0

    @property
    def batch(self) -> int:
        """Rows."""
        return 2 if self.documents is None else len(self.documents)

    @property
    def keys(self) -> int:
        """Keys of a row."""
        return self.queries + self.prefix + self.extra_keys

    def segments(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Return the document numbers of queries and keys."""
        if self.documents is None:
            return None, None
        rows = []
        for lengths in self.documents:
            parts = [np.full(abs(n), i if n > 0 else -1) for i, n in enumerate(lengths)]
            rows.append(np.concatenate(parts))
        queries = np.array(rows, np.int32)
        first = EVERY_SEGMENT if self.every else 0
        keys = np.full((len(rows), self.keys), 0, np.int32)
        keys[:, : self.prefix] = first
        keys[:, self.prefix : self.prefix + self.queries] = queries
        return queries, keys

    def visible(self) -> np.ndarray:
        """Return which keys each query sees, ``[B, 1, S, K]``."""
        at_S, at_K = np.arange(self.queries), np.arange(self.keys)
        seen = np.broadcast_to(
            at_K <= self.prefix + at_S[:, None], (self.batch, self.queries, self.keys)
        )
        queries, keys = self.segments()
        if queries is not None and keys is not None:
            same = (keys[:, None] == queries[..., None]) | (keys[:, None] == EVERY_SEGMENT)
            seen = seen & same & (queries[..., None] >= 0)
        return seen[:, None]


def _attention(
    case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, grad: np.ndarray, dtype: str | None
) -> dict[str, np.ndarray]:
    """Materialise all scores; with a type, round every array as plain operators store it.

    ``terms`` is the size of what cancels in the gradients of scores.
    """

    def store(x: np.ndarray) -> np.ndarray:
        return x if dtype is None else rounded(x, dtype)

    kind = np.float64 if dtype is None else np.float32
    shared = case.heads // case.groups
    q, grad = (a.astype(kind).transpose(0, 2, 1, 3) for a in (q, grad))
    k, v = (np.repeat(a.astype(kind), shared, axis=2).transpose(0, 2, 1, 3) for a in (k, v))
    scale, seen = kind(case.size**-0.5), case.visible()
    scores = store(store(q * scale) @ k.swapaxes(-1, -2))
    scores = np.where(seen, scores, -np.inf)
    most = np.max(scores, -1, keepdims=True, initial=-1e30)
    powers = np.where(seen, np.exp(scores - most), 0)
    total = powers.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (most + np.log(total))[..., 0]
    weights = powers / np.where(total == 0, 1, total)
    stored = store(weights)
    up = store(grad @ v.swapaxes(-1, -2))
    through = store(weights * (up - np.sum(up * weights, -1, keepdims=True)))

    def of_groups(x: np.ndarray) -> np.ndarray:
        parts = x.reshape(case.batch, case.groups, shared, case.keys, case.size)
        return store(parts.sum(2).transpose(0, 2, 1, 3))

    return {
        "out": store(stored @ v).transpose(0, 2, 1, 3),
        "lse": lse,
        "grad_q": store(store(through @ k) * scale).transpose(0, 2, 1, 3),
        "grad_k": of_groups(store(through.swapaxes(-1, -2) @ store(q * scale))),
        "grad_v": of_groups(store(stored.swapaxes(-1, -2) @ grad)),
        "terms": np.abs(up).max() * scale * max(np.abs(q).max(), np.abs(k).max()),
    }


def check_attention(ops: CudaOps, arrays: Arrays, case: Case) -> Checked:
    """Check the output, lse and all gradients; what sees nothing has to be exactly 0."""
    rng = np.random.default_rng(case.seed)
    dtype, queries = case.dtype, (case.batch, case.queries, case.heads, case.size)
    keys = (case.batch, case.keys, case.groups, case.size)
    q, k, v, grad = (normals(rng, dtype, *shape) for shape in (queries, keys, keys, queries))
    segments = [None if s is None else arrays.integers(s) for s in case.segments()]
    put_q, put_k, put_v, put_grad = (arrays.put(a, dtype) for a in (q, k, v, grad))
    out, lse, called = ops.attention(put_q, put_k, put_v, *segments, case.prefix, dtype)
    gradients = ops.attention_backward(put_q, put_k, called, put_grad, dtype)
    exact = _attention(case, q, k, v, grad, None)
    plain = _attention(case, q, k, v, grad, dtype)
    names = ("out", "grad_q", "grad_k", "grad_v")
    values = dict(zip(names, (arrays.get(a, dtype) for a in (out, *gradients)), strict=True))
    seen = case.visible()[:, 0]
    blind_rows, unseen_keys = ~seen.any(2), ~seen.any(1)
    for name, value in values.items():
        hidden = blind_rows if name in ("out", "grad_q") else unseen_keys
        np.testing.assert_array_equal(value[hidden], 0, err_msg=name)
    value_lse = arrays.get(lse, "float32")
    blind = np.isneginf(exact["lse"])
    np.testing.assert_array_equal(np.isneginf(value_lse), blind)
    triples = {n: (values[n], plain[n], exact[n]) for n in names}
    triples["lse"] = value_lse[~blind], plain["lse"][~blind], exact["lse"][~blind]
    return compare(float(exact["terms"]), **triples)
