"""The collectives of ``ProcessGroupGloo``, as fleet calls them.

What process_group_gloo.cc lacks or does wrong in Paddle 3.3.1: ``reduce_scatter`` and all-to-all
are not implemented, sums of float16 come out as infinity, averages are not known, and none of the
``*_on_calc_stream`` methods, which all of fleet's layers call, exist.
"""

from collections.abc import Callable, Sequence
from typing import Any

import paddle
from paddle import Tensor
from paddle.base import core

from llm.parallel.gloo import messages
from llm.parallel.gloo.agreement import agree
from llm.parallel.gloo.members import member_of
from llm.parallel.gloo.tensors import DONE, Done, contiguous, put

_NATIVE_NAMES = ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast")
_NATIVE_NAMES += ("gather", "reduce", "scatter", "scatter_tensor")
_native: dict[str, Callable[..., Any]] = {}
_HALF = (paddle.float16, paddle.bfloat16)


def _kind(tensor: Tensor, size: int | None = None) -> str:
    return f"{str(tensor.dtype).removeprefix('paddle.')}[{tensor.size if size is None else size}]"


def _operation(op: Any) -> Any:
    if op is None:
        return core.ReduceOp.SUM
    return core.ReduceOp(op) if isinstance(op, int) else op


def _reduced(group: Any, tensor: Tensor, op: Any) -> Tensor:
    """The reduction over all ranks, as a new tensor, when all ranks are known to be there."""
    average = op == core.ReduceOp.AVG
    if average and not tensor.is_floating_point():
        raise ValueError(f"all_reduce: AVG of {tensor.dtype}; averages take floating point numbers")
    wide = tensor.dtype == paddle.float16 or (average and tensor.dtype in _HALF)
    total = tensor.detach().astype("float32") if wide else tensor.detach().clone()
    total = contiguous(total)
    _native["all_reduce"](group, total, core.ReduceOp.SUM if average else op, True).wait()
    if average:
        total = total / group.size()
    return total.astype(tensor.dtype)


def all_reduce(group: Any, tensor: Tensor, op: Any = None, sync_op: bool = True) -> Done:
    """Reduce ``tensor`` over all ranks, in place."""
    op = _operation(op)
    agree(member_of(group), "all_reduce", f"{op.name} {_kind(tensor)}")
    put(tensor, _reduced(group, tensor, op))
    return DONE


def reduce(group: Any, tensor: Tensor, dst: int, op: Any = None, sync_op: bool = True) -> Done:
    """Reduce ``tensor`` over all ranks, in place on rank ``dst`` of the group."""
    op = _operation(op)
    agree(member_of(group), "reduce", f"{op.name} {_kind(tensor)} to {dst}")
    total = _reduced(group, tensor, op)
    if group.rank() == dst:
        put(tensor, total)
    return DONE


def reduce_scatter_tensor(
    group: Any, out: Tensor, source: Tensor, op: Any = None, sync_op: bool = True
) -> Done:
    """Reduce over all ranks; each keeps its part along the first axis."""
    op = _operation(op)
    agree(member_of(group), "reduce_scatter", f"{op.name} {_kind(source)} into {_kind(out)}")
    _divides("reduce_scatter", source, group.size(), out.size)
    put(out, _reduced(group, source, op).reshape([group.size(), -1])[group.rank()])
    return DONE


def reduce_scatter(
    group: Any, out: Tensor, sources: Sequence[Tensor], op: Any = None, sync_op: bool = True
) -> Done:
    """Reduce a list of tensors over all ranks; each keeps the one of its rank."""
    return reduce_scatter_tensor(group, out, paddle.stack([s.detach() for s in sources]), op)


def _divides(name: str, whole: Tensor, ranks: int, part: int) -> None:
    if whole.size != ranks * part:
        raise ValueError(
            f"{name}: {ranks} ranks split {whole.size} numbers, which does not give {part} each"
        )


def _gathered(group: Any, tensor: Tensor) -> Tensor:
    """What all ranks hold, ``[ranks, *shape]``, when all ranks are known to be there."""
    out = paddle.empty([group.size(), *tensor.shape], tensor.dtype)
    _native["all_gather_into_tensor"](group, out, contiguous(tensor.detach()), True).wait()
    return out


def gathered(group: Any, tensor: Tensor) -> Tensor:
    """What all ranks hold, ``[ranks, *shape]``."""
    agree(member_of(group), "all_gather", _kind(tensor))
    return _gathered(group, tensor)


def all_gather_into_tensor(group: Any, out: Tensor, source: Tensor, sync_op: bool = True) -> Done:
    """Gather all ranks' tensors along the first axis."""
    agree(member_of(group), "all_gather", _kind(source))
    _divides("all_gather", out, group.size(), source.size)
    put(out, _gathered(group, source))
    return DONE


def all_gather(group: Any, out: Any, source: Any, sync_op: bool | None = None) -> Done:
    """Gather into a list or a tensor; without ``sync_op`` the older order (source, out) is meant.

    ``sequence_parallel_utils.py`` and ``tensor_fusion_helper.py`` call the older one.
    """
    if sync_op is None:
        out, source = source, out
    if isinstance(source, (list, tuple)):
        (source,) = source
    if isinstance(out, (list, tuple)) and len(out) == 1 and out[0].size != source.size:
        (out,) = out
    if not isinstance(out, (list, tuple)):
        return all_gather_into_tensor(group, out, source)
    for target, value in zip(out, gathered(group, source), strict=True):
        put(target, value)
    return DONE


