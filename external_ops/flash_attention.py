"""Causal attention over whole sequences, for training and for scoring text.

B batch, S sequence, P prefix, K = P + S keys, H query heads, G key/value heads, R = H / G, D head
dimension. Grouped-query attention (Ainslie et al. 2023) shares a key/value head among R query heads
without repeating it. Keys in excess of the queries come first and are a prefix that every query
sees, whatever its document (prefix tuning, Li and Liang 2021).
"""

import paddle
from paddle import Tensor
from paddle.nn import functional as F

from external_ops import native

_MASKED = -1e30
EVERY_SEGMENT = -(2**31)  # of keys that queries of every segment see
_FLASH_TYPES = (paddle.float16, paddle.bfloat16)  # that FlashAttention has kernels for


def _bias(length: int, prefix: int, segments_BS: Tensor | None) -> Tensor:
    """Return 0 where a query may look and a large negative where not, ``[1 or B, 1, 1, S, K]``."""
    keys = prefix + length
    allowed = paddle.tril(paddle.ones([length, keys], dtype="bool"), prefix).unsqueeze(0)
    if segments_BS is not None:
        same = segments_BS.unsqueeze(2) == segments_BS.unsqueeze(1)
        if prefix:
            seen = paddle.ones([same.shape[0], length, prefix], dtype="bool")
            same = paddle.concat([seen, same], axis=-1)
        allowed = paddle.logical_and(allowed, same)
    allowed = allowed.reshape([-1, 1, 1, length, keys])
    return paddle.where(allowed, paddle.zeros([1]), paddle.full([1], _MASKED))


def without_padding(out_BSHD: Tensor, segments_BS: Tensor | None) -> Tensor:
    """Set the output of padding, whose segment is negative, to zero, and so its gradients."""
    if segments_BS is None:
        return out_BSHD
    kept = (segments_BS >= 0).astype(out_BSHD.dtype)
    return out_BSHD * kept.reshape([*segments_BS.shape, 1, 1])


def causal_attention_ref(
    q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, segments_BS: Tensor | None = None
) -> Tensor:
    """Attend to a prefix and earlier positions of the same segment; materialises all scores.

    Args:
        q_BSHD: queries.
        k_BKGD: keys; the first ``K - S`` are the prefix.
        v_BKGD: values.
        segments_BS: document number of each position in a packed row; None is one document. Where
            it is negative there is padding, which sees nothing: its output is zero.

    Returns:
        ``[B, S, H, D]`` in the type of the queries; softmax is in float32.
    """
    B, S, H, D = q_BSHD.shape
    K, G = k_BKGD.shape[1:3]
    R = H // G
    # Scaling the queries touches S*D numbers per head instead of S*S.
    q = (q_BSHD * D**-0.5).transpose([0, 2, 1, 3]).reshape([B, G, R * S, D])
    k, v = k_BKGD.transpose([0, 2, 1, 3]), v_BKGD.transpose([0, 2, 1, 3])
    scores = paddle.matmul(q, k, transpose_y=True).astype("float32").reshape([B, G, R, S, K])
    bias = _bias(S, K - S, segments_BS).expand_as(scores)
    weights = F.softmax(scores + bias, axis=-1).astype(v.dtype)
    out = paddle.matmul(weights.reshape([B, G, R * S, K]), v)
    return without_padding(out.reshape([B, H, S, D]).transpose([0, 2, 1, 3]), segments_BS)


@paddle.no_grad()
def first_hidden_rows(segments_BS: Tensor, prefix: int = 0) -> Tensor:
    """Return for each key the first row that may no longer look back at it: FlashMask's mask.

    A document is a run of one number, so what is wanted is where the run ends. Runs are counted and
    searched for in their own list, which takes memory that grows with S.

    Args:
        segments_BS: document number of each position, the same for positions side by side.
        prefix: P, keys before the queries, which every row sees.

    Returns:
        int32 ``[B, 1, P + S, 1]``, counted from the first row of the prefix.
    """
    batch, length = segments_BS.shape
    first = paddle.ones([batch, 1], dtype="int64")
    changes = (segments_BS[:, 1:] != segments_BS[:, :-1]).astype("int64")
    runs = paddle.cumsum(paddle.concat([first, changes], axis=1), axis=1)
    rows = prefix + paddle.searchsorted(runs, runs, out_int32=True, right=True)
    if prefix:
        never = paddle.full([batch, prefix], prefix + length, dtype="int32")
        rows = paddle.concat([never, rows], axis=1)
    return rows.reshape([-1, 1, prefix + length, 1])


def _bounds_of_batch(segments_BS: Tensor, prefix: int) -> Tensor:
    """Return :func:`first_hidden_rows`, computed by the first layer of those that share a batch."""
    known = getattr(segments_BS, "first_hidden_rows", None)
    if known is None or known[0] != prefix:
        known = prefix, first_hidden_rows(segments_BS, prefix)
        segments_BS.first_hidden_rows = known  # goes when the batch goes
    return known[1]


def causal_attention_gpu(
    q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, segments_BS: Tensor | None = None
) -> Tensor:
    """Compute :func:`causal_attention_ref` with FlashAttention 2 (Dao 2023).

    It is there for float16 and bfloat16 only; float32 runs the reference. Packed documents go
    through FlashMask, whose mask is one row number per column (:func:`first_hidden_rows`).
    """
    from paddle.nn.functional import flash_attention as flash

    if v_BKGD.dtype not in _FLASH_TYPES:
        return causal_attention_ref(q_BSHD, k_BKGD, v_BKGD, segments_BS)
    # Mixed precision rotates queries and keys in float32, and casts them for some kernels only.
    q_BSHD, k_BKGD = q_BSHD.astype(v_BKGD.dtype), k_BKGD.astype(v_BKGD.dtype)
    batch, length = q_BSHD.shape[:2]
    prefix = k_BKGD.shape[1] - length
    # Rows before the queries, thrown away again: releases of FlashAttention differ in where they
    # put the diagonal of fewer rows than columns, and FlashMask wants as many.
    q = q_BSHD
    if prefix:
        rows_before = paddle.zeros([batch, prefix, *q.shape[2:]], dtype=q.dtype)
        q = paddle.concat([rows_before, q], axis=1)
    if segments_BS is None:
        out = flash.flash_attention(q, k_BKGD, v_BKGD, causal=True)[0]
        return out[:, prefix:] if prefix else out
    bounds = _bounds_of_batch(segments_BS, prefix)
    out = flash.flashmask_attention(q, k_BKGD, v_BKGD, bounds, causal=True)
    return without_padding(out[:, prefix:] if prefix else out, segments_BS)


def causal_attention_native(
    q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, segments_BS: Tensor | None = None
) -> Tensor:
    """Compute :func:`causal_attention_ref` with the kernel of csrc/cpu/flash_attention.cc.

    Forward and backward take memory that grows with S, not with its square. Segment numbers have
    to fit into 31 bits.

    Raises:
        ValueError: shapes that do not fit together, or a type other than float32 and bfloat16.
    """
    segments, key_segments = None, None
    if segments_BS is not None:
        segments = key_segments = segments_BS.astype("int32")
        prefix = k_BKGD.shape[1] - q_BSHD.shape[1]
        if prefix:
            seen = paddle.full([segments.shape[0], prefix], EVERY_SEGMENT, dtype="int32")
            key_segments = paddle.concat([seen, segments], axis=1)
    causal = True
    return native.run("flash_attention", q_BSHD, k_BKGD, v_BKGD, segments, key_segments, causal)[0]
