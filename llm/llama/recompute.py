"""Activations that are computed again in the backward pass, not kept (Chen et al. 2016).

Granularities have PaddleNLP's names:

- ``full``: a decoder layer keeps its input only;
- ``full_attn``: the attention, with its matrices, keeps its input only;
- ``core_attn``: softmax(QK)V keeps queries, keys and values only ("selective", Korthikanti et al.
  2022): most of the memory of long rows for little work.

The same operations run again with the same random numbers, so results do not change by a bit. The
one exception is ``core_attn`` with the reference kernel, whose many operations otherwise add the
gradients of queries, keys and values up in another order: there the last digit may change.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import paddle
from paddle import Tensor, nn

from common.devices import CPU
from common.errors import UserError
from external_ops import devices
from llm.llama.modeling import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from llm.llama.seams import call

GRANULARITIES = ("full", "full_attn", "core_attn")

_log = logging.getLogger(__name__)


def recompute_layers(
    model: LlamaForCausalLM,
    *,
    granularity: str = "full",
    num_layers: int | None = None,
    offload: bool = False,
) -> None:
    """Let decoder layers keep fewer activations while training, in place.

    Args:
        model: a network, or a stage of one.
        granularity: one of :data:`GRANULARITIES`.
        num_layers: only the first so many layers of the whole network; None is all of them.
        offload: what is kept lies in pinned host memory until the backward pass. On CPU that is
            where it lies anyway.

    Raises:
        UserError: an unknown granularity, or a number of layers that the network does not have.
    """
    if granularity not in GRANULARITIES:
        raise UserError(
            f"recompute_granularity={granularity!r} is not one of {', '.join(GRANULARITIES)}"
        )
    layers = model.config.num_hidden_layers
    number = layers if num_layers is None else num_layers
    if not 1 <= number <= layers:
        raise UserError(
            f"recompute_num_layers={num_layers} has to be between 1 and the model's {layers} layers"
        )
    if offload and devices.current() == CPU:
        _log.info("recompute_offload: a rehearsal, since on CPU activations are in host memory")
    again = partial(_again, offload=offload)

    def run_attention(attention: LlamaAttention, x: Tensor, *others: Any) -> Tensor:
        return (again if attention.index < number else call)(attention, x, *others)

    def run_layer(
        layer: LlamaDecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, *rest: Any
    ) -> Tensor:
        if layer.self_attn.index >= number:
            return layer(x, cos, sin, *rest)
        if granularity == "full":
            return again(layer, x, cos, sin, *rest)
        attend, *before = rest
        return layer(x, cos, sin, partial(_core_again, attend, offload), *before)

    if granularity == "full_attn":
        model.seams.run_attention = run_attention
    else:
        model.seams.run_layer = run_layer


def _again(layer: nn.Layer, x: Tensor, *others: Any, offload: bool) -> Tensor:
    """Call a layer now, and once more when its gradient is wanted."""
    if not layer.training or not paddle.is_grad_enabled():
        return layer(x, *others)
    tensors = [item for item in (x, *others) if isinstance(item, Tensor)]
    if all(item.stop_gradient for item in tensors):
        if all(parameter.stop_gradient for parameter in layer.parameters()):
            return layer(x, *others)
        # Below a frozen embedding Paddle would take the whole layer for frozen, adapters included.
        x = x.detach()
        x.stop_gradient = False
    return _recompute(layer, x, *others, offloaded=[0] if offload else [])


def _core_again(
    attend: Callable[..., Tensor], offload: bool, index: int, *tensors: Tensor
) -> Tensor:
    """Call attention now, and once more when its gradient is wanted."""
    if not paddle.is_grad_enabled() or all(tensor.stop_gradient for tensor in tensors):
        return attend(index, *tensors)
    offloaded = list(range(len(tensors))) if offload else []
    return _recompute(partial(attend, index), *tensors, offloaded=offloaded)


def _recompute(function: Callable[..., Tensor], *inputs: Any, offloaded: list[int]) -> Tensor:
    from paddle.distributed.fleet.utils import recompute

    return recompute(function, *inputs, offload_indices=offloaded)