def broadcast(group: Any, tensor: Tensor, src: int, sync_op: bool = True) -> Done:
    """Copy the tensor of rank ``src`` of the group to all ranks."""
    agree(member_of(group), "broadcast", f"{_kind(tensor)} from {src}")
    value = contiguous(tensor.detach())
    _native["broadcast"](group, value, src, True).wait()
    if value is not tensor:
        put(tensor, value)
    return DONE


def scatter(group: Any, out: Tensor, sources: Any, src: int, sync_op: bool = True) -> Done:
    """Give each rank its tensor of the list that rank ``src`` of the group holds."""
    agree(member_of(group), "scatter", f"{_kind(out)} from {src}")
    parts = [contiguous(s.detach()) for s in sources]
    value = paddle.empty_like(contiguous(out.detach()))
    _native["scatter"](group, value, parts, src, True).wait()
    put(out, value)
    return DONE


def scatter_tensor(group: Any, out: Tensor, source: Tensor, src: int, sync_op: bool = True) -> Done:
    """Give each rank its part, along the first axis, of the tensor that rank ``src`` holds."""
    parts = [out] * group.size()
    if group.rank() == src:
        _divides("scatter", source, group.size(), out.size)
        parts = list(source.detach().reshape([group.size(), *out.shape]))
    return scatter(group, out, parts, src)


def gather(
    group: Any, source: Tensor, out: Any, dst: int, sync_op: bool = True, calc_stream: bool = False
) -> Done:
    """Gather all ranks' tensors on rank ``dst`` of the group."""
    agree(member_of(group), "gather", f"{_kind(source)} to {dst}")
    values = _gathered(group, source)
    if group.rank() == dst:
        for target, value in zip(out, values, strict=True):
            put(target, value)
    return DONE


def all_to_all(
    group: Any, outs: Sequence[Tensor], sources: Sequence[Tensor], sync_op: bool = True
) -> Done:
    """Send the i-th tensor to rank i; receive one from each, of whatever sizes both sides say."""
    member = member_of(group)
    sizes = {"out": [_kind(t) for t in outs], "in": [_kind(t) for t in sources]}
    rows = agree(member, "all_to_all", own=sizes)
    _check_exchange(rows)
    for peer, source in enumerate(sources):
        if peer != member.rank:
            messages.post(member, source, peer, "all_to_all")
    put(outs[member.rank], sources[member.rank].detach())
    for peer, out in enumerate(outs):
        if peer != member.rank:
            messages.take(member, out, peer, "all_to_all")
    return DONE


def _check_exchange(rows: list[dict[str, list[str]]]) -> None:
    for sender, row in enumerate(rows):
        for receiver, sent in enumerate(row["in"]):
            expected = rows[receiver]["out"][sender]
            if sent != expected:
                raise ValueError(
                    f"all_to_all: rank {sender} of the group sends {sent} to rank {receiver}, "
                    f"which expects {expected}"
                )


def all_to_all_tensor(group: Any, out: Tensor, source: Tensor, sync_op: bool = True) -> Done:
    """All-to-all of equal parts along the first axis."""
    return all_to_all_single(group, out, source, (), ())


def all_to_all_single(
    group: Any,
    out: Tensor,
    source: Tensor,
    out_sizes: Sequence[int],
    in_sizes: Sequence[int],
    sync_op: bool = True,
) -> Done:
    """All-to-all of parts along the first axis; sizes are rows, empty for equal parts."""
    sources = _rows(source.detach(), in_sizes, group.size())
    received = [paddle.empty_like(part) for part in _rows(out.detach(), out_sizes, group.size())]
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
    group: Any, out: Tensor, source: Tensor, parts: int, part: int, sync_op: bool = True
) -> Done:
    """Put together a tensor of which each rank holds one part (``p2p_communication.py``)."""
    return all_gather_into_tensor(group, out, messages.part_of(source.detach(), parts, part))


def barrier(group: Any, device_id: int = -1) -> Done:
    """Wait for all ranks."""
    agree(member_of(group), "barrier")
    return DONE


def install() -> None:
    """Replace the methods of ``ProcessGroupGloo``."""
    gloo = core.ProcessGroupGloo
    for name in _NATIVE_NAMES:
        _native[name] = getattr(core.ProcessGroup, name)
    ours = (all_reduce, reduce, reduce_scatter, reduce_scatter_tensor, all_gather, gather)
    ours += (all_gather_into_tensor, broadcast, scatter, scatter_tensor, all_to_all)
    ours += (all_to_all_tensor, all_to_all_single, all_gather_partial)
    for method in ours:
        setattr(gloo, method.__name__, method)
        setattr(gloo, f"{method.__name__}_on_calc_stream", method)
    gloo.all_gather_on_calc_stream = lambda group, out, source: all_gather(group, out, source, True)
    gloo.allreduce = all_reduce
    gloo.barrier = barrier
