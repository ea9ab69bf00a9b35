"""Prefix tuning (Li and Liang 2021): trained keys and values before every sequence.

The file layout is PEFT's ``PREFIX_TUNING`` (0.21): ``prompt_embeddings [P, L * 2 * G * D]``, for
each virtual token layer after layer, keys before values. As there, keys are used as they are,
unrotated, and the first real token stands at position P.

P virtual tokens, L layers, G key/value heads, D head dimension, C = G * D, W = L * 2 * C.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from paddle import Tensor, nn

from common.errors import UserError
from common.files import Work, replacing
from llm.llama.adapters.lora import has_lora, numbers, set_numbers
from llm.llama.config import LlamaConfig
from llm.llama.files import peft
from llm.llama.files.parts import Part, settled
from llm.llama.files.safetensors import read_header, write_file
from llm.llama.layers import name_parameters
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.seams import Prefix
from llm.parallel.topology import Topology, single

PROJECTION_NAME = "prefix_encoder.safetensors"
_TENSOR = "prompt_embeddings"


@dataclass(frozen=True)
class PrefixConfig:
    """How long the prefix is and how it is made, in the fields of PEFT's ``PrefixTuningConfig``.

    Args:
        num_virtual_tokens: P.
        prefix_projection: make the prefix from ``[P, C]`` by two linears with a tanh between.
        encoder_hidden_size: width between those; C when not given.
        base_model_name_or_path: recorded for readers; never opened.

    Raises:
        UserError: a value outside its range, by field.
    """

    num_virtual_tokens: int
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        sizes = {"num_virtual_tokens": self.num_virtual_tokens}
        if self.encoder_hidden_size is not None:
            sizes["encoder_hidden_size"] = self.encoder_hidden_size
        for name, size in sizes.items():
            if type(size) is not int or size < 1:
                raise UserError(f"{name}={size!r} has to be a whole number of at least 1")
        if type(self.prefix_projection) is not bool:
            raise UserError(f"prefix_projection={self.prefix_projection!r} has to be true or false")

    def to_peft(self, model: LlamaConfig) -> dict[str, Any]:
        """Return the content of adapter_config.json beside a model of that architecture."""
        sizes = _sizes(model)
        return {
            **sizes,
            "auto_mapping": None,
            "base_model_name_or_path": self.base_model_name_or_path,
            "encoder_hidden_size": self.encoder_hidden_size or sizes["token_dim"],
            "inference_mode": True,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": self.num_virtual_tokens,
            "peft_type": "PREFIX_TUNING",
            "prefix_projection": self.prefix_projection,
            "revision": None,
            "task_type": "CAUSAL_LM",
        }

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], model: LlamaConfig, source: str) -> "PrefixConfig":
        """Read the content of adapter_config.json.

        Args:
            raw: as stored by any PEFT version.
            model: the architecture that the prefix is for.
            source: named in messages.

        Raises:
            UserError: another architecture, or something other than a prefix of a causal model.
        """
        origin = raw.get("base_model_name_or_path")
        trained_on = f" (it was trained on {origin})" if origin else ""
        for name, size in _sizes(model).items():
            if raw.get(name) != size:
                raise UserError(
                    f"{source}: {name}={raw.get(name)!r}, this model needs {size}; it is another "
                    f"model's adapter{trained_on}"
                )
        for name, only in (("num_transformer_submodules", 1), ("task_type", "CAUSAL_LM")):
            if raw.get(name) not in (None, only):
                raise UserError(f"{source}: {name}={raw[name]!r} is not supported, only {only!r}")
        try:
            return cls(
                raw.get("num_virtual_tokens"),  # type: ignore[arg-type]
                raw.get("prefix_projection", False),
                raw.get("encoder_hidden_size"),
                origin,
            )
        except UserError as error:
            raise UserError(f"{source}: {error}") from error


def _sizes(model: LlamaConfig) -> dict[str, int]:
    return {
        "num_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_key_value_heads,
        "token_dim": model.num_key_value_heads * model.head_dim,
    }


class PrefixEncoder(nn.Layer):
    """Holds what is trained, and returns keys and values of every layer.

    Parameters are named as in PEFT's ``PrefixEncoder``: ``embedding.weight [P, W]``, or with a
    projection ``embedding.weight [P, C]``, ``transform.0`` and ``transform.2``. All are float32.

    Args:
        config: of the prefix.
        model: the architecture that it is for.
        projected: whether the projection is there; a finished prefix needs it no more.
        seed: of the random start, which is PyTorch's (and so PEFT's): normal embeddings, linears
            uniform within ``1 / sqrt(in)``. None draws a new one.

    Every tensor parallel rank holds all of it; ``own_heads`` then takes this rank's heads.
    """

    def __init__(
        self, config: PrefixConfig, model: LlamaConfig, *, projected: bool, seed: int | None
    ) -> None:
        super().__init__()
        self.config, self.projected = config, projected
        self.own_heads: Callable[[Tensor], Tensor] | None = None
        self.length = config.num_virtual_tokens
        self.heads = [model.num_hidden_layers * 2, model.num_key_value_heads, model.head_dim]
        channels, width = math.prod(self.heads[1:]), math.prod(self.heads)
        self.embedding = nn.Embedding(self.length, channels if projected else width)
        if projected:
            hidden = config.encoder_hidden_size or channels
            self.transform = nn.Sequential(
                nn.Linear(channels, hidden), nn.Tanh(), nn.Linear(hidden, width)
            )
        self.to(dtype="float32")
        rng = np.random.default_rng(seed)
        for name, parameter in self.named_parameters():
            value = rng.standard_normal(parameter.shape)
            if name != "embedding.weight":
                inputs = hidden if name.startswith("transform.2") else channels
                value = rng.uniform(-1, 1, parameter.shape) / math.sqrt(inputs)
            parameter.set_value(value.astype(np.float32))

    def flat(self) -> Tensor:
        """Return ``[P, W]``, what PEFT saves."""
        return self.transform(self.embedding.weight) if self.projected else self.embedding.weight

    def forward(self) -> Prefix:
        """Return keys and values ``[1, P, G, D]`` of each layer, those of this rank's heads."""
        heads = self.flat().reshape([1, self.length, *self.heads])
        if self.own_heads is not None:
            heads = self.own_heads(heads)
        parts = heads.unbind(axis=2)
        return list(zip(parts[::2], parts[1::2], strict=True))


