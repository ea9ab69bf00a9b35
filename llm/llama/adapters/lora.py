"""Low-rank adaptation (Hu et al. 2021) of any linear of the network, in PEFT's file layout.

The network stays as it is: :func:`add_lora` puts a :class:`LoRALinear` where a linear was, and
``llm.llama.merging`` puts a linear back. DoRA's magnitudes and layers that train whole lie beside
the products. Files hold PEFT's transposed matrices and names; an adapter that PiSSA started is
stored as the plain one of twice the rank that it is over the model as published, with what it was
trained as in ``pissa.json``, so that it can go on.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from common.errors import UserError
from common.files import Work
from llm.llama.adapters.lora_config import EMBEDDING, LoRAConfig
from llm.llama.adapters.lora_linear import (
    LoRALinear,
    adapted,
    has_lora,
    mergeable,
)
from llm.llama.adapters.lora_placing import (
    Start,
    drawn,
    numbers,
    plan,
    set_numbers,
    trainable_parameters,
    wrap,
)
from llm.llama.adapters.pissa import Factors
from llm.llama.adapters.whole_modules import (
    module_parameters,
    own_values,
    set_trainable,
    stored_shape,
    whole_modules,
)
from llm.llama.files import peft
from llm.llama.files.finite import read_finite
from llm.llama.files.parts import Part
from llm.llama.files.safetensors import StoredTensor
from llm.llama.layers import name_parameters
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.packed_layers import PackedLinear
from llm.llama.placement import is_matrix
from llm.parallel.pieces import Gatherer, split_axis, whole_shape
from llm.parallel.tensor import TensorLinear
from llm.parallel.topology import Topology, single

__all__ = [
    "LoRAConfig",
    "LoRALinear",
    "add_lora",
    "has_lora",
    "load_lora",
    "lora_disabled",
    "numbers",
    "save_lora",
    "set_numbers",
    "trainable_parameters",
    "without_base",
]

_PREFIX = "base_model.model."
# Fields that say what is trained; an adapter that is there is filled by one of the same only.
_METHOD = ("use_dora", "is_pissa", "modules_to_save")


def _check_no_prefix(model: LlamaForCausalLM) -> None:
    if model.seams.prefix is not None:
        raise UserError("the model has a prefix; one adapter at a time: load the model again")


def add_lora(
    model: LlamaForCausalLM, config: LoRAConfig, seed: int | None = None
) -> LlamaForCausalLM:
    """Freeze a network and add trainable products to its linears, in place.

    Frozen parameters have ``stop_gradient``, so they get no gradients and no optimizer state.

    Args:
        model: the network.
        config: which linears, which rank.
        seed: of A, independent of Paddle's generator; None draws a new one.

    Returns:
        The same network.

    Raises:
        UserError: a target or a layer that the network does not have, weights from which a method
            cannot start, or a network that has an adapter; the network is unchanged.
    """
    if has_lora(model):
        raise UserError("the model has a LoRA adapter already; merge it before adding another")
    _check_no_prefix(model)
    modules = whole_modules(model, config)
    if model.config.tie_word_embeddings and EMBEDDING in modules:
        config = replace(config, ensure_weight_tying=True)
    wrap(model, config, plan(model, config, strict=True), drawn(config, seed))
    set_trainable(model, modules, True)
    name_parameters(model)
    return model


@contextlib.contextmanager
def lora_disabled(model: nn.Layer) -> Iterator[None]:
    """Let a network answer as if it had no adapter, such as for DPO's reference.

    Raises:
        UserError: an adapter that trains layers whole, whose weights before are gone.
    """
    adapters = adapted(model).values()
    for layer in adapters:
        if layer.config.modules_to_save is not None:
            raise UserError(
                f"the adapter trains {', '.join(layer.config.modules_to_save)} whole, which cannot "
                "be switched off; load the base model beside it"
            )
    before = [layer.disabled for layer in adapters]
    for layer in adapters:
        layer.disabled = True
    try:
        yield
    finally:
        for layer, value in zip(adapters, before, strict=True):
            layer.disabled = value


def save_lora(
    model: LlamaForCausalLM,
    directory: str | Path,
    *,
    topology: Topology | None = None,
    full: Callable[[Tensor], AbstractContextManager[Tensor]] = nullcontext,
    work: Work | None = None,
) -> None:
    """Write the adapter alone, in PEFT's layout and in float32.

    Args:
        model: a network with an adapter, or this process's share of one.
        directory: created when absent; an adapter in it is replaced.
        topology, full, work: those of :func:`llm.llama.files.weights.save_weights`.

    Raises:
        UserError: the network has no adapter.
        OSError: a full or unwritable disk; what was in the directory is unchanged.
    """
    adapters = adapted(model)
    if not adapters:
        raise UserError("the model has no LoRA adapter to save")
    gather = Gatherer(topology or single(), full)
    config = next(iter(adapters.values())).config
    parts = [
        part
        for name, layer in sorted(adapters.items())
        for part in _layer_parts(f"{_PREFIX}{name}", layer, gather)
    ]
    parts += _module_parts(model, whole_modules(model, config), gather)
    beside = {peft.STARTED: _described(config, adapters)} if config.is_pissa else {}
    written = _described(config.as_plain() if config.is_pissa else config, adapters)
    peft.write_adapter(directory, written, parts, beside=beside, topology=topology, work=work)


def _described(config: LoRAConfig, adapters: Mapping[str, LoRALinear]) -> dict[str, Any]:
    """Return what PEFT would say of an adapter."""
    raw = config.to_peft()
    # As PEFT does: readers should not have to know what "all" was.
    if raw["target_modules"] == "all-linear":
        raw["target_modules"] = sorted({name.rsplit(".", 1)[-1] for name in adapters})
    return raw


def _layer_parts(stem: str, layer: LoRALinear, gather: Gatherer) -> list[Part]:
    first, second = [layer.lora_A], [layer.lora_B]
    if layer.start_A is not None:  # the start is taken off, so it lies beside with a minus
        first, second = [*first, layer.start_A], [*second, layer.start_B]
    parts = [
        _part(f"{stem}.lora_A.weight", first, gather, rank_axis=1),
        _part(f"{stem}.lora_B.weight", second, gather, rank_axis=0),
    ]
    if layer.lora_magnitude_vector is not None:
        vector = f"{stem}.lora_magnitude_vector"
        parts.append(_part(vector, [layer.lora_magnitude_vector], gather))
    return parts


def _module_parts(model: LlamaForCausalLM, modules: Sequence[str], gather: Gatherer) -> list[Part]:
    parts = []
    for name, parameter in module_parameters(model, modules).items():
        if getattr(parameter, "stage_shared", False) and not gather.topology.stage_first:
            continue
        places = [name]
        if model.config.tie_word_embeddings and name.startswith(f"{EMBEDDING}."):
            places.append("lm_head.weight")  # PEFT writes both
        turn = is_matrix(name)
        parts += [_part(f"{_PREFIX}{place}", [parameter], gather, turn=turn) for place in places]
    return parts


def _part(
    name: str,
    pieces: Sequence[Tensor],
    gather: Gatherer,
    *,
    rank_axis: int | None = None,
    turn: bool = True,
) -> Part:
    """Return a tensor of a file: a parameter, or a factor with that of the start behind it."""
    axis = split_axis(pieces[0])

    def fetch(writer: int) -> np.ndarray | None:
        found = []
        for piece in pieces:
            with gather.full(piece) as whole:
                found.append(gather.tensor(whole.detach().astype("float32"), axis, writer))
        if any(one is None for one in found):
            return None
        data = found[0]
        if len(found) > 1:
            sign = -1 if rank_axis == 0 else 1
            data = np.concatenate([data, sign * found[1]], axis=rank_axis)
        return data.T if turn else data

    shape = list(whole_shape(pieces[0].shape, axis, gather.topology))
    if rank_axis is not None:
        shape[rank_axis] *= len(pieces)
    return Part(name, tuple(shape[::-1] if turn else shape), "F32", fetch)


def _in_other_stage(model: LlamaForCausalLM, name: str) -> bool:
    """Say whether a tensor belongs to a stage of the pipeline that lies in other processes."""
    stage = model.seams.stage
    if stage is None:
        return False
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if layer is not None:
        number = int(layer[1])
        return number < model.config.num_hidden_layers and number not in model.model.layers.numbers
    if ".embed_tokens." in name:
        return not (stage.first or (stage.last and model.config.tie_word_embeddings))
    return (".lm_head." in name or ".model.norm." in name) and not stage.last


def _floats(base: nn.Layer) -> np.ndarray | None:
    """Return a linear's weight ``[I, O]``; None where it has none in floating point."""
    if mergeable(base):
        return base.weight.astype("float32").numpy()
    if isinstance(base, PackedLinear) and base.weight.kind in ("float32", "bfloat16"):
        return base.weight.rows(paddle.arange(base.weight.outputs)).numpy().T
    return None


