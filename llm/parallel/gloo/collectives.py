"""The collectives, with the signatures by which fleet calls the methods of ``ProcessGroupGloo``.

What process_group_gloo.cc lacks or does wrong in Paddle 3.3.1: ``reduce_scatter`` and all-to-all
are not implemented, sums of float16 come out as infinity, averages are not known, and none of the
``*_on_calc_stream`` methods, which all of fleet's layers call, exist. ``sync_op`` has no effect:
everything is over when a function returns.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.base import core

from llm.parallel.gloo import messages
from llm.parallel.gloo.links import Member
from llm.parallel.gloo.rounds import Combine, agree, exchange
from llm.parallel.gloo.tensors import DONE, Done, array_of, put, put_array

_HALF = (paddle.float16, paddle.bfloat16)
_REDUCERS: dict[Any, Callable[..., Any]] = {
    core.ReduceOp.SUM: np.add,
    core.ReduceOp.AVG: np.add,
    core.ReduceOp.MAX: np.maximum,
    core.ReduceOp.MIN: np.minimum,
    core.ReduceOp.PRODUCT: np.multiply,
}


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('paddle.')}[{tensor.size}]"


def _operation(op: Any) -> Any:
    if op is None:
        return core.ReduceOp.SUM
    return core.ReduceOp(op) if isinstance(op, int) else op


def _reduction(op: Any) -> Combine:
    total = np.empty(0)

    def combine(rank: int, values: np.ndarray) -> np.ndarray:
        nonlocal total
        with np.errstate(all="ignore"):  # infinities are for the loss scaler to see
            total = values if rank == 0 else _REDUCERS[op](total, values, out=total)
        return total

    return combine


def _stacking(ranks: int) -> Combine:
    rows: np.ndarray = np.empty(0)

    def combine(rank: int, values: np.ndarray) -> np.ndarray:
        nonlocal rows
        if rank == 0:
            rows = np.empty((ranks, values.size), values.dtype)
        rows[rank] = values
        return rows

    return combine


def _choosing(src: int) -> Combine:
    chosen = np.empty(0)

    def combine(rank: int, values: np.ndarray) -> np.ndarray:
        nonlocal chosen
        if rank == src:
            chosen = values
        return chosen

    return combine


def _reduced(group: Member, call: str, tensor: Tensor, op: Any) -> Tensor:
    """The reduction over all ranks, as a new tensor; half precision is reduced in float32."""
    if op == core.ReduceOp.AVG and not tensor.is_floating_point():
        raise ValueError(f"{call}: averages take floating point numbers, not {tensor.dtype}")
    wide = tensor.detach().astype("float32") if tensor.dtype in _HALF else tensor.detach()
    values = exchange(group, f"{call} {op.name} {_kind(tensor)}", array_of(wide), _reduction(op))
    if op == core.ReduceOp.AVG:
        values = values / len(group.peers)
    total = paddle.empty(tensor.shape, wide.dtype)
    put_array(total, values)
    return total.astype(tensor.dtype)


def gathered(group: Member, tensor: Tensor) -> Tensor:
    """What all ranks hold, ``[ranks, *shape]``."""
    ranks = len(group.peers)
    values = exchange(group, f"all_gather {_kind(tensor)}", array_of(tensor), _stacking(ranks))
    out = paddle.empty([ranks, *tensor.shape], tensor.dtype)
    put_array(out, values)
    return out


def all_reduce(group: Member, tensor: Tensor, op: Any = None, sync_op: bool = True) -> Done:
    """Reduce ``tensor`` over all ranks, in place."""
    put(tensor, _reduced(group, "all_reduce", tensor, _operation(op)))
    return DONE


def reduce(group: Member, tensor: Tensor, dst: int, op: Any = None, sync_op: bool = True) -> Done:
    """Reduce ``tensor`` over all ranks, in place on rank ``dst`` of the group."""
    total = _reduced(group, f"reduce to {dst}", tensor, _operation(op))
    if group.index == dst:
        put(tensor, total)
    return DONE


def reduce_scatter_tensor(
    group: Member, out: Tensor, source: Tensor, op: Any = None, sync_op: bool = True
) -> Done:
    """Reduce over all ranks; each keeps its part along the first axis."""
    ranks = len(group.peers)
    _divides("reduce_scatter", source.size, ranks, out.size)
    total = _reduced(group, "reduce_scatter", source, _operation(op))
    put(out, total.reshape([ranks, -1])[group.index])
    return DONE


def reduce_scatter(
    group: Member, out: Tensor, sources: Sequence[Tensor], op: Any = None, sync_op: bool = True
) -> Done:
    """Reduce a list of tensors over all ranks; each keeps the one of its rank."""
    return reduce_scatter_tensor(group, out, paddle.stack([s.detach() for s in sources]), op)


def _divides(name: str, whole: int, ranks: int, part: int) -> None:
    if whole != ranks * part:
        raise ValueError(f"{name}: {whole} numbers over {ranks} ranks do not make {part} on each")


def all_gather_into_tensor(
    group: Member, out: Tensor, source: Tensor, sync_op: bool = True
) -> Done:
    """Gather all ranks' tensors along the first axis."""
    _divides("all_gather", out.size, len(group.peers), source.size)
    put(out, gathered(group, source))
    return DONE