def _check_fits(config: PrefixConfig, model: LlamaForCausalLM) -> None:
    context = model.config.context
    if config.num_virtual_tokens >= context:
        raise UserError(
            f"num_virtual_tokens={config.num_virtual_tokens} leaves no room in the model's context "
            f"of {context} tokens"
        )
    if has_lora(model):
        raise UserError("the model has a LoRA adapter; merge it before adding a prefix")


def _attach(model: LlamaForCausalLM, encoder: PrefixEncoder) -> LlamaForCausalLM:
    for parameter in model.parameters():
        parameter.stop_gradient = True
    encoder.training, encoder.own_heads = model.training, model.seams.own_heads
    model.seams.prefix = encoder
    model.add_sublayer("prefix", encoder)
    name_parameters(model)
    return model


def add_prefix(
    model: LlamaForCausalLM, config: PrefixConfig, seed: int | None = None
) -> LlamaForCausalLM:
    """Freeze a network and put a trainable prefix before everything that it reads, in place.

    Callers see no difference: positions count from 0, packed documents each see the prefix.

    Args:
        model: the network.
        config: of the prefix.
        seed: of its start, independent of Paddle's generator; None draws a new one.

    Returns:
        The same network.

    Raises:
        UserError: a network that has an adapter, or a prefix that fills its context.
    """
    if model.seams.prefix is not None:
        raise UserError("the model has a prefix already")
    _check_fits(config, model)
    projected = config.prefix_projection
    return _attach(model, PrefixEncoder(config, model.config, projected=projected, seed=seed))


def _projection(encoder: PrefixEncoder) -> dict[str, np.ndarray]:
    """Return the parameters as PEFT's PrefixEncoder holds them."""
    return {
        name: numbers(value).T if name.startswith("transform") else numbers(value)
        for name, value in encoder.named_parameters()
    }


def _shapes(encoder: PrefixEncoder) -> dict[str, list[int]]:
    return {name: parameter.shape for name, parameter in encoder.named_parameters()}


