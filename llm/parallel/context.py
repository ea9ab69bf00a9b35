"""Context parallelism: each rank holds a part of every sequence, and attention reaches all of it.

Two kinds, exact both:

- ``ulysses`` (Jacobs et al. 2023) trades tokens for heads before attention and back after it, so
  that each rank attends over whole rows with some heads. Ranks hold consecutive parts.
- ``ring`` (Liu et al. 2023) passes keys and values around, and puts attention to one rank's keys
  after another together. Of 2 N parts rank r holds parts r and 2 N - 1 - r ("zigzag", Brandon et
  al. 2023): with consecutive parts the last rank would have N times the work of the first, and all
  would wait for it; this way each has the same, half a block for every block that goes by.

Documents of packed rows, and a prefix that every rank holds, are supported by both.

B batch, S tokens of a whole row, N ranks, s = S / N, P prefix, H query heads, G key/value heads,
R = H / G, D head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.autograd import PyLayer

from common.errors import UserError
from external_ops import block_attention as blocks
from external_ops.block_attention import Mask
from llm.parallel.exchange import exchanged
from llm.parallel.topology import Topology

Attention = Callable[..., Tensor]


def part(length: int, rank: int, ranks: int, kind: str) -> np.ndarray:
    """Return which positions of a row a context rank holds, in the order in which it holds them.

    Raises:
        UserError: a length that does not split evenly.
    """
    unit = ranks if kind == "ulysses" else 2 * ranks
    if length % unit:
        raise UserError(
            f"rows of {length} tokens do not split over {ranks} context ranks ({kind}), which take "
            f"a multiple of {unit}; pad them to {-(-length // unit) * unit}"
        )
    size = length // unit
    first = np.arange(size) + rank * size
    if kind == "ulysses":
        return first
    return np.concatenate([first, np.arange(size) + (unit - 1 - rank) * size])


def cut(batch: dict[str, Any], topology: Topology) -> dict[str, Any]:
    """Return this rank's part of a batch.

    Args:
        batch: arrays or tensors by name; those shaped like ``input_ids [B, S]`` are cut.
        topology: the running job.

    Returns:
        the batch with its tokens cut, and with ``positions``, which always are those in the row or
        in the document of a packed row.

    Raises:
        UserError: rows that do not split evenly.
    """
    layout = topology.layout
    if layout.context == 1:
        return batch
    shape = list(batch["input_ids"].shape)
    held = part(shape[1], topology.at.context, layout.context, layout.context_kind)
    whole = dict(batch)
    if "positions" not in batch:
        positions = np.tile(np.arange(shape[1]), (shape[0], 1))
        tensors = isinstance(batch["input_ids"], Tensor)
        whole["positions"] = paddle.to_tensor(positions) if tensors else positions
    return {
        name: _columns(value, held) if list(value.shape) == shape else value
        for name, value in whole.items()
    }


def _columns(value: Any, held: np.ndarray) -> Any:
    if isinstance(value, Tensor):
        return paddle.index_select(value, paddle.to_tensor(held), axis=1)
    return np.ascontiguousarray(value[:, held])


def context_attention(attention: Attention, topology: Topology) -> Attention:
    """Return what takes the place of causal attention over whole rows.

    Args:
        attention: over whole rows, with the arguments of
            ``external_ops.flash_attention.causal_attention_ref``; Ulysses calls it.
        topology: the running job.

    Returns:
        a function with the same arguments, for this rank's part of each row.
    """
    layout, group = topology.layout, topology.context_group
    if layout.context == 1:
        return attention
    rank = topology.at.context
    if layout.context_kind == "ring":
        inner = partial(_ring_attention, group, rank)
    else:
        inner = partial(_ulysses, attention, group, rank)

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None = None) -> Tensor:
        # Mixed precision rotates queries and keys in float32; what travels is of one type.
        return inner(q.astype(v.dtype), k.astype(v.dtype), v, segments)

    return attend


def check_heads(heads: int, groups: int, ranks: int) -> None:
    """Refuse heads that Ulysses cannot give out.

    Args:
        heads: query heads of a tensor parallel rank.
        groups: key/value heads of a tensor parallel rank; fewer than ranks are repeated.
        ranks: context ranks.

    Raises:
        UserError: with what to do.
    """
    if heads % ranks or (groups % ranks and ranks % groups):
        raise UserError(
            f"ulysses over {ranks} context ranks needs query heads that {ranks} divides (there are "
            f"{heads}), and key/value heads of which one divides the other (there are {groups}); "
            "use --context_parallel_kind ring"
        )


def _gather_rows(x: Tensor, group: Any) -> list[Tensor]:
    """Return all ranks' tensors, by rank; no gradient."""
    parts: list[Tensor] = []
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


