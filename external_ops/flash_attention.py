"""Causal attention over whole sequences, for training and for scoring text.

B batch, S sequence, H query heads, G key/value heads, R = H / G, D head dimension. Grouped-query
attention (Ainslie et al. 2023) shares a key/value head among R query heads without repeating it.
"""

import paddle
from paddle import Tensor
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
