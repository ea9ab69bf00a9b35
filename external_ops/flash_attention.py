"""Causal attention over whole sequences, for training and for scoring text.

B batch, S sequence, H query heads, G key/value heads, R = H / G, D head dimension. Grouped-query
attention (Ainslie et al. 2023) shares a key/value head among R query heads without repeating it.
"""

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.nn import functional as F

_MASKED = -1e30


def _bias(length: int, segments_BS: Tensor | None) -> Tensor:
    """Return 0 where a query may look and a large negative where not, ``[1 or B, 1, 1, S, S]``."""
    allowed = paddle.tril(paddle.ones([length, length], dtype="bool")).reshape(
        [1, 1, 1, length, length]
    )
    if segments_BS is not None:
        same = segments_BS.unsqueeze(2) == segments_BS.unsqueeze(1)
        allowed = paddle.logical_and(allowed, same.reshape([-1, 1, 1, length, length]))
    return paddle.where(allowed, paddle.zeros([1]), paddle.full([1], _MASKED))


def causal_attention_ref(
    q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, segments_BS: Tensor | None = None
) -> Tensor:
    """Attend to earlier positions of the same segment; materialises all scores.

    Args:
        q_BSHD: queries.
        k_BSGD: keys.
        v_BSGD: values.
        segments_BS: document number of each position in a packed row; None is one document.

    Returns:
        ``[B, S, H, D]`` in the type of the queries; softmax is in float32.
    """
    B, S, H, D = q_BSHD.shape
    G = k_BSGD.shape[2]
    R = H // G
    # Scaling the queries touches S*D numbers per head instead of S*S.
    q = (q_BSHD * D**-0.5).transpose([0, 2, 1, 3]).reshape([B, G, R * S, D])
    k, v = k_BSGD.transpose([0, 2, 1, 3]), v_BSGD.transpose([0, 2, 1, 3])
    scores = paddle.matmul(q, k, transpose_y=True).astype("float32").reshape([B, G, R, S, S])
    bias = _bias(S, segments_BS).expand_as(scores)
    weights = F.softmax(scores + bias, axis=-1).astype(v.dtype)
    out = paddle.matmul(weights.reshape([B, G, R * S, S]), v)
    return out.reshape([B, H, S, D]).transpose([0, 2, 1, 3])