def _trade(x: Tensor, group: Any) -> Tensor:
    """Send the i-th of ``[N, ...]`` to rank i, and return what came, by rank."""
    out = paddle.empty_like(x)
    dist.alltoall_single(out, x.contiguous(), group=group)
    return out


def _tokens_for_heads(x_BsHD: Tensor, group: Any) -> Tensor:
    B, s, H, D = x_BsHD.shape
    N = group.nranks
    sent = x_BsHD.reshape([B, s, N, H // N, D]).transpose([2, 0, 1, 3, 4])
    return _trade(sent, group).transpose([1, 0, 2, 3, 4]).reshape([B, N * s, H // N, D])


def _heads_for_tokens(x_BShD: Tensor, group: Any) -> Tensor:
    B, S, h, D = x_BShD.shape
    N = group.nranks
    sent = x_BShD.reshape([B, N, S // N, h, D]).transpose([1, 0, 2, 3, 4])
    return _trade(sent, group).transpose([1, 2, 0, 3, 4]).reshape([B, S // N, N * h, D])


def _whole_rows(x_BsHD: Tensor, group: Any) -> Tensor:
    """Return ``[B, S, H / N, D]``."""
    there, back = _tokens_for_heads, _heads_for_tokens
    return exchanged(x_BsHD, partial(there, group=group), partial(back, group=group))


def _whole_heads(x_BShD: Tensor, group: Any) -> Tensor:
    """Return ``[B, s, H, D]`` of ``[B, S, H / N, D]``."""
    there, back = _heads_for_tokens, _tokens_for_heads
    return exchanged(x_BShD, partial(there, group=group), partial(back, group=group))


def _repeated(x_BKGD: Tensor, times: int) -> Tensor:
    if times == 1:
        return x_BKGD
    B, K, G, D = x_BKGD.shape
    return x_BKGD.unsqueeze(3).expand([B, K, G, times, D]).reshape([B, K, G * times, D])


def _ulysses(
    attention: Attention,
    group: Any,
    rank: int,
    q_BsHD: Tensor,
    k_BKGD: Tensor,
    v_BKGD: Tensor,
    segments_Bs: Tensor | None,
) -> Tensor:
    N, (_, s, H, D) = group.nranks, q_BsHD.shape
    G = k_BKGD.shape[2]
    check_heads(H, G, N)
    prefix = k_BKGD.shape[1] - s
    k, v = (_repeated(x, max(1, N // G)) for x in (k_BKGD, v_BKGD))
    g, h = k.shape[2] // N, H // N
    # One exchange for all three: heads of each rank side by side.
    of_rank = [x[:, -s:].reshape([x.shape[0], s, N, -1, D]) for x in (q_BsHD, k, v)]
    traded = _whole_rows(paddle.concat(of_rank, axis=3).flatten(2, 3), group)
    q, k_rows, v_rows = traded.split([h, g, g], axis=2)
    if prefix:
        own = slice(rank * g, (rank + 1) * g)
        k_rows = paddle.concat([k[:, :prefix, own], k_rows], axis=1)
        v_rows = paddle.concat([v[:, :prefix, own], v_rows], axis=1)
    segments = None
    if segments_Bs is not None:
        segments = paddle.concat(_gather_rows(segments_Bs, group), axis=1)
    return _whole_heads(attention(q, k_rows, v_rows, segments), group)


@dataclass(frozen=True)
class Ring:
    """The ranks that pass keys and values around; each sends to the next one.

    Args:
        group: of the context ranks.
        rank: this one's place in it.
        segments: ``[B, s]`` document numbers of each rank; None without packed rows.
    """

    group: Any
    rank: int
    segments: list[Tensor] | None

    def rotate(self, *tensors: Tensor) -> Callable[[], list[Tensor]]:
        """Send tensors on; what is returned waits, and returns those of the rank before."""
        ranks = self.group.ranks
        following, before = ranks[(self.rank + 1) % len(ranks)], ranks[self.rank - 1]
        arriving = [paddle.empty_like(x) for x in tensors]
        sends = [dist.P2POp(dist.isend, x.contiguous(), following, self.group) for x in tensors]
        receives = [dist.P2POp(dist.irecv, x, before, self.group) for x in arriving]
        tasks = dist.batch_isend_irecv([*sends, *receives])

        def wait() -> list[Tensor]:
            for task in tasks:
                task.wait()
            return arriving

        return wait


def _seen(ring: Ring, source: int, s: int) -> tuple[slice, slice, Mask]:
    """Return which rows see which of a rank's columns, and the mask between those."""
    half = s // 2
    rows, columns = slice(0, s), slice(0, s)
    if source < ring.rank:  # its second part is behind both of ours
        columns = slice(0, half)
    elif source > ring.rank:  # only our second part is behind it
        rows = slice(half, s)
    if ring.segments is None:
        return rows, columns, Mask(source == ring.rank)
    documents = ring.segments[ring.rank][:, rows], ring.segments[source][:, columns]
    return rows, columns, Mask(source == ring.rank, *documents)


class _RingAttention(PyLayer):
    """Queries by heads and scaled; keys and values ``[B, G, s, D]``, those of a prefix or None."""

    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, ring):
        s = q.shape[3]
        carried = paddle.stack([k, v])
        out = total = None
        for step in range(ring.group.nranks):
            last = step == ring.group.nranks - 1
            arriving = None if last else ring.rotate(carried)
            source = (ring.rank - step) % ring.group.nranks
            rows, columns, mask = _seen(ring, source, s)
            keys, values = (x[:, :, columns] for x in carried)
            block, log = blocks.block_forward(q[:, :, :, rows], keys, values, mask)
            if out is None:
                out, total = block, log
            else:
                out, total = _merge_rows(out, total, block, log, rows.start)
            carried = carried if last else arriving()[0]
        if prefix_k is not None:
            out, total = blocks.merge(out, total, *blocks.block_forward(q, prefix_k, prefix_v))
        prefix = [] if prefix_k is None else [prefix_k, prefix_v]
        ctx.ring, ctx.frozen = ring, [x.stop_gradient for x in (q, k, v, *prefix)]
        ctx.save_for_backward(out, total, q, k, v, *prefix)
        return out.astype(q.dtype)

    @staticmethod
    def backward(ctx, grad):
        out, total, q, k, v, *prefix = ctx.saved_tensor()
        product = (grad.astype("float32") * out).sum(-1, keepdim=True)
        state = (grad, total, product)
        grads = _ring_backward(ctx.ring, q, k, v, state)
        if prefix:
            of_q, *of_prefix = blocks.block_backward(q, *prefix, *state)
            grads = [grads[0] + of_q, *grads[1:], *of_prefix]
        # Paddle wants None for an input that is not trained.
        given = zip(grads, ctx.frozen, strict=True)
        return tuple(None if frozen else g.astype(q.dtype) for g, frozen in given)


def _merge_rows(
    out: Tensor, total: Tensor, block: Tensor, log: Tensor, start: int
) -> tuple[Tensor, Tensor]:
    """Merge a block of the rows from ``start`` on."""
    if start == 0:
        return blocks.merge(out, total, block, log)
    later, later_total = blocks.merge(out[:, :, :, start:], total[:, :, :, start:], block, log)
    return (
        paddle.concat([out[:, :, :, :start], later], axis=3),
        paddle.concat([total[:, :, :, :start], later_total], axis=3),
    )


def _ring_backward(
    ring: Ring, q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, Tensor, Tensor]
) -> list[Tensor]:
    """Return gradients of queries, keys and values; those of keys travel along with the keys."""
    s, N = q.shape[3], ring.group.nranks
    carried = paddle.stack([k, v])
    grad_q = paddle.zeros(q.shape, dtype="float32")
    grad_kv = paddle.zeros(carried.shape, dtype="float32")
    for step in range(N):
        last = step == N - 1
        arriving = None if last else ring.rotate(carried)
        rows, columns, mask = _seen(ring, (ring.rank - step) % N, s)
        keys, values = (x[:, :, columns] for x in carried)
        of_rows = (x[:, :, :, rows] for x in (q, *state))
        queries, *of_state = of_rows
        of_q, of_k, of_v = blocks.block_backward(queries, keys, values, *of_state, mask)
        grad_q[:, :, :, rows] += of_q
        grad_kv[:, :, :, columns] += paddle.stack([of_k, of_v])
        (grad_kv,) = ring.rotate(grad_kv)()
        carried = carried if last else arriving()[0]
    return [grad_q, *grad_kv.unbind()]


def _ring_attention(
    group: Any,
    rank: int,
    q_BsHD: Tensor,
    k_BKGD: Tensor,
    v_BKGD: Tensor,
    segments_Bs: Tensor | None,
) -> Tensor:
    s, D = q_BsHD.shape[1], q_BsHD.shape[3]
    prefix = k_BKGD.shape[1] - s
    segments = None if segments_Bs is None else _gather_rows(segments_Bs, group)
    q = blocks.by_heads(q_BsHD * D**-0.5, k_BKGD.shape[2])
    k, v = (x.transpose([0, 2, 1, 3]) for x in (k_BKGD, v_BKGD))
    before = (None, None)
    if prefix:
        before = (k[:, :, :prefix], v[:, :, :prefix])
        k, v = k[:, :, prefix:], v[:, :, prefix:]
    return blocks.by_rows(_RingAttention.apply(q, k, v, *before, Ring(group, rank, segments)))
