"""Low-rank adaptation (Hu et al. 2021) of any linear of the network, in PEFT's file layout.

The network stays as it is: :func:`add_lora` puts a :class:`LoRALinear` where a linear was, and
``llm.llama.merging`` puts a linear back. In memory ``lora_A`` is
``[in, r]`` and ``lora_B`` ``[r, out]``, the way Paddle stores linears; files hold PEFT's transposed
matrices and names.
"""

import contextlib
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from common.errors import UserError
from common.files import Work
from llm.llama.adapters.lora_config import LoRAConfig
from llm.llama.files import peft
from llm.llama.files.finite import read_finite
from llm.llama.files.parts import Part
from llm.llama.files.safetensors import StoredTensor
from llm.llama.layers import Linear, name_parameters, replace_layer
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.packed_layers import PackedLinear
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


@runtime_checkable
class Base(Protocol):
    """What a product can be put beside; quantized linears too (QLoRA, Dettmers et al. 2023)."""

    in_features: int
    out_features: int

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``, and pass gradients to the input."""


def mergeable(base: nn.Layer) -> bool:
    """Say whether a product can be added to a base's ``weight [in, out]``, or this rank's part."""
    return isinstance(base, Linear | TensorLinear)


class LoRALinear(nn.Layer):
    """A frozen linear plus a trained low-rank product: ``base(x) + scaling * (x A) B``.

    Args:
        base: any :class:`Base`; only merging asks for a float weight. Beside a linear of
            ``llm.parallel.tensor`` the product is split as that one is.
        config: of the adapter that the product is a part of.
        name: of the linear in the network, by which ``config`` has its rank and its scaling.
        start: float32 ``[in, rank]``, the first A. B starts at zero, so nothing changes at first.

    ``disabled`` switches the product off. A and B start as float32 whatever the base computes in.
    """

    plain_weight = None

    def __init__(self, base: nn.Layer, config: LoRAConfig, name: str, start: np.ndarray) -> None:
        super().__init__()
        assert isinstance(base, Base), type(base)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base, self.config = base, config
        self.rank, self.scaling = config.rank(name), config.scaling(name)
        self.dropout, self.disabled = config.lora_dropout, False
        self.lora_A = self._factor("a", start)
        self.lora_B = self._factor("b", np.zeros([self.rank, self.out_features], np.float32))

    def _factor(self, which: str, whole: np.ndarray) -> Tensor:
        own = self.own_part(which, whole)
        start = nn.initializer.Assign(own)
        made = self.create_parameter(list(own.shape), dtype="float32", default_initializer=start)
        if self.parallel:
            if which in self.base.split:
                made.is_distributed, made.split_axis = True, self.base.split[which]
            made.sequence_parallel = which in self.base.shares
        return made

    @property
    def parallel(self) -> bool:
        """Whether the base is a tensor parallel rank's part of a linear."""
        return isinstance(self.base, TensorLinear)

    def own_part(self, which: str, whole: np.ndarray) -> np.ndarray:
        """Return this rank's part of A (``which`` is "a") ``[in, r]`` or B ("b") ``[r, out]``."""
        if not self.parallel or which not in self.base.split:
            return whole
        return self.base.own_matrix(whole, self.base.split[which])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` in the type of the base's result."""
        out = self.base(x)
        if self.disabled:
            return out
        x = x.astype(self.lora_A.dtype)
        if self.training and self.dropout > 0:
            x = self._dropped(x)
        inner = paddle.matmul(x, self.lora_A) * self.scaling
        if self.parallel:
            inner = self.base.between(inner)
        # In place: a third array of this size, freed among small ones that stay, is memory lost.
        return out.add_(paddle.matmul(inner, self.lora_B).astype(out.dtype))

    def _dropped(self, x: Tensor) -> Tensor:
        whole = self.base.whole_input(x.shape) if self.parallel else x.shape
        if whole == x.shape:
            return F.dropout(x, self.dropout)
        # What one process drops: ranks have equal generators and cut their part of one mask.
        return x * self.base.own_input(F.dropout(paddle.ones(whole, x.dtype), self.dropout))


def adapted(model: nn.Layer) -> dict[str, LoRALinear]:
    """Return the linears of a network that carry a product, by name."""
    return {n: layer for n, layer in model.named_sublayers() if isinstance(layer, LoRALinear)}


def has_lora(model: nn.Layer) -> bool:
    """Say whether a network carries a LoRA adapter."""
    return bool(adapted(model))


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


def _plan(model: LlamaForCausalLM, config: LoRAConfig, *, strict: bool) -> list[str]:
    """Return the names of the linears to wrap; of a stage, those that it holds."""
    held = dict(model.named_sublayers())
    return [n for n in config.targets(_linear_names(model), strict=strict) if n in held]


def _start(rng: np.random.Generator, size_in: int, rank: int) -> np.ndarray:
    """Draw A as PEFT does: ``kaiming_uniform_(a=sqrt(5))``, which is uniform within 1/sqrt(in)."""
    bound = 1 / np.sqrt(size_in)
    return rng.uniform(-bound, bound, [size_in, rank]).astype(np.float32)


def _wrap(
    model: LlamaForCausalLM, config: LoRAConfig, names: list[str], seed: int | None
) -> LlamaForCausalLM:
    for parameter in model.parameters():
        parameter.stop_gradient = True
    layers = dict(model.named_sublayers())
    for name in names:
        base = layers[name]
        # Drawn by name, so that stages start like the whole network.
        own = None if seed is None else [seed, zlib.crc32(name.encode())]
        start = _start(np.random.default_rng(own), base.in_features, config.rank(name))
        wrapped = LoRALinear(base, config, name, start)
        wrapped.training = base.training
        replace_layer(model, name, wrapped)
    name_parameters(model)
    return model


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
        UserError: a target that the network does not have, or a network that has an adapter.
    """
    if has_lora(model):
        raise UserError("the model has a LoRA adapter already; merge it before adding another")
    _check_no_prefix(model)
    return _wrap(model, config, _plan(model, config, strict=True), seed)


@contextlib.contextmanager
def lora_disabled(model: nn.Layer) -> Iterator[None]:
    """Let a network answer as if it had no adapter, such as for DPO's reference."""
    adapters = adapted(model).values()
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
    parts = [
        _part(f"{_PREFIX}{name}.{kind}.weight", getattr(layer, kind), gather)
        for name, layer in sorted(adapters.items())
        for kind in ("lora_A", "lora_B")
    ]
    config = next(iter(adapters.values())).config.to_peft()
    # As PEFT does: readers should not have to know what "all" was.
    if config["target_modules"] == "all-linear":
        config["target_modules"] = sorted({name.rsplit(".", 1)[-1] for name in adapters})
    peft.write_adapter(directory, config, parts, topology=topology, work=work)


def _part(name: str, matrix: Tensor, gather: Gatherer) -> Part:
    axis = split_axis(matrix)

    def fetch(writer: int) -> np.ndarray | None:
        with gather.full(matrix) as whole:
            data = gather.tensor(whole.detach().astype("float32"), axis, writer)
        return None if data is None else data.T

    return Part(name, whole_shape(matrix.shape, axis, gather.topology)[::-1], "F32", fetch)


def _in_other_stage(model: LlamaForCausalLM, name: str) -> bool:
    """Say whether a tensor belongs to a stage of the pipeline that lies in other processes."""
    stage = model.seams.stage
    if stage is None:
        return False
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if layer is not None:
        number = int(layer[1])
        return number < model.config.num_hidden_layers and number not in model.model.layers.numbers
    return (".embed_tokens." in name and not stage.first) or (
        ".lm_head." in name and not stage.last
    )


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
    raw = peft.read_config(directory, "LORA")
    config = LoRAConfig.from_peft(raw, str(Path(directory) / peft.CONFIG_NAME))
    _check_no_prefix(model)
    present = adapted(model)
    names = list(present) or _plan(model, config, strict=False)
    expected = {}
    layers = dict(model.named_sublayers())
    for name in names:
        base, rank = layers[name], present[name].rank if present else config.rank(name)
        expected[f"{_PREFIX}{name}.lora_A.weight"] = (rank, base.in_features)
        expected[f"{_PREFIX}{name}.lora_B.weight"] = (base.out_features, rank)
    stored = peft.read_tensors(directory)
    own = {n: tensor for n, tensor in stored.items() if not _in_other_stage(model, n)}
    tensors = without_base(directory, own, layers)
    peft.check_tensors(directory, tensors, expected, config.base_model_name_or_path)
    values = peft.read_values(tensors)
    for name in stored.keys() - own.keys():
        read_finite(stored[name])  # so that all stages end, and say the same
    if not present:
        _wrap(model, config, names, seed=0)
    for name, layer in adapted(model).items():
        layer.config, layer.scaling = config, config.scaling(name)
        for which, matrix in (("a", layer.lora_A), ("b", layer.lora_B)):
            value = values[f"{_PREFIX}{name}.lora_{which.upper()}.weight"]
            set_numbers(matrix, layer.own_part(which, value.T))
            matrix.stop_gradient = not trainable
    return model
