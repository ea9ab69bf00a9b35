"""Whole decoder layers over packed tokens and a paged cache with Paddle's CUDA kernels.

Attention is ``block_multihead_attention``, which rotates, writes the cache and attends in one
operator: whole prompts through FlashAttention, single tokens over their sequence's blocks. What it
has no form for, the later part of a prompt, has its keys gathered from the cache and goes through
FlashAttention. Which tokens go where is planned on the host, once a step: no layer reads from the
device. A layer is eight operators.

T packed tokens of N sequences, H query heads, G key/value heads, D head dimension, E hidden, S
positions. Caches are ``[blocks, G, block, D]``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor
from paddle.incubate.nn import functional as incubate
from paddle.nn.functional.flash_attention import flash_attn_unpadded

from external_ops.tensors import tensor_from

Ints = NDArray[np.int32]

# Of Paddle 3.3.1's kernel for single tokens, the block size that its examples use first.
BLOCK_SIZES = (64, 32, 128, 1)
HEAD_DIMS = (32, 64, 96, 128)
DTYPES = ("bfloat16", "float16")
# Shared memory of a thread block by compute capability (CUDA C++ Programming Guide, table of
# technical specifications): the kernel keeps the scores of a head in it.
_SHARED_KIB = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
_SMALLEST_KIB = 99
# Numbers that its query and its sums over warps take of it, rounded up.
_KEPT_NUMBERS = 128


def longest_single(architecture: int, table_width: int) -> int:
    """Return how many positions a single token can see by the kernel.

    Args:
        architecture: compute capability, 90 for 9.0.
        table_width: blocks in a row of the block table.
    """
    kib = _SHARED_KIB.get(architecture, _SMALLEST_KIB)
    return kib * 256 - (table_width + 3) // 4 * 4 - 4 - _KEPT_NUMBERS


@dataclass(frozen=True)
class Gathered:
    """Sequences whose keys are gathered from the cache.

    Args:
        tokens: int64 ``[t]``, which tokens of the step.
        position: int64 ``[t]``.
        slots: block, head and offset of the tokens' keys, each int64 ``[t, G]``.
        rows: int64 ``[K G]``, rows of the cache as ``[blocks G block, D]`` of all K keys.
        places: int64 ``[t]``, which of the K keys each token is; None where a sequence has one
            token, which sees all of them.
        starts: int32 ``[n + 1]``, first query of each sequence, as FlashAttention counts them.
        starts_k: int32 ``[n + 1]``, first key.
        longest: keys of the longest sequence.
    """

    tokens: Tensor
    position: Tensor
    slots: tuple[Tensor, Tensor, Tensor]
    rows: Tensor
    places: Tensor | None
    starts: Tensor
    starts_k: Tensor
    longest: int


@dataclass(frozen=True)
class StepPlan:
    """What the layers of one step share, on the device but for two numbers.

    Args:
        kernel: the arguments of ``block_multihead_attention`` behind the caches, up to the block
            table; None where no token goes there.
        longest: tokens of the longest whole prompt, and positions before the furthest single token,
            int32 ``[1]`` on the host.
        gathered: the sequences that go another way.
        positions: S; the operator counts tokens as of rows of this length.
    """

    kernel: tuple[Tensor, ...] | None
    longest: tuple[Tensor, Tensor]
    gathered: tuple[Gathered, ...]
    positions: int


def _on_host(number: int) -> Tensor:
    return tensor_from(np.array([number], np.int32), on_host=True)


def _gathered(
    chosen: Ints, first: Ints, counts: Ints, start: Ints, table_NM: Ints, heads: int, block: int
) -> Gathered:
    """Plan sequences of these numbers; those of one token are planned apart from others."""
    ends = start[chosen] + counts[chosen]
    tokens = np.concatenate([np.arange(first[n], first[n] + counts[n]) for n in chosen])
    position = np.concatenate([np.arange(start[n], start[n] + counts[n]) for n in chosen])
    owner = np.repeat(chosen, counts[chosen])
    where = [table_NM[owner, position // block], np.zeros_like(position), position % block]
    where[1] = np.arange(heads)
    shape = (len(tokens), heads)
    slots = (where[0][:, None], where[1][None, :], where[2][:, None])
    keys = np.concatenate([np.arange(end) for end in ends])
    of = np.repeat(chosen, ends)
    lines = table_NM[of, keys // block].astype(np.int64) * heads * block + keys % block
    rows = (lines[:, None] + np.arange(heads) * block).reshape(-1)
    starts_k = np.concatenate([[0], np.cumsum(ends)]).astype(np.int32)
    single = (counts[chosen] == 1).all()
    before = np.repeat(starts_k[:-1], counts[chosen])
    starts = np.arange(len(chosen) + 1, dtype=np.int32) if single else starts_k
    index = [np.ascontiguousarray(np.broadcast_to(one, shape), np.int64) for one in slots]
    return Gathered(
        tensor_from(tokens.astype(np.int64)),
        tensor_from(position.astype(np.int64)),
        (tensor_from(index[0]), tensor_from(index[1]), tensor_from(index[2])),
        tensor_from(rows),
        None if single else tensor_from((before + position).astype(np.int64)),
        tensor_from(starts),
        tensor_from(starts_k),
        int(ends.max()),
    )


def plan_step(
    sequence_T: Ints,
    position_T: Ints,
    table_NM: Ints,
    *,
    heads: int,
    block: int,
    positions: int,
    architecture: int,
) -> StepPlan:
    """Decide on the host how each sequence of a step attends, and send that to the device.

    Args:
        sequence_T: the sequence of each token, ascending; each has at least one.
        position_T: position of each token, ascending within a sequence without gaps.
        table_NM: cache blocks of each sequence.
        heads: G.
        block: tokens per cache block.
        positions: S, more than any position.
        architecture: compute capability, 90 for 9.0.
    """
    N = len(table_NM)
    numbers = np.arange(N, dtype=np.int32)
    first = np.searchsorted(sequence_T, numbers).astype(np.int32)
    counts = np.diff(np.append(first, len(sequence_T))).astype(np.int32)
    start = position_T[first].astype(np.int32)
    fresh = np.where(start == 0, counts, 0).astype(np.int32)
    short = start <= longest_single(architecture, table_NM.shape[1])
    before = np.where((counts == 1) & (start > 0) & short, start, 0).astype(np.int32)
    others = (fresh == 0) & (before == 0)
    gathered = tuple(
        _gathered(chosen, first, counts, start, table_NM, heads, block)
        for chosen in (numbers[others & (counts > 1)], numbers[others & (counts == 1)])
        if len(chosen)
    )
    longest = (_on_host(int(fresh.max())), _on_host(int(before.max())))
    if others.all():
        return StepPlan(None, longest, gathered, positions)
    offsets = (numbers * positions - first).astype(np.int32)
    starts = np.append(first, len(sequence_T)).astype(np.int32)
    sent = [fresh[:, None], before[:, None], counts[:, None], offsets[sequence_T], offsets, starts]
    fresh_t, before_t, counts_t, padding_t, offsets_t, starts_t = map(tensor_from, sent)
    table = tensor_from(np.ascontiguousarray(table_NM, np.int32))
    kernel = (fresh_t, before_t, counts_t, padding_t, offsets_t, starts_t, starts_t, table)
    return StepPlan(kernel, longest, gathered, positions)


def rope_table(frequency: NDArray[np.float32], positions: int, scale: float = 1.0) -> Tensor:
    """Return cosines and sines as the kernel takes them, float32 ``[2, 1, S, 1, D]``.

    Args:
        frequency: ``[D / 2]``, rotary angles of position 1.
        positions: S.
        scale: of cosines and sines.
    """
    steps = tensor_from(np.concatenate([frequency, frequency]))
    angles = paddle.arange(positions, dtype="float32").unsqueeze(-1) * steps
    both = paddle.stack([paddle.cos(angles), paddle.sin(angles)]) * scale
    return both.reshape([2, 1, positions, 1, -1])


def _attend_gathered(
    qkv_tHD: Tensor, plan: Gathered, k_cache: Tensor, v_cache: Tensor, rope: Tensor
) -> Tensor:
    """Attend over keys that lie in the cache, ``[t, H D]``; those of these tokens are written.

    Queries stand in their keys' places among rows that are thrown away: releases of FlashAttention
    differ in where they put the diagonal of fewer queries than keys.
    """
    G, D = k_cache.shape[1], k_cache.shape[3]
    dtype = qkv_tHD.dtype
    qk, v = qkv_tHD[:, :-G], qkv_tHD[:, -G:]
    cos, sin = paddle.gather(rope, plan.position, axis=2).reshape([2, 1, -1, 1, D]).unbind()
    wide = qk.astype("float32").unsqueeze(0)
    turned = incubate.fused_rotary_position_embedding(
        wide, sin=sin, cos=cos, use_neox_rotary_style=False
    )[0]
    qk = turned.squeeze(0).astype(dtype)
    q, k = qk[:, :-G].contiguous(), qk[:, -G:].contiguous()
    paddle.index_put_(k_cache, plan.slots, k)
    paddle.index_put_(v_cache, plan.slots, v.contiguous())
    keys, values = (
        paddle.gather(cache.reshape([-1, D]), plan.rows).reshape([-1, G, D])
        for cache in (k_cache, v_cache)
    )
    causal = plan.places is not None
    if causal:
        rows = paddle.zeros([keys.shape[0], *q.shape[1:]], dtype)
        q = paddle.scatter(rows, plan.places, q)
    cuts = (plan.starts, plan.starts_k, plan.longest if causal else 1, plan.longest)
    out, _ = flash_attn_unpadded(q, keys, values, *cuts, D**-0.5, causal=causal, training=False)
    out = out.flatten(1)
    return paddle.gather(out, plan.places) if causal else out


def attend_blocks(
    qkv_TX: Tensor, k_cache: Tensor, v_cache: Tensor, plan: StepPlan, rope: Tensor
) -> Tensor:
    """Rotate, write keys and values into the cache, and attend causally.

    Args:
        qkv_TX: ``[T, (H + 2 G) D]``, query heads, then those of keys, then those of values; may be
            overwritten.
        k_cache: ``[blocks, G, block, D]``; written in place.
        v_cache: likewise.
        plan: of the step.
        rope: from :func:`rope_table`.

    Returns:
        ``[T, H D]``.
    """
    block, D = k_cache.shape[2:]
    # Gathered before the operator rotates whole prompts in place.
    apart = [paddle.gather(qkv_TX, one.tokens) for one in plan.gathered]
    out = None
    if plan.kernel is not None:
        out = incubate.block_multihead_attention(
            qkv_TX,
            k_cache,
            v_cache,
            *plan.kernel,
            max_enc_len_this_time=plan.longest[0],
            max_dec_len_this_time=plan.longest[1],
            rope_emb=rope,
            max_seq_len=plan.positions,
            block_size=block,
            use_neox_style=True,
        )[0]
    for qkv, one in zip(apart, plan.gathered, strict=True):
        rows = qkv.reshape([qkv.shape[0], -1, D])
        found = _attend_gathered(rows, one, k_cache, v_cache, rope)
        if out is None:
            out = paddle.zeros([qkv_TX.shape[0], found.shape[1]], found.dtype)
        out = paddle.scatter(out, one.tokens, found)
    assert out is not None, "a step without tokens"
    return out


@dataclass(frozen=True)
class BlockLayer:
    """What one layer multiplies with.

    Args:
        input_norm: ``[E]``, weight of the norm before attention.
        post_norm: ``[E]``, weight of the norm before the feed-forward.
        qkv: outputs are the query heads, then those of keys, then those of values.
        o: of the attention's output.
        gate_up: outputs are those of the gate, then those of its factor.
        down: of the feed-forward's output.
    """

    input_norm: Tensor
    post_norm: Tensor
    qkv: Callable[[Tensor], Tensor]
    o: Callable[[Tensor], Tensor]
    gate_up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]


def _add_norm(x_TE: Tensor, total_TE: Tensor, weight: Tensor, eps: float) -> tuple[Any, ...]:
    """Return the norm of a sum, and the sum; one operator, which has no gradient."""
    found = incubate.fused_rms_norm(x_TE, weight, None, eps, begin_norm_axis=1, residual=total_TE)
    return found[0], found[1]


def decoder_blocks(
    x_TE: Tensor,
    layers: Sequence[BlockLayer],
    caches: list[Tensor],
    plan: StepPlan,
    rope: Tensor,
    *,
    eps: float,
) -> Tensor:
    """Run decoder layers.

    Args:
        x_TE: bfloat16 or float16 hidden states.
        layers: all of them.
        caches: keys and values of each layer in turn; written in place.
        plan: of the step.
        rope: from :func:`rope_table`.
        eps: of the norms.

    Returns:
        ``[T, E]``, before the final norm.
    """
    total = x_TE
    normed = incubate.fused_rms_norm(x_TE, layers[0].input_norm, None, eps, begin_norm_axis=1)[0]
    for number, layer in enumerate(layers):
        cache = caches[2 * number], caches[2 * number + 1]
        attended = layer.o(attend_blocks(layer.qkv(normed), *cache, plan, rope))
        normed, total = _add_norm(attended, total, layer.post_norm, eps)
        added = layer.down(paddle.nn.functional.swiglu(layer.gate_up(normed)))
        if number + 1 == len(layers):
            return added + total
        normed, total = _add_norm(added, total, layers[number + 1].input_norm, eps)
    return total
