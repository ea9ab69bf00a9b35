"""Jobs about waiting: collectives and copies on the rehearsal device, with and without a wait."""

import os
import time

import paddle
import paddle.distributed as dist


def summed(waits: bool) -> list[float]:
    """Return the sum over all ranks of rank + 1, twice, as it is read with or without a wait."""
    dist.init_parallel_env()
    tensor = paddle.full([2], float(dist.get_rank() + 1))
    task = dist.all_reduce(tensor, sync_op=False)
    if waits:
        task.wait()
    seen = tensor.numpy().tolist()
    paddle.device.synchronize()
    assert tensor.numpy().tolist() == [3.0, 3.0]
    return seen


def gathered(waits: bool, on_one: bool) -> list[float]:
    """Gather rank + 1 of all ranks into tensors of zeros; read them with or without a wait.

    Args:
        waits: whether to wait.
        on_one: gather on the first rank, which copies its own part from device to device on the
            stream of the collective; otherwise on all ranks.
    """
    dist.init_parallel_env()
    parts = [paddle.zeros([1]), paddle.zeros([1])]
    mine = paddle.full([1], float(dist.get_rank() + 1))
    if on_one:
        task = dist.gather(mine, parts, dst=0, sync_op=False)
    else:
        task = dist.all_gather(parts, mine, sync_op=False)
    if waits:
        task.wait()
    return [float(part) for part in parts]


def alone() -> str:
    """Return what the first rank hears when the second takes no part in a sum."""
    dist.init_parallel_env()
    os.environ["REHEARSAL_TIMEOUT"] = "1"  # not before: one rank may begin later than the other
    try:
        if dist.get_rank() == 0:
            dist.all_reduce(paddle.ones([1]))
    except (RuntimeError, OSError, ValueError) as error:
        return str(error)
    return ""


def overwritten() -> list[float]:
    """Sum a tensor that is overwritten before the wait: what the sum is then made of."""
    dist.init_parallel_env()
    tensor = paddle.full([2], float(dist.get_rank() + 1))
    task = dist.all_reduce(tensor, sync_op=False)
    tensor.set_value(paddle.full([2], 10.0))
    task.wait()
    return tensor.numpy().tolist()


def opposite_orders() -> list[float]:
    """Two collectives of two groups, which the ranks wait for in opposite orders."""
    dist.init_parallel_env()
    groups = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    tensors = [paddle.full([2], 1.0), paddle.full([2], 2.0)]
    tasks = [
        dist.all_reduce(tensor, group=group, sync_op=False)
        for tensor, group in zip(tensors, groups, strict=True)
    ]
    for task in tasks if dist.get_rank() == 0 else tasks[::-1]:
        task.wait()
    return [float(tensor[0]) for tensor in tensors]


def every_collective() -> dict[str, list[float]]:
    """Return what each collective of two ranks gives; rank r brings [r + 1, 10 (r + 1)]."""
    dist.init_parallel_env()
    rank = dist.get_rank()
    mine = paddle.to_tensor([rank + 1.0, 10.0 * (rank + 1)])
    seen = {}
    for name, op in (("sum", dist.ReduceOp.SUM), ("max", dist.ReduceOp.MAX)):
        tensor = mine.clone()
        dist.all_reduce(tensor, op)
        seen[name] = tensor.tolist()
    half = mine.astype("bfloat16")
    dist.all_reduce(half)
    seen["bfloat16"] = half.astype("float32").tolist()
    parts: list[paddle.Tensor] = []
    dist.all_gather(parts, mine)
    seen["all_gather"] = [number for part in parts for number in part.tolist()]
    scattered = paddle.zeros([1])
    dist.reduce_scatter(scattered, [mine[:1], mine[1:]])
    seen["reduce_scatter"] = scattered.tolist()
    received: list[paddle.Tensor] = []
    dist.alltoall(received, [mine[:1], mine[1:]])
    seen["all_to_all"] = [number for part in received for number in part.tolist()]
    sent = mine.clone()
    dist.broadcast(sent, src=1)
    seen["broadcast"] = sent.tolist()
    rest = mine.clone()
    if rank == 0:
        dist.send(mine, dst=1)
    else:
        time.sleep(0.01)
        dist.recv(rest, src=0)
    seen["send"] = rest.tolist()
    return seen
