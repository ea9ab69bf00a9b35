"""Causal attention by tiles of query rows: what CPUs have in place of flash attention.

B batch, S sequence, P prefix, K = P + S keys, H query heads, G key/value heads, R = H / G, D head
dimension, C rows of a tile. Tiles above the diagonal do not exist, which halves the reference's
work and memory, and batch rows go through Paddle's single-threaded softmax on all cores.
"""

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.nn import functional as F

from external_ops.cpu_threads import join, map_slices
from external_ops.flash_attention import without_padding

_MASKED = -1e30
_TILE = 128


def _tiles(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + _TILE, length)) for start in range(0, length, _TILE)]


def _mask(scores: Tensor, start: int, prefix: int, segments_BS: Tensor | None) -> Tensor:
    """Hide later positions, and other documents, in ``scores [B, G, R, C, seen]``."""
    B, _, _, C, seen = scores.shape
    triangle = paddle.triu(paddle.full([C, C], _MASKED), 1)
    before = seen - C
    if segments_BS is None:
        # Only the last C columns reach the diagonal.
        diagonal = scores[..., before:]
        diagonal = diagonal + triangle.expand_as(diagonal)
        return diagonal if before == 0 else paddle.concat([scores[..., :before], diagonal], -1)
    bias = paddle.concat([paddle.zeros([C, before]), triangle], -1).expand([B, C, seen])
    rows, columns = segments_BS[:, start : start + C], segments_BS[:, : start + C]
    other = (rows.unsqueeze(2) != columns.unsqueeze(1)).astype("float32") * _MASKED
    if prefix:
        other = paddle.concat([paddle.zeros([B, C, prefix]), other], -1)
    bias = (bias + other).reshape([B, 1, 1, C, seen])
    return scores + bias.expand_as(scores)


def _forward(
    q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, segments_BS: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Return the output and what the gradient needs: q, k, v by heads and the tiles' weights."""
    B, S, H, D = q_BSHD.shape
    K, G = k_BKGD.shape[1:3]
    R, prefix = H // G, K - S
    q = (q_BSHD * D**-0.5).reshape([B, S, G, R, D]).transpose([0, 2, 3, 1, 4])
    k, v = k_BKGD.transpose([0, 2, 1, 3]), v_BKGD.transpose([0, 2, 1, 3])
    weights, outs = [], []
    for start, end in _tiles(S):
        seen = prefix + end
        q_tile = q[:, :, :, start:end].reshape([B, G, -1, D])
        scores = paddle.matmul(q_tile, k[:, :, :seen], transpose_y=True)
        scores = _mask(scores.reshape([B, G, R, end - start, seen]), start, prefix, segments_BS)
        weights.append(F.softmax(scores, axis=-1).reshape([B, G, -1, seen]))
        out = paddle.matmul(weights[-1], v[:, :, :seen])
        outs.append(out.reshape([B, G, R, end - start, D]))
    out = paddle.concat(outs, axis=3) if len(outs) > 1 else outs[0]
    return out.transpose([0, 3, 1, 2, 4]).reshape([B, S, H, D]), [q, k, v, *weights]


def _backward(saved: list[Tensor], grad_BSHD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    q, k, v, *weights = saved
    B, G, R, S, D = q.shape
    K = k.shape[2]
    grad = grad_BSHD.reshape([B, S, G, R, D]).transpose([0, 2, 3, 1, 4])
    grad_k, grad_v = paddle.zeros_like(k), paddle.zeros_like(v)
    grads_q = []
    for (start, end), weight in zip(_tiles(S), weights, strict=True):
        seen = weight.shape[-1]
        q_tile = q[:, :, :, start:end].reshape([B, G, -1, D])
        grad_tile = grad[:, :, :, start:end].reshape([B, G, -1, D])
        rest = paddle.zeros([B, G, K - seen, D])
        of_v = paddle.matmul(weight, grad_tile, transpose_x=True)
        grad_v = grad_v + paddle.concat([of_v, rest], axis=2)
        of_weight = paddle.matmul(grad_tile, v[:, :, :seen], transpose_y=True)
        of_scores = paddle._C_ops.softmax_grad(weight, of_weight, -1)
        of_k = paddle.matmul(of_scores, q_tile, transpose_x=True)
        grad_k = grad_k + paddle.concat([of_k, rest], axis=2)
        of_q = paddle.matmul(of_scores, k[:, :, :seen])
        grads_q.append(of_q.reshape([B, G, R, end - start, D]))
    grad_q = (paddle.concat(grads_q, axis=3) * D**-0.5).transpose([0, 3, 1, 2, 4])
    back = [0, 2, 1, 3]
    return grad_q.reshape([B, S, G * R, D]), grad_k.transpose(back), grad_v.transpose(back)


class _TiledAttention(PyLayer):
    @staticmethod
    def forward(ctx, q_BSHD, k_BKGD, v_BKGD, segments_BS):
        def part(rows: slice) -> tuple[Tensor, list[Tensor]]:
            segments = None if segments_BS is None else segments_BS[rows]
            return _forward(q_BSHD[rows], k_BKGD[rows], v_BKGD[rows], segments)

        parts = map_slices(part, q_BSHD.shape[0])
        ctx.frozen = [x.stop_gradient for x in (q_BSHD, k_BKGD, v_BKGD)]
        ctx.parts = [saved for _, saved in parts]
        return join([out for out, _ in parts])

    @staticmethod
    def backward(ctx, grad):
        sizes = [saved[0].shape[0] for saved in ctx.parts]
        grads = paddle.split(grad, sizes) if len(sizes) > 1 else [grad]

        def part(index: slice) -> tuple[Tensor, ...]:
            return _backward(ctx.parts[index.start], grads[index.start])

        each = map_slices(part, len(sizes))
        joined = [join(list(of_input)) for of_input in zip(*each, strict=True)]
        # Paddle wants None for an input that is not trained.
        return tuple(None if f else g for f, g in zip(ctx.frozen, joined, strict=True))


def causal_attention_tiled(
    q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, segments_BS: Tensor | None = None
) -> Tensor:
    """Compute ``flash_attention.causal_attention_ref`` tile by tile, in float32.

    Args:
        q_BSHD: queries.
        k_BKGD: keys; the first ``K - S`` are a prefix that every query sees.
        v_BKGD: values.
        segments_BS: document number of each position in a packed row; None is one document;
            negative is padding.

    Returns:
        ``[B, S, H, D]``.
    """
    out = _TiledAttention.apply(q_BSHD, k_BKGD, v_BKGD, segments_BS)
    return without_padding(out, segments_BS)