def without_base(
    directory: str | Path, tensors: dict[str, StoredTensor], layers: dict[str, nn.Layer]
) -> dict[str, StoredTensor]:
    """Leave out copies of base weights, which PEFT adds when it adapts lm_head.

    Args:
        directory: of the adapter.
        tensors: in its file, by name.
        layers: of the network, by name: linears, packed or not, with an adapter or without.

    Raises:
        UserError: a copy that differs from the network's own weight.
    """
    kept = {}
    for name, tensor in tensors.items():
        layer = layers.get(name.removeprefix(_PREFIX).removesuffix(".base_layer.weight"))
        if not name.endswith(".base_layer.weight") or layer is None:
            kept[name] = tensor
            continue
        base = layer.base if isinstance(layer, LoRALinear) else layer
        own, theirs = _floats(base), tensor.read().T
        if own is None:
            continue  # in another format it cannot be equal, nor has it to be
        if isinstance(base, PackedLinear) and base.weight.kind == "bfloat16":
            theirs = paddle.to_tensor(theirs).astype("bfloat16").astype("float32").numpy()
        if isinstance(base, TensorLinear) and theirs.shape == (base.in_features, base.out_features):
            theirs = base.own_matrix(theirs, base.weight.split_axis)
        if theirs.shape != own.shape or not np.array_equal(theirs, own):
            raise UserError(
                f"{directory} brings its own {name}, which differs from this model's: the base was "
                "trained or resized too; merge the adapter with PEFT instead"
            )
    return kept


