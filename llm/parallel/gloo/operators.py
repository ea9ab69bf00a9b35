"""What fleet calls that only GPUs have in Paddle 3.3.1.

Tensor parallel operators without a CPU kernel: ``paddle/distributed/fleet/layers/mpu/mp_ops.py``
calls them as ``_C_ops.c_*`` and would end in "kernel is not registered". And Python helpers that
assume a device.
"""

import sys
from typing import Any

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.base import core
from paddle.distributed import ParallelEnv
from paddle.distributed.collective import _get_group_map

from llm.parallel.gloo import collectives


def _group(ring_id: int) -> Any:
    return _get_group_map()[ring_id].process_group


class _Concat(PyLayer):
    """Gather along the last axis; backward each rank keeps its part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: int, ranks: int, ring_id: int) -> Tensor:
        ctx.rank, ctx.ranks = rank, ranks
        return paddle.concat(list(collectives.gathered(_group(ring_id), x)), axis=-1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return paddle.split(dy, ctx.ranks, axis=-1)[ctx.rank].contiguous()


class _CrossEntropy(PyLayer):
    """Cross-entropy over a vocabulary that is split over ranks (Megatron-LM, section 3).

    No rank sees all logits: the maximum, the sum of exponentials and the label's logit are
    reduced. Inputs: logits ``[..., V/ranks]``, labels ``[..., 1]`` in 0 … V-1 or ``ignore_index``.
    Returns the softmax of this rank's part (no gradient) and the loss ``[..., 1]``.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, label: Tensor, ignore_index: int, ring_id: int, rank: int, n: int
    ) -> tuple[Tensor, Tensor]:
        group = _group(ring_id)
        width = logits.shape[-1]
        wide = logits if logits.dtype == paddle.float64 else logits.astype("float32")
        label = label.astype("int64")
        keep = label != ignore_index
        _check_labels(label, keep, width * n, ignore_index)
        top = wide.max(axis=-1, keepdim=True)
        collectives.all_reduce(group, top, core.ReduceOp.MAX)
        shifted = wide - top
        exponentials = shifted.exp()
        local = label - rank * width
        mine = keep & (local >= 0) & (local < width)
        picked = paddle.take_along_axis(shifted, local.clip(0, width - 1), axis=-1)
        zero = paddle.zeros_like(picked)
        sums = paddle.stack(
            [exponentials.sum(axis=-1, keepdim=True), paddle.where(mine, picked, zero)]
        )
        collectives.all_reduce(group, sums, core.ReduceOp.SUM)
        total, target = sums[0], sums[1]
        loss = paddle.where(keep, total.log() - target, zero)
        softmax = exponentials / total
        ctx.save_for_backward(softmax, local, mine, keep)
        ctx.dtype = logits.dtype
        return softmax.astype(logits.dtype), loss.astype(logits.dtype)

    @staticmethod
    def backward(ctx: Any, _: Tensor, dloss: Tensor) -> tuple[Tensor, None]:
        softmax, local, mine, keep = ctx.saved_tensor()
        width = softmax.shape[-1]
        one_hot = paddle.nn.functional.one_hot(local.clip(0, width - 1).squeeze(-1), width)
        grad = softmax - one_hot.astype(softmax.dtype) * mine.astype(softmax.dtype)
        grad = grad * keep.astype(softmax.dtype) * dloss.astype(softmax.dtype)
        return grad.astype(ctx.dtype), None


def _check_labels(label: Tensor, keep: Tensor, vocabulary: int, ignore_index: int) -> None:
    wrong = keep & ((label < 0) | (label >= vocabulary))
    if wrong.any():
        value = int(label[wrong][0])
        raise ValueError(
            f"label {value} is outside of the vocabulary 0 … {vocabulary - 1} and is not "
            f"ignore_index {ignore_index}"
        )


def _identity(x: Tensor, *_: Any) -> Tensor:
    return paddle.assign(x)


def _split(x: Tensor, rank: int, ranks: int, *_: Any) -> Tensor:
    return paddle.split(x, ranks, axis=-1)[rank].contiguous()


def _concat(x: Tensor, rank: int, ranks: int, ring_id: int, *_: Any) -> Tensor:
    return _Concat.apply(x, rank, ranks, ring_id)


def _cross_entropy(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _CrossEntropy.apply(*arguments)


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
    """Replace operators and helpers, the latter also where modules imported them by name."""
    operators = paddle._C_ops
    operators.c_identity = _identity
    operators.c_split = _split
    operators.c_concat = _concat
    operators.c_softmax_with_cross_entropy = _cross_entropy
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
