"""Python helpers of fleet and flex_checkpoint that assume a device."""

import sys
from typing import Any

import paddle
from paddle import Tensor
from paddle.base import core
from paddle.distributed import ParallelEnv


def _broadcast_input_data(hybrid: Any, *inputs: Any, **named: Any) -> tuple[Any, Any]:
    """``hybrid_parallel_util.broadcast_input_data`` without its list of allowed devices."""
    from paddle.distributed.fleet.utils import hybrid_parallel_util

    place = paddle.CPUPlace()
    spread = hybrid_parallel_util._broadcast_nested_data
    if inputs:
        inputs = spread(hybrid, "cpu", place, inputs)
    if named:
        named = spread(hybrid, "cpu", place, named)
    return inputs, named


def _stay(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor


def install() -> None:
    """Replace the helpers, also where modules imported them by name."""
    from paddle.distributed.fleet.utils import hybrid_parallel_util

    # pp_layers.py reads the device id, which parallel.py only sets where there are devices.
    ParallelEnv._device_id = 0
    # communication/{reduce,all_reduce,reduce_scatter}.py ask whether NCCL is 2.10 before averages.
    if not hasattr(core, "nccl_version"):
        core.nccl_version = lambda: 21000
    # flex_checkpoint/reshard_comm.py moves to the GPU without asking whether there is one.
    Tensor.cuda = _stay
    replaced = hybrid_parallel_util.broadcast_input_data
    for module in list(sys.modules.values()):
        if getattr(module, "broadcast_input_data", None) is replaced:
            module.broadcast_input_data = _broadcast_input_data