def load_lora(
    model: LlamaForCausalLM, directory: str | Path, trainable: bool = False
) -> LlamaForCausalLM:
    """Add an adapter from files, or fill the one that the network has.

    Args:
        model: the network that the adapter was trained on; its weights get frozen.
        directory: in PEFT's layout, written by this suite or by PEFT.
        trainable: whether A and B go on learning.

    Returns:
        The same network.

    Raises:
        UserError: an adapter of another model or kind, or a damaged one; the network is unchanged.
    """
    present = adapted(model)
    stored, config = _configs(directory, trainable or bool(present))
    _check_no_prefix(model)
    _check_same_method(present, config, directory)
    names = list(present) or plan(model, config, strict=False)
    modules = whole_modules(model, config)
    values = _values(model, directory, names, modules, stored)
    if not present:
        wrap(model, config, names, _starts(config, stored, values))
    set_trainable(model, modules, trainable)
    name_parameters(model)
    for name, layer in adapted(model).items():
        layer.config, layer.scaling = config, config.scaling(name)
        layer.forget_lengths()
        for which, parameter, value in _layer_values(name, layer, values):
            set_numbers(parameter, layer.own_part(which, value))
            if parameter is not layer.start_A and parameter is not layer.start_B:
                parameter.stop_gradient = not trainable
    whole = {name.removeprefix(_PREFIX): value for name, value in values.items()}
    for parameter, value in own_values(model, modules, whole):
        set_numbers(parameter, value)
    return model


def _configs(directory: str | Path, goes_on: bool) -> tuple[LoRAConfig, LoRAConfig]:
    """Return what an adapter's tensors are, and what the network is to carry."""
    place = Path(directory) / peft.CONFIG_NAME
    stored = LoRAConfig.from_peft(peft.read_config(directory, "LORA"), str(place))
    if stored.pissa_iterations is not None:
        raise UserError(
            f"{place}: init_lora_weights={stored.init_lora_weights!r} starts from random numbers, "
            "so nobody can tell what was left of the base; save it as plain LoRA (PEFT's "
            "path_initial_model_for_weight_conversion)"
        )
    started = peft.read_beside(directory, peft.STARTED) if goes_on else None
    if started is None:
        return stored, stored
    return stored, LoRAConfig.from_peft(started, str(Path(directory) / peft.STARTED))


