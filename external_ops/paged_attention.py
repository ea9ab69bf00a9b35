"""Attention of packed tokens over a paged key/value cache (Kwon et al. 2023, vLLM).

T packed tokens of N sequences in one step, prompts and single decoded tokens mixed. Sequence ``n``
owns the cache blocks in row ``n`` of the block table; its position ``p`` lies in block
``block_table[n, p // block]`` at offset ``p % block``.

A cache of int8 holds each head as D integers and behind them the four bytes of a float32 that they
are multiplied by, its largest number / 127: what is cached depends on its own token alone.
"""

import paddle
from paddle import Tensor
from paddle.nn import functional as F

from external_ops import native

_MASKED = -1e30
CACHE_DTYPES = ("float32", "bfloat16", "int8")
_SCALE_BYTES = 4
_SMALLEST_SCALE = 1e-30


def stored_dim(head_dim: int, dtype: str) -> int:
    """Return how many numbers of a cache of this type hold a head."""
    return head_dim + (_SCALE_BYTES if dtype == "int8" else 0)


# Of float32: bits of the fraction, and what the exponent 0 is stored as.
_FRACTION, _EXPONENT = 1 << 23, 127
_NAN_BITS = 0x7FC00000


def _bytes_of(scale: Tensor, known: Tensor) -> Tensor:
    """Return the four bytes of positive float32 ``[..., 1]`` as int8 ``[..., 4]``.

    By arithmetic: Paddle views a tensor in another type only eagerly, and with stride kernels.

    Args:
        scale: none of them infinite.
        known: bool; where it is not, the bytes are NaN's.
    """
    mantissa, exponent = paddle.frexp(scale)
    fraction = (mantissa * (2 * _FRACTION)).astype("int32") - _FRACTION
    bits = (exponent.astype("int32") + (_EXPONENT - 1)) * _FRACTION + fraction
    bits = paddle.where(known, bits, paddle.full_like(bits, _NAN_BITS))
    parts = [bits // 256**place % 256 for place in range(4)]
    return ((paddle.concat(parts, axis=-1) + 128) % 256 - 128).astype("int8")


def _scale_of(numbers: Tensor) -> Tensor:
    """Return the float32 ``[..., 1]`` whose bytes these are: 0 where all are 0, infinity for NaN.

    Integers beside NaN are 0, and 0 times infinity is NaN; a program cannot hold it as a number.
    """
    first, second, third, last = (numbers.astype("int32") % 256).split(4, axis=-1)
    exponent = last % 128 * 2 + third // 128
    fraction = ((third % 128 * 256 + second) * 256 + first).astype("float32") / _FRACTION
    power = paddle.pow(paddle.full_like(fraction, 2.0), (exponent - _EXPONENT).astype("float32"))
    return paddle.where(exponent > 0, (1 + fraction) * power, paddle.zeros_like(power))


def _cast(numbers: Tensor, dtype: paddle.dtype) -> Tensor:
    return numbers if numbers.dtype == dtype else numbers.astype(dtype)  # which copies even then


def to_stored(heads: Tensor, dtype: paddle.dtype) -> Tensor:
    """Return heads as a cache of some type holds them.

    Args:
        heads: ``[..., D]``. One with a number that is not finite becomes one of NaN in int8.
        dtype: of the cache.

    Returns:
        ``[..., D]``, or ``[..., D + 4]`` in int8.
    """
    if dtype != paddle.int8:
        return _cast(heads, dtype)
    wide = heads.astype("float32")
    finite = paddle.isfinite(wide).all(-1, keepdim=True)
    wide = paddle.where(finite, wide, paddle.zeros_like(wide))
    scale = paddle.clip(wide.abs().max(-1, keepdim=True) / 127, min=_SMALLEST_SCALE)
    integers = paddle.round(wide / scale).astype("int8")
    return paddle.concat([integers, _bytes_of(scale, finite)], axis=-1)


def from_stored(numbers: Tensor, dtype: paddle.dtype) -> Tensor:
    """Return the heads that a cache's numbers stand for; see :func:`to_stored`."""
    if numbers.dtype != paddle.int8:
        return _cast(numbers, dtype)
    integers, scale = numbers[..., :-_SCALE_BYTES], numbers[..., -_SCALE_BYTES:]
    return (integers.astype("float32") * _scale_of(scale)).astype(dtype)


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
        k_cache: ``[blocks, block, G, D]``, ``[blocks, block, G, D + 4]`` in int8; written in place.
        v_cache: likewise.
        block_table_NM: int32, block numbers of each sequence, wide enough for its last position.
        sequence_T: int32, the sequence of each token; ascending.
        position_T: int32, position of each token; ascending within a sequence, and all earlier
            positions are in the cache or in this step.

    Returns:
        ``[T, H, D]`` in the type of the queries, which is that of keys and values; softmax is in
        float32.
    """
    H, D = q_THD.shape[1:]
    block, G = k_cache.shape[1:3]
    R = H // G
    owner_T = paddle.index_sample(
        paddle.gather(block_table_NM, sequence_T), (position_T // block).unsqueeze(1)
    ).squeeze(1)
    slot = (owner_T.astype("int64"), (position_T % block).astype("int64"))
    k_cache = paddle.index_put_(k_cache, slot, to_stored(k_TGD, k_cache.dtype))
    v_cache = paddle.index_put_(v_cache, slot, to_stored(v_TGD, v_cache.dtype))

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
    k, v = (
        from_stored(paddle.gather(cache, flat_table), q_THD.dtype)
        .reshape([N, -1, G, D])
        .transpose([0, 2, 1, 3])
        for cache in (k_cache, v_cache)
    )
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

    Everything but the caches is float32. A token whose sequence or position is negative is padding:
    nothing is written for it and its output is 0.

    Raises:
        ValueError: shapes that do not fit, a sequence without a row in the block table, a position
            past its end, or a block that the cache does not have.
    """
    tensors = (q_THD, k_TGD, v_TGD, k_cache, v_cache, block_table_NM, sequence_T, position_T)
    return native.run("paged_attention", *tensors)[0]