def save_prefix(
    model: LlamaForCausalLM,
    directory: str | Path,
    *,
    topology: Topology | None = None,
    full: Callable[[Tensor], AbstractContextManager[Tensor]] = nullcontext,
    work: Work | None = None,
) -> None:
    """Write the prefix alone, in PEFT's layout and in float32.

    PEFT keeps the finished prefix only. A projection's own weights go beside it, to
    ``prefix_encoder.safetensors`` under PEFT's names, so that training can go on.

    Args:
        model: a network with a prefix; every process of a job holds all of it.
        directory: created when absent; a prefix in it is replaced.
        topology, full, work: those of :func:`llm.llama.files.weights.save_weights`.

    Raises:
        UserError: the network has no prefix.
        OSError: a full or unwritable disk; what was in the directory is unchanged.
    """
    encoder = model.seams.prefix
    if encoder is None:
        raise UserError("the model has no prefix to save")
    directory, topology = Path(directory), topology or single()
    with ExitStack() as gathered:
        for parameter in encoder.parameters():
            gathered.enter_context(full(parameter))
        finished = numbers(encoder.flat())
        tensors = _projection(encoder) if encoder.projected else {}
    config = encoder.config.to_peft(model.config)
    part = Part(_TENSOR, finished.shape, "F32", lambda w: finished if w == topology.rank else None)
    with settled(topology, work) as done_by:
        if topology.rank == 0:
            done_by.do(lambda: directory.mkdir(parents=True, exist_ok=True))
            done_by.do(lambda: _write_projection(directory / PROJECTION_NAME, tensors))
        parts = [part] if topology.stage_first else []
        peft.write_adapter(directory, config, parts, topology=topology, work=done_by)


def _write_projection(file: Path, tensors: dict[str, np.ndarray]) -> None:
    if not tensors:
        file.unlink(missing_ok=True)
        return
    shapes = {name: value.shape for name, value in tensors.items()}
    with replacing(file) as temporary:
        write_file(temporary, shapes, "F32", lambda name: np.ascontiguousarray(tensors[name]))


def read_prefix(model: LlamaForCausalLM, directory: str | Path) -> tuple[PrefixConfig, np.ndarray]:
    """Return a finished prefix as stored, float32 ``[P, W]``, with its configuration.

    Args:
        model: the network that it was trained on.
        directory: in PEFT's layout.

    Raises:
        UserError: a prefix of another model or kind, or a damaged one.
    """
    raw = peft.read_config(directory, "PREFIX_TUNING")
    source = str(Path(directory) / peft.CONFIG_NAME)
    config = PrefixConfig.from_peft(raw, model.config, source)
    _check_fits(config, model)
    tensors = peft.read_tensors(directory)
    heads = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads
    shape = (config.num_virtual_tokens, heads * model.config.head_dim)
    peft.check_tensors(directory, tensors, {_TENSOR: shape}, config.base_model_name_or_path)
    return config, peft.read_values(tensors)[_TENSOR]


def load_prefix(
    model: LlamaForCausalLM, directory: str | Path, trainable: bool = False
) -> LlamaForCausalLM:
    """Add a prefix from files, or fill or replace the one that the network has.

    Args:
        model: the network that the prefix was trained on; its weights get frozen.
        directory: in PEFT's layout, written by this suite or by PEFT.
        trainable: whether the prefix goes on learning; one made by a projection then needs
            ``prefix_encoder.safetensors``.

    Returns:
        The same network.

    Raises:
        UserError: a prefix of another model or kind, a damaged one, or a projection that is to be
            trained and was not kept; the network is unchanged.
    """
    directory = Path(directory)
    raw = peft.read_config(directory, "PREFIX_TUNING")
    source = str(directory / peft.CONFIG_NAME)
    config = PrefixConfig.from_peft(raw, model.config, source)
    _check_fits(config, model)
    projected = trainable and config.prefix_projection
    file = directory / (PROJECTION_NAME if projected else peft.WEIGHTS_NAME)
    if projected and not file.is_file():
        raise UserError(
            f"{directory} lacks {PROJECTION_NAME}: PEFT does not keep the projection that made a "
            "prefix, so its training cannot go on; use it as it is, or start anew"
        )
    encoder = PrefixEncoder(config, model.config, projected=projected, seed=0)
    tensors = read_header(file) if projected else peft.read_tensors(directory)
    wanted = _projection(encoder) if projected else {_TENSOR: encoder.flat()}
    expected = {name: tuple(value.shape) for name, value in wanted.items()}
    peft.check_tensors(directory, tensors, expected, config.base_model_name_or_path)
    values = peft.read_values(tensors)
    held = model.seams.prefix
    if held is not None and _shapes(held) == _shapes(encoder):
        encoder = held  # an optimizer may hold its parameters
        encoder.config = config
    for name, parameter in encoder.named_parameters():
        value = values[name if projected else _TENSOR]
        value = value.T if name.startswith("transform") else value
        set_numbers(parameter, value)
    _attach(model, encoder)
    for parameter in encoder.parameters():
        parameter.stop_gradient = not trainable
    return model
