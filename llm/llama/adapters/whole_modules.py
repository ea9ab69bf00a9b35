"""Layers that train whole beside an adapter's products: PEFT's ``modules_to_save``.

They are the network's own layers, whose parameters learn like those of a run that trains all
weights, and lie in the adapter's file under PEFT's names, in float32.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from paddle import Tensor

from common.errors import UserError
from llm.llama.adapters.lora_config import LoRAConfig
from llm.llama.frozen import thawed
from llm.llama.layers import replace_layer
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.placement import is_matrix
from llm.parallel.pieces import split_axis


def whole_modules(model: LlamaForCausalLM, config: LoRAConfig) -> list[str]:
    """Return the layers that train whole, by name; of a stage, those that it holds.

    Args:
        model: the network.
        config: of the adapter.

    Raises:
        UserError: a name that ends no layer's, or a layer of integers.
    """
    held = dict(model.named_sublayers())
    chosen = [name for name in config.modules(model.config) if name in held]
    for name in chosen:
        if "weight" not in dict(held[name].named_parameters(include_sublayers=False)):
            raise UserError(
                f"modules_to_save: {name} holds integers, which do not train; leave it out, or "
                "take a base in floating point"
            )
    return chosen


def set_trainable(model: LlamaForCausalLM, names: Iterable[str], trainable: bool) -> None:
    """Let layers learn, or not; those that only lie in bfloat16 become float32, in place."""
    for name in names:
        layer = dict(model.named_sublayers())[name]
        plain = thawed(layer)
        if plain is not layer:
            replace_layer(model, name, plain)
        for parameter in plain.parameters(include_sublayers=False):
            parameter.stop_gradient = not trainable


def module_parameters(model: LlamaForCausalLM, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the parameters of layers by their names in the network."""
    layers = dict(model.named_sublayers())
    return {
        f"{name}.{kind}": parameter
        for name in names
        for kind, parameter in layers[name].named_parameters(include_sublayers=False)
    }


def own_values(
    model: LlamaForCausalLM, names: Iterable[str], stored: Mapping[str, np.ndarray]
) -> list[tuple[Tensor, np.ndarray]]:
    """Return each parameter of layers with what a file holds for it, or this process's part.

    Args:
        model: the network.
        names: of the layers.
        stored: complete arrays by parameter, matrices ``[out, in]``.
    """
    layers = dict(model.named_sublayers())
    found = []
    for name, parameter in module_parameters(model, names).items():
        value = stored[name].T if is_matrix(name) else stored[name]
        axis = split_axis(parameter)
        if axis is not None:
            group = layers[name.rpartition(".")[0]].model_parallel_group
            value = np.split(value, group.nranks, axis)[group.rank]
        found.append((parameter, value))
    return found


def stored_shape(model: LlamaForCausalLM, name: str, parameter: Tensor) -> tuple[int, ...]:
    """Return the complete shape that a file holds of a parameter, matrices ``[out, in]``."""
    axis, shape = split_axis(parameter), list(parameter.shape)
    if axis is not None:
        layer = dict(model.named_sublayers())[name.rpartition(".")[0]]
        shape[axis] *= layer.model_parallel_group.nranks
    return tuple(shape[::-1] if is_matrix(name) else shape)
