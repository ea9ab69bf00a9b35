"""What stands in for ``ProcessGroupGloo``: one object with the methods that paddle calls."""

from typing import Any

import paddle.distributed.collective as paddle_collective
import paddle.distributed.parallel as paddle_parallel
from paddle.base import core

from llm.parallel.gloo import collectives, members, messages


class ProcessGroup(members.Member):
    """A group of processes on CPUs. ``*_on_calc_stream`` is the same: there are no streams."""

    all_gather = collectives.all_gather
    all_gather_on_calc_stream = collectives.all_gather_on_calc_stream
    all_gather_into_tensor = collectives.all_gather_into_tensor
    all_gather_into_tensor_on_calc_stream = collectives.all_gather_into_tensor
    all_gather_partial = collectives.all_gather_partial
    all_gather_partial_on_calc_stream = collectives.all_gather_partial
    all_reduce = allreduce = collectives.all_reduce
    all_reduce_on_calc_stream = collectives.all_reduce
    all_to_all = all_to_all_on_calc_stream = collectives.all_to_all
    all_to_all_single = all_to_all_single_on_calc_stream = collectives.all_to_all_single
    all_to_all_tensor = all_to_all_tensor_on_calc_stream = collectives.all_to_all_tensor
    barrier = collectives.barrier
    broadcast = broadcast_on_calc_stream = collectives.broadcast
    gather = collectives.gather
    reduce = reduce_on_calc_stream = collectives.reduce
    reduce_scatter = reduce_scatter_on_calc_stream = collectives.reduce_scatter
    reduce_scatter_tensor = collectives.reduce_scatter_tensor
    reduce_scatter_tensor_on_calc_stream = collectives.reduce_scatter_tensor
    scatter = scatter_on_calc_stream = collectives.scatter
    scatter_tensor = scatter_tensor_on_calc_stream = collectives.scatter_tensor

    send = send_on_calc_stream = messages.send
    recv = recv_on_calc_stream = messages.recv
    send_partial = send_partial_on_calc_stream = messages.send_partial
    recv_partial = recv_partial_on_calc_stream = messages.recv_partial
    _start_coalescing = messages.start_batch
    _end_coalescing = messages.end_batch

    def rank(self) -> int:
        """This process's rank in the group."""
        return self.index

    def size(self) -> int:
        """Number of ranks."""
        return len(self.peers)

    def name(self) -> str:
        """The backend, by the name that paddle compares with."""
        return "GLOO"


def install() -> None:
    """Have ``init_parallel_env`` and ``new_group`` make groups of this kind."""
    native = paddle_collective._new_process_group_impl

    def new_group(
        backend: str, store: Any, rank: int, size: int, name: str, *others: Any, **named: Any
    ) -> Any:
        if backend != "gloo":
            return native(backend, store, rank, size, name, *others, **named)
        return members.join(ProcessGroup, store, rank, size, name)

    paddle_collective._new_process_group_impl = new_group
    paddle_parallel._new_process_group_impl = new_group  # imported there by name
    core.create_or_get_global_tcp_store = members.global_store
