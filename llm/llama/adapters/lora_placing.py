"""How low-rank products come into a network: beside which linears, and with which first numbers."""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn
from tqdm import tqdm

from llm.llama.adapters.lora_config import LoRAConfig
from llm.llama.adapters.lora_linear import Base, LoRALinear, base_weight
from llm.llama.adapters.pissa import Factors, principal_factors
from llm.llama.layers import replace_layer
from llm.llama.modeling import LlamaForCausalLM
from llm.parallel.tensor import TensorLinear

Start = Callable[[str, nn.Layer], Factors]


def numbers(parameter: Tensor) -> np.ndarray:
    """Return a parameter's values in float32, whatever mixed precision made of it."""
    return parameter.detach().astype("float32").numpy()


def set_numbers(parameter: Tensor, values: np.ndarray) -> None:
    """Give a parameter values, in its own type."""
    tensor = paddle.to_tensor(np.ascontiguousarray(values))
    parameter.set_value(tensor.astype(parameter.dtype))


def trainable_parameters(model: nn.Layer) -> tuple[int, int]:
    """Return how many numbers are trained, and how many parameters have in all."""
    sizes = [(int(p.size), p.stop_gradient) for p in model.parameters()]
    return sum(size for size, frozen in sizes if not frozen), sum(size for size, _ in sizes)


def _linear_names(model: LlamaForCausalLM) -> list[str]:
    """Return the linears of the whole network, of which a stage holds some."""
    held = [n for n, layer in model.named_sublayers() if isinstance(layer, Base)]
    if model.seams.stage is None:
        return held
    inner = dict.fromkeys(n.split(".", 3)[3] for n in held if n.startswith("model.layers."))
    layers = range(model.config.num_hidden_layers)
    names = [f"model.layers.{number}.{name}" for number in layers for name in inner]
    return names if model.config.tie_word_embeddings else [*names, "lm_head"]


def plan(model: LlamaForCausalLM, config: LoRAConfig, *, strict: bool) -> list[str]:
    """Return the names of the linears to wrap; of a stage, those that it holds.

    Args:
        model: the network.
        config: of the adapter.
        strict: see :meth:`LoRAConfig.targets`.

    Raises:
        UserError: a target that the network does not have.
    """
    held = dict(model.named_sublayers())
    return [n for n in config.targets(_linear_names(model), strict=strict) if n in held]


def _uniform(rng: np.random.Generator, size_in: int, rank: int) -> np.ndarray:
    """Draw A as PEFT does: ``kaiming_uniform_(a=sqrt(5))``, which is uniform within 1/sqrt(in)."""
    bound = 1 / np.sqrt(size_in)
    return rng.uniform(-bound, bound, [size_in, rank]).astype(np.float32)


def drawn(config: LoRAConfig, seed: int | None) -> Start:
    """Return what gives each linear its first factors.

    Args:
        config: of the adapter.
        seed: of each factor, together with its name; None draws a new one.
    """

    def start(name: str, base: nn.Layer) -> Factors:
        # Drawn by name, so that stages start like the whole network.
        own = None if seed is None else [seed, zlib.crc32(name.encode())]
        rng, rank = np.random.default_rng(own), config.rank(name)
        if not config.is_pissa:
            zeros = np.zeros([rank, base.out_features], np.float32)
            return Factors(_uniform(rng, base.in_features, rank), zeros)
        split = isinstance(base, TensorLinear)
        weight = base.whole_weight() if split else base_weight(base, name, "pissa")
        options: dict[str, Any] = {"iterations": config.pissa_iterations, "rng": rng, "name": name}
        return principal_factors(weight.numpy(), rank, config.scaling(name), **options)

    return start


def wrap(
    model: LlamaForCausalLM, config: LoRAConfig, names: list[str], start: Start
) -> LlamaForCausalLM:
    """Freeze a network and put products beside linears, in place; parameters are not named yet.

    Args:
        model: the network.
        config: of the adapter.
        names: of the linears.
        start: gives the first factors.

    Raises:
        UserError: weights from which a method cannot start; the network is unchanged.
    """
    layers = dict(model.named_sublayers())
    made = {}
    # Singular values of billions of weights take minutes.
    for name in tqdm(names, "pissa", disable=None if config.is_pissa else True, leave=False):
        base = layers[name]
        made[name] = LoRALinear(base, config, name, start(name, base))
        made[name].training = base.training
    for parameter in model.parameters():
        parameter.stop_gradient = True
    for name, wrapped in made.items():
        replace_layer(model, name, wrapped)
    return model