def _check_same_method(
    present: Mapping[str, LoRALinear], config: LoRAConfig, directory: str | Path
) -> None:
    for layer in present.values():
        for field in _METHOD:
            here, there = getattr(layer.config, field), getattr(config, field)
            if here != there:
                raise UserError(
                    f"{directory} was made with {field}={there}, the adapter that the model has "
                    f"with {here}; load the model again"
                )


def _values(
    model: LlamaForCausalLM,
    directory: str | Path,
    names: Sequence[str],
    modules: Sequence[str],
    stored: LoRAConfig,
) -> dict[str, np.ndarray]:
    """Return the tensors of an adapter's file that this process needs, once all are right."""
    layers, expected = dict(model.named_sublayers()), {}
    for name in names:
        base, stem, rank = layers[name], f"{_PREFIX}{name}", stored.rank(name)
        if isinstance(base, LoRALinear):
            rank = base.rank if base.start_A is None or stored.is_pissa else 2 * base.rank
        expected[f"{stem}.lora_A.weight"] = (rank, base.in_features)
        expected[f"{stem}.lora_B.weight"] = (base.out_features, rank)
        if stored.use_dora:
            expected[f"{stem}.lora_magnitude_vector"] = (base.out_features,)
    for name, parameter in module_parameters(model, modules).items():
        expected[f"{_PREFIX}{name}"] = stored_shape(model, name, parameter)
    tensors = dict(peft.read_tensors(directory))
    if model.config.tie_word_embeddings and EMBEDDING in modules:
        _drop_tied_head(directory, tensors, stored)
    own = {n: tensor for n, tensor in tensors.items() if not _in_other_stage(model, n)}
    needed = without_base(directory, own, layers)
    peft.check_tensors(directory, needed, expected, stored.base_model_name_or_path)
    for name in tensors.keys() - own.keys():
        read_finite(tensors[name])  # so that all stages end, and say the same
    return peft.read_values(needed)


def _drop_tied_head(
    directory: str | Path, tensors: dict[str, StoredTensor], stored: LoRAConfig
) -> None:
    """Leave out the output matrix that PEFT writes beside an embedding that is both."""
    embedding, head = f"{_PREFIX}{EMBEDDING}.weight", f"{_PREFIX}lm_head.weight"
    if not stored.ensure_weight_tying:
        raise UserError(
            f"{directory} trained the embedding apart from the output matrix, which this model "
            "shares with it (PEFT's ensure_weight_tying was off); merge it with PEFT"
        )
    if embedding not in tensors or head not in tensors:
        return
    if not np.array_equal(tensors[embedding].read(), tensors.pop(head).read()):
        raise UserError(f"{directory} is damaged: {embedding} and {head} should be equal")


def _starts(config: LoRAConfig, stored: LoRAConfig, values: Mapping[str, np.ndarray]) -> Start:
    """Return the factors of which a network's layers start before they take what a file holds."""
    if config.is_pissa == stored.is_pissa:
        return drawn(config, 0)  # PiSSA's of PEFT's own file, whose start follows from the base

    def start(name: str, _: nn.Layer) -> Factors:
        rank, stem = config.rank(name), f"{_PREFIX}{name}"
        return Factors(
            np.ascontiguousarray(values[f"{stem}.lora_A.weight"][rank:].T),
            np.ascontiguousarray(-values[f"{stem}.lora_B.weight"][:, rank:].T),
        )

    return start


def _layer_values(
    name: str, layer: LoRALinear, values: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    """Yield each parameter of a layer, which of an adapter's it is, and its complete numbers."""
    stem, rank = f"{_PREFIX}{name}", layer.rank
    first, second = values[f"{stem}.lora_A.weight"].T, values[f"{stem}.lora_B.weight"].T
    yield "a", layer.lora_A, first[:, :rank]
    yield "b", layer.lora_B, second[:rank]
    if first.shape[1] > rank:
        yield "a", layer.start_A, first[:, rank:]
        yield "b", layer.start_B, -second[rank:]
    if layer.lora_magnitude_vector is not None:
        yield "m", layer.lora_magnitude_vector, values[f"{stem}.lora_magnitude_vector"]
