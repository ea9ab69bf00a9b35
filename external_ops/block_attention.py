"""Attention of some queries to some keys, in pieces that add up to attention over all keys.

Each piece returns the logarithm of its softmax's denominator beside its output; with those, outputs
are put together (the online softmax of Milakov and Gimelshein 2018), and gradients are taken piece
by piece given the denominator over all keys (FlashAttention, Dao et al. 2022). Query rows go in
tiles, so that scores take memory for one tile at a time.

B batch, S query rows, K keys, H query heads, G key/value heads, R = H / G, D head dimension.
Queries are ``[B, G, R, S, D]`` and keys ``[B, G, K, D]``.
"""

from dataclasses import dataclass

import paddle
from paddle import Tensor

_MASKED = -1e30
_TILE = 512


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees.

    Args:
        causal: query i sees keys 0 … i; as many queries as keys.
        rows: ``[B, S]``, document of each query; keys of others are hidden. None hides none.
        columns: ``[B, K]``, document of each key.
    """

    causal: bool = False
    rows: Tensor | None = None
    columns: Tensor | None = None


ALL = Mask()


def by_heads(q_BSHD: Tensor, groups: int) -> Tensor:
    """Return queries as ``[B, G, R, S, D]``."""
    B, S, H, D = q_BSHD.shape
    return q_BSHD.reshape([B, S, groups, H // groups, D]).transpose([0, 2, 3, 1, 4])


def by_rows(x_BGRSD: Tensor) -> Tensor:
    """Return what :func:`by_heads` took, ``[B, S, H, D]``."""
    B, G, R, S, D = x_BGRSD.shape
    return x_BGRSD.transpose([0, 3, 1, 2, 4]).reshape([B, S, G * R, D])


def _tiles(rows: int, keys: int, mask: Mask) -> list[tuple[int, int, int]]:
    """Return start and end of each tile, and how many keys it can see."""
    ends = [(start, min(start + _TILE, rows)) for start in range(0, rows, _TILE)]
    return [(start, end, end if mask.causal else keys) for start, end in ends]


def _scores(q_BGRCD: Tensor, k_BGKD: Tensor, mask: Mask, start: int) -> Tensor:
    """Return float32 scores ``[B, G, R, C, K]`` of scaled queries, hidden ones very negative."""
    B, G, R, C, D = q_BGRCD.shape
    K = k_BGKD.shape[2]
    scores = paddle.matmul(q_BGRCD.reshape([B, G, R * C, D]), k_BGKD, transpose_y=True)
    scores = scores.astype("float32").reshape([B, G, R, C, K])
    if mask.causal:
        hidden = paddle.triu(paddle.full([C, K], _MASKED), start + 1)
        scores = scores + hidden.expand_as(scores)
    if mask.rows is not None and mask.columns is not None:
        documents = mask.rows[:, start : start + C].unsqueeze(2)
        other = (documents != mask.columns[:, :K].unsqueeze(1)).astype("float32") * _MASKED
        scores = scores + other.reshape([B, 1, 1, C, K]).expand_as(scores)
    return scores


def block_forward(
    q_BGRSD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, mask: Mask = ALL
) -> tuple[Tensor, Tensor]:
    """Attend to a block of keys.

    Args:
        q_BGRSD: queries, scaled.
        k_BGKD: keys.
        v_BGKD: values.
        mask: which keys a query sees. A query that sees none returns numbers without meaning, and
            a logarithm so negative that :func:`merge` leaves them out.

    Returns:
        float32 output ``[B, G, R, S, D]``, and the logarithm of the softmax's denominator
        ``[B, G, R, S, 1]``.
    """
    B, G, R, S, D = q_BGRSD.shape
    outs, logs = [], []
    for start, end, seen in _tiles(S, k_BGKD.shape[2], mask):
        scores = _scores(q_BGRSD[:, :, :, start:end], k_BGKD[:, :, :seen], mask, start)
        peak = scores.max(-1, keepdim=True)
        weights = paddle.exp(scores - peak)
        denominator = weights.sum(-1, keepdim=True)
        out = paddle.matmul(weights.astype(v_BGKD.dtype).flatten(2, 3), v_BGKD[:, :, :seen])
        outs.append(out.astype("float32").reshape([B, G, R, end - start, D]) / denominator)
        logs.append(peak + paddle.log(denominator))
    return paddle.concat(outs, axis=3), paddle.concat(logs, axis=3)


def merge(out: Tensor, log: Tensor, out_2: Tensor, log_2: Tensor) -> tuple[Tensor, Tensor]:
    """Put two results of :func:`block_forward` together; every row has seen a key in the first."""
    total = paddle.logaddexp(log, log_2)
    return out * paddle.exp(log - total) + out_2 * paddle.exp(log_2 - total), total


def block_backward(
    q_BGRSD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    grad_BGRSD: Tensor,
    total: Tensor,
    product: Tensor,
    mask: Mask = ALL,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a block's part of the gradients of scaled queries, of keys and of values, in float32.

    Args:
        q_BGRSD: as of :func:`block_forward`.
        k_BGKD: likewise.
        v_BGKD: likewise.
        grad_BGRSD: gradient of the output over all keys.
        total: ``[B, G, R, S, 1]``, logarithm of the denominator over all keys.
        product: ``[B, G, R, S, 1]``, sum over D of gradient times output over all keys.
        mask: as of :func:`block_forward`.
    """
    B, G, R, S, D = q_BGRSD.shape
    dtype = k_BGKD.dtype
    grad_k = paddle.zeros(k_BGKD.shape, dtype="float32")
    grad_v = paddle.zeros(v_BGKD.shape, dtype="float32")
    grads_q = []
    for start, end, seen in _tiles(S, k_BGKD.shape[2], mask):
        k, v = k_BGKD[:, :, :seen], v_BGKD[:, :, :seen]
        q = q_BGRSD[:, :, :, start:end]
        grad = grad_BGRSD[:, :, :, start:end].flatten(2, 3)
        rows = [B, G, R, end - start, seen]
        weights = paddle.exp(_scores(q, k, mask, start) - total[:, :, :, start:end])
        of_weights = paddle.matmul(grad, v, transpose_y=True).astype("float32").reshape(rows)
        of_scores = weights * (of_weights - product[:, :, :, start:end])
        of_scores, weights = (x.astype(dtype).flatten(2, 3) for x in (of_scores, weights))
        grads_q.append(paddle.matmul(of_scores, k).reshape([B, G, R, end - start, D]))
        of_k = paddle.matmul(of_scores, q.flatten(2, 3), transpose_x=True)
        grad_k[:, :, :seen] += of_k.astype("float32")
        grad_v[:, :, :seen] += paddle.matmul(weights, grad, transpose_x=True).astype("float32")
    return paddle.concat(grads_q, axis=3).astype("float32"), grad_k, grad_v