def all_gather(group: Member, out: Any, source: Any, sync_op: bool | None = None) -> Done:
    """Gather into a list or a tensor; without ``sync_op`` the older order (source, out) is meant.

    ``sequence_parallel_utils.py`` and ``tensor_fusion_helper.py`` call the older one.
    """
    if sync_op is None:
        out, source = source, out
    if not isinstance(out, (list, tuple)):
        return all_gather_into_tensor(group, out, source)
    for target, value in zip(out, gathered(group, source), strict=True):
        put(target, value)
    return DONE


def all_gather_on_calc_stream(group: Member, out: Any, source: Any) -> Done:
    """:func:`all_gather` in its newer order."""
    return all_gather(group, out, source, True)


def broadcast(group: Member, tensor: Tensor, src: int, sync_op: bool = True) -> Done:
    """Copy the tensor of rank ``src`` of the group to all ranks."""
    own = array_of(tensor if group.index == src else tensor.reshape([-1])[:0])
    values = exchange(group, f"broadcast from {src} {_kind(tensor)}", own, _choosing(src))
    if group.index != src:
        put_array(tensor, values)
    return DONE


def scatter(group: Member, out: Tensor, sources: Any, src: int, sync_op: bool = True) -> Done:
    """Give each rank its tensor of the list that rank ``src`` of the group holds."""
    ranks = len(group.peers)
    own = array_of(out.reshape([-1])[:0])
    if group.index == src:
        own = np.concatenate([array_of(part) for part in sources])
        _divides("scatter", own.size, ranks, out.size)
    values = exchange(group, f"scatter from {src} {_kind(out)}", own, _choosing(src))
    put_array(out, values.reshape(ranks, -1)[group.index])
    return DONE


def scatter_tensor(
    group: Member, out: Tensor, source: Tensor, src: int, sync_op: bool = True
) -> Done:
    """Give each rank its part, along the first axis, of the tensor that rank ``src`` holds."""
    return scatter(group, out, [source], src)


def gather(
    group: Member, source: Tensor, out: Any, dst: int, sync_op: bool = True, calc: bool = False
) -> Done:
    """Gather all ranks' tensors on rank ``dst`` of the group."""
    ranks = len(group.peers)
    call = f"gather to {dst} {_kind(source)}"
    values = exchange(group, call, array_of(source), _stacking(ranks), to=dst)
    if group.index == dst:
        for target, value in zip(out, values.reshape(ranks, -1), strict=True):
            put_array(target, value)
    return DONE


def all_to_all(
    group: Member, outs: Sequence[Tensor], sources: Sequence[Tensor], sync_op: bool = True
) -> Done:
    """Send the i-th tensor to rank i; receive one from each, of whatever sizes both sides say."""
    sizes = {"out": [_kind(t) for t in outs], "in": [_kind(t) for t in sources]}
    _check_exchange(group, agree(group, "all_to_all", own=sizes))
    for peer, source in enumerate(sources):
        if peer != group.index:
            messages.post(group, source, peer, "all_to_all")
    put(outs[group.index], sources[group.index].detach())
    for peer, out in enumerate(outs):
        if peer != group.index:
            messages.take(group, out, peer, "all_to_all")
    return DONE


def _check_exchange(group: Member, rows: list[dict[str, list[str]]]) -> None:
    for sender, row in enumerate(rows):
        for receiver, sent in enumerate(row["in"]):
            expected = rows[receiver]["out"][sender]
            if sent != expected:
                raise ValueError(
                    f"all_to_all: {group.title(sender)} sends {sent} to {group.title(receiver)}, "
                    f"which expects {expected}"
                )


def all_to_all_tensor(group: Member, out: Tensor, source: Tensor, sync_op: bool = True) -> Done:
    """All-to-all of equal parts along the first axis."""
    return all_to_all_single(group, out, source, (), ())


def all_to_all_single(
    group: Member,
    out: Tensor,
    source: Tensor,
    out_sizes: Sequence[int],
    in_sizes: Sequence[int],
    sync_op: bool = True,
) -> Done:
    """All-to-all of parts along the first axis; sizes are rows, empty for equal parts."""
    ranks = len(group.peers)
    sources = _rows(source.detach(), in_sizes, ranks)
    received = [paddle.empty_like(part) for part in _rows(out.detach(), out_sizes, ranks)]
    all_to_all(group, received, sources)
    put(out, paddle.concat(received))
    return DONE


def _rows(tensor: Tensor, sizes: Sequence[int], ranks: int) -> list[Tensor]:
    if not sizes:
        if tensor.shape[0] % ranks:
            raise ValueError(f"all_to_all: {tensor.shape[0]} rows do not split over {ranks} ranks")
        sizes = [tensor.shape[0] // ranks] * ranks
    starts = [sum(sizes[:i]) for i in range(ranks)]
    return [tensor[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def all_gather_partial(
    group: Member, out: Tensor, source: Tensor, parts: int, part: int, sync_op: bool = True
) -> Done:
    """Put together a tensor of which each rank holds one part (``p2p_communication.py``)."""
    return all_gather_into_tensor(group, out, messages.part_of(source.detach(), parts, part))


def barrier(group: Member, device_id: int = -1) -> Done:
    """Wait for all ranks."""
    agree(group, "barrier")
    return DONE