class _TiledAttention(PyLayer):
    """Causal attention by tiles of query rows; tiles above the diagonal are never computed.

    The last ``tile`` columns of a tile's scores hold the diagonal and get the triangular mask; the
    columns before it need none, unless rows are packed documents.
    """

    tile = 128

    @classmethod
    def _rows(cls, length: int) -> list[tuple[int, int]]:
        return [(i, min(i + cls.tile, length)) for i in range(0, length, cls.tile)]

    @staticmethod
    def _mask(
        scores: Tensor, start: int, end: int, segments_BS: Tensor | None, heads: tuple[int, int]
    ) -> Tensor:
        """Hide later positions, and other documents, in ``scores [B, G, R * C, end]``."""
        B, G, rows, _ = scores.shape
        R, C = heads[0] // heads[1], end - start
        triangle = paddle.triu(paddle.full([C, C], _MASKED), 1)
        if segments_BS is None:
            diagonal = scores[..., start:].reshape([B, G, R, C, C])
            diagonal = (diagonal + triangle.expand_as(diagonal)).reshape([B, G, rows, C])
            return diagonal if start == 0 else paddle.concat([scores[..., :start], diagonal], -1)
        bias = paddle.concat([paddle.zeros([C, start]), triangle], -1).expand([B, C, end])
        other = segments_BS[:, start:end].unsqueeze(2) != segments_BS[:, :end].unsqueeze(1)
        bias = (bias + other.astype("float32") * _MASKED).reshape([B, 1, 1, C, end])
        return scores + bias.expand([B, G, R, C, end]).reshape(scores.shape)

    @staticmethod
    def forward(ctx, q_BSHD, k_BSGD, v_BSGD, segments_BS):
        cls = _TiledAttention
        B, S, H, D = q_BSHD.shape
        G = k_BSGD.shape[2]
        R = H // G
        q = (q_BSHD * D**-0.5).reshape([B, S, G, R, D]).transpose([0, 2, 3, 1, 4])
        k, v = k_BSGD.transpose([0, 2, 1, 3]), v_BSGD.transpose([0, 2, 1, 3])
        weights, outs = [], []
        for start, end in cls._rows(S):
            q_tile = q[:, :, :, start:end].reshape([B, G, -1, D])
            scores = paddle.matmul(q_tile, k[:, :, :end], transpose_y=True)
            scores = cls._mask(scores, start, end, segments_BS, (H, G))
            weights.append(F.softmax(scores, axis=-1))
            out = paddle.matmul(weights[-1], v[:, :, :end])
            outs.append(out.reshape([B, G, R, end - start, D]))
        ctx.save_for_backward(q, k, v, *weights)
        ctx.frozen = [x.stop_gradient for x in (q_BSHD, k_BSGD, v_BSGD)]
        out = paddle.concat(outs, axis=3) if len(outs) > 1 else outs[0]
        return out.transpose([0, 3, 1, 2, 4]).reshape([B, S, H, D])

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *weights = ctx.saved_tensor()
        B, G, R, S, D = q.shape
        grad = grad.reshape([B, S, G, R, D]).transpose([0, 2, 3, 1, 4])
        grad_k, grad_v = paddle.zeros_like(k), paddle.zeros_like(v)
        grads_q = []
        for (start, end), weight in zip(_TiledAttention._rows(S), weights, strict=True):
            q_tile = q[:, :, :, start:end].reshape([B, G, -1, D])
            grad_tile = grad[:, :, :, start:end].reshape([B, G, -1, D])
            rest = paddle.zeros([B, G, S - end, D])
            of_v = paddle.matmul(weight, grad_tile, transpose_x=True)
            grad_v = grad_v + paddle.concat([of_v, rest], axis=2)
            of_weight = paddle.matmul(grad_tile, v[:, :, :end], transpose_y=True)
            of_scores = paddle._C_ops.softmax_grad(weight, of_weight, -1)
            of_k = paddle.matmul(of_scores, q_tile, transpose_x=True)
            grad_k = grad_k + paddle.concat([of_k, rest], axis=2)
            of_q = paddle.matmul(of_scores, k[:, :, :end])
            grads_q.append(of_q.reshape([B, G, R, end - start, D]))
        grad_q = (paddle.concat(grads_q, axis=3) * D**-0.5).transpose([0, 3, 1, 2, 4])
        grads = (
            grad_q.reshape([B, S, G * R, D]),
            grad_k.transpose([0, 2, 1, 3]),
            grad_v.transpose([0, 2, 1, 3]),
        )
        # Paddle wants None for an input that is not trained, as most are beside an adapter.
        return tuple(None if frozen else one for frozen, one in zip(ctx.frozen, grads, strict=True))


def causal_attention_tiled(
    q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, segments_BS: Tensor | None = None
) -> Tensor:
    """Compute :func:`causal_attention_ref` tile by tile in float32; what CPUs have for flash.

    About half of the reference's exponentials and memory: tiles above the diagonal do not exist.
    """
    return _TiledAttention.apply(q_BSHD, k_BSGD, v_BSGD, segments_BS)


def causal_attention_gpu(
    q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, segments_BS: Tensor | None = None
) -> Tensor:
    """Compute :func:`causal_attention_ref` with FlashAttention 2 (Dao 2023); fp16 and bf16 only.

    Packed documents go through FlashMask, whose mask is one row number per column: the first row
    that may no longer look back at it.
    """
    from paddle.nn.functional import flash_attention as flash

    if segments_BS is None:
        return flash.flash_attention(q_BSHD, k_BSGD, v_BSGD, causal=True)[0]
    length = segments_BS.shape[1]
    same = segments_BS.unsqueeze(2) == segments_BS.unsqueeze(1)
    rows = paddle.arange(1, length + 1, dtype="int32")
    first_hidden_row = paddle.max(same.astype("int32") * rows, axis=-1)
    return flash.flashmask_attention(
        q_BSHD, k_BSGD, v_BSGD, first_hidden_row.reshape([-1, 1, length, 1]), causal=True
    )
