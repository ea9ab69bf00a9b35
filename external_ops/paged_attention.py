"""Attention of packed tokens over a paged key/value cache (Kwon et al. 2023, vLLM).

T packed tokens of N sequences in one step, prompts and single decoded tokens mixed. Sequence ``n``
owns the cache blocks in row ``n`` of the block table; its position ``p`` lies in block
``block_table[n, p // block]`` at offset ``p % block``.
"""

import paddle
from paddle import Tensor
from paddle.nn import functional as F

from external_ops import native

_MASKED = -1e30


def _rows_of_sequences(sequence_T: Tensor, num_sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's place among the tokens of its sequence, and the most of any sequence."""
    sequences = paddle.arange(num_sequences, dtype="int32")
    first_N = paddle.searchsorted(sequence_T, sequences)
    place_T = paddle.arange(paddle.shape(sequence_T)[0], dtype="int64") - paddle.gather(
        first_N.astype("int64"), sequence_T
    )
    return place_T, paddle.max(place_T) + 1


def paged_attention_ref(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table_NM: Tensor,
    sequence_T: Tensor,
    position_T: Tensor,
) -> Tensor:
    """Write the step's keys and values into the cache in place, then attend causally.

    Args:
        q_THD: rotated queries of the packed tokens.
        k_TGD: rotated keys.
        v_TGD: values.
        k_cache: ``[blocks, block, G, D]``; written in place.
        v_cache: ``[blocks, block, G, D]``; written in place.
        block_table_NM: int32, block numbers of each sequence, wide enough for its last position.
        sequence_T: int32, the sequence of each token; ascending.
        position_T: int32, position of each token; ascending within a sequence, and all earlier
            positions are in the cache or in this step.

    Returns:
        ``[T, H, D]`` in the type of the queries, which is that of keys, values and caches; softmax
        is in float32.
    """
    H, D = q_THD.shape[1:]
    block, G = k_cache.shape[1:3]
    R = H // G
    owner_T = paddle.index_sample(
        paddle.gather(block_table_NM, sequence_T), (position_T // block).unsqueeze(1)
    ).squeeze(1)
    slot = (owner_T.astype("int64"), (position_T % block).astype("int64"))
    k_cache = paddle.index_put_(k_cache, slot, k_TGD)
    v_cache = paddle.index_put_(v_cache, slot, v_TGD)

    N = paddle.shape(block_table_NM)[0]
    place_T, Q = _rows_of_sequences(sequence_T, N)
    # Tokens become rows of [N, Q]: attention is one batched product however ragged the step is.
    row_T = sequence_T.astype("int64") * Q + place_T
    no_rows = paddle.zeros([N * Q, H * D], q_THD.dtype)
    q_rows = paddle.scatter(no_rows, row_T, q_THD.reshape([-1, H * D]))
    limit = paddle.scatter(paddle.zeros([N * Q], "int32"), row_T, position_T)
    q = (q_rows * D**-0.5).reshape([N, Q, G, R, D]).transpose([0, 2, 3, 1, 4])
    q = q.reshape([N, G, R * Q, D])

    flat_table = block_table_NM.flatten()
    k = paddle.gather(k_cache, flat_table).reshape([N, -1, G, D]).transpose([0, 2, 1, 3])
    v = paddle.gather(v_cache, flat_table).reshape([N, -1, G, D]).transpose([0, 2, 1, 3])
    L = paddle.shape(k)[2]
    hidden = paddle.arange(L, dtype="int32").reshape([1, 1, -1]) > limit.reshape([N, Q, 1])
    bias = (hidden.astype("float32") * _MASKED).reshape([N, 1, 1, Q, L]).expand([N, G, R, Q, L])
    scores = paddle.matmul(q, k, transpose_y=True).astype("float32").reshape([N, G, R, Q, L])
    weights = F.softmax(scores + bias, axis=-1).astype(v.dtype).reshape([N, G, R * Q, L])
    out = paddle.matmul(weights, v).reshape([N, G, R, Q, D]).transpose([0, 3, 1, 2, 4])
    return paddle.gather(out.reshape([N * Q, H * D]), row_T).reshape([-1, H, D])


def paged_attention_native(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table_NM: Tensor,
    sequence_T: Tensor,
    position_T: Tensor,
) -> Tensor:
    """Compute :func:`paged_attention_ref` with the kernel of csrc/cpu/paged_attention.cc.

    The caches may also be bfloat16. A token whose sequence or position is negative is padding:
    nothing is written for it and its output is 0.

    Raises:
        ValueError: shapes that do not fit, a sequence without a row in the block table, a position
            past its end, or a block that the cache does not have.
    """
    tensors = (q_THD, k_TGD, v_TGD, k_cache, v_cache, block_table_NM, sequence_T, position_T)
    return native.run("paged_attention", *tensors)[0]
