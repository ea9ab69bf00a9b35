"""A packed network taken apart into tensors, and put together again around tensors of a file.

E hidden, V vocabulary, O outputs.
"""

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import paddle
from paddle import Tensor, nn

from external_ops.linear import PackedWeight
from llm.llama.files.dtypes import HEADERS, Array, dtype_name
from llm.llama.files.packed import Stored
from llm.llama.fused import run_packed
from llm.llama.fused_layer import FusedLayer
from llm.llama.modeling import LlamaForCausalLM, RMSNorm
from llm.llama.packed_layers import PackedEmbedding, PackedLinear

_LINEARS = ("qkv", "o", "gate_up", "down")
_NORMS = ("input_layernorm", "post_attention_layernorm")
# Names in headers of types that are no floating-point numbers.
_INTEGERS = {"uint8": "U8", "int8": "I8"}


@dataclass(frozen=True)
class _Place:
    """Where a layer holds a tensor."""

    held: MutableMapping[str, Tensor]
    key: str


def _places(model: LlamaForCausalLM) -> dict[str, _Place]:
    """Return where each tensor of a network that is packed for CPUs is held, by name."""
    found = {"norm": _Place(model.model.norm._parameters, "weight")}
    for number in model.model.layers.numbers:
        layer = model.model.layers[number]
        for name in _NORMS:
            found[f"layers.{number}.{name}"] = _Place(getattr(layer, name)._parameters, "weight")
    for name, linear in _linears(model).items():
        for held in (linear.weight._buffers, linear._buffers):
            found |= {f"{name}.{key}": _Place(held, key) for key in held}
    embedding = model.model.embed_tokens
    if not isinstance(embedding, PackedEmbedding):
        found["embed_tokens.weight"] = _Place(embedding._parameters, "weight")
    return found


def _linears(model: LlamaForCausalLM) -> dict[str, PackedLinear]:
    """Return the packed matrices of a network by name."""
    layers = model.model.layers
    found = {
        f"layers.{number}.{name}": getattr(layers[number], name)
        for number in layers.numbers
        for name in _LINEARS
    }
    found["head"] = model.lm_head
    embedding = model.model.embed_tokens
    if isinstance(embedding, PackedEmbedding) and not model.config.tie_word_embeddings:
        found["embed_tokens"] = embedding.matrix
    return found


def tensors_of(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """Return the tensors of a network that is packed for CPUs, by name."""
    return {name: place.held[place.key] for name, place in _places(model).items()}


@contextlib.contextmanager
def computing_with(model: LlamaForCausalLM, tensors: Mapping[str, Any]) -> Iterator[None]:
    """Let a packed network compute with other tensors in the place of those of the same names."""
    places = {name: place for name, place in _places(model).items() if name in tensors}
    own = {name: place.held[place.key] for name, place in places.items()}
    try:
        for name, place in places.items():
            place.held[place.key] = tensors[name]
        yield
    finally:
        for name, place in places.items():
            place.held[place.key] = own[name]


def take_apart(model: LlamaForCausalLM) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Return the tensors of a network that is packed for CPUs as a file takes them.

    Returns:
        Tensors by name, and what :func:`put_together` wants to know of them besides.
    """
    types = {**HEADERS, **_INTEGERS}
    stored = {
        name: Stored(tuple(one.shape), types[dtype_name(one)], partial(_numbers, one))
        for name, one in tensors_of(model).items()
    }
    linears = {
        name: [linear.weight.kind, linear.weight.outputs, linear.weight.inputs]
        for name, linear in _linears(model).items()
    }
    return stored, {"linears": linears, "type": model.model.embed_tokens.type_name}


def _numbers(tensor: Tensor) -> Array:
    """Return a tensor's numbers; bfloat16's bits as uint16."""
    numbers: Array = tensor.numpy()
    return numbers


def put_together(
    model: LlamaForCausalLM, arrays: Mapping[str, Array], contents: Mapping[str, Any]
) -> None:
    """Make a packed network of one without values, in place.

    Args:
        model: as ``llm.llama.build`` makes it before it takes memory.
        arrays: what :func:`take_apart` returned, uint16 bits for bfloat16; the network keeps those
            of packed weights and of the embedding, and copies none of them.
        contents: likewise.
    """
    linears = contents["linears"]

    def linear(name: str) -> PackedLinear:
        data, scale, bias = (
            around(arrays[f"{name}.{part}"]) if f"{name}.{part}" in arrays else None
            for part in ("data", "scale", "bias")
        )
        return PackedLinear(PackedWeight(data, scale, *linears[name]), bias)

    model.eval()
    layers = model.model.layers
    for number in layers.numbers:
        layer, prefix = layers[number], f"layers.{number}"
        norms = [_norm(getattr(layer, name), arrays[f"{prefix}.{name}"]) for name in _NORMS]
        packed = FusedLayer(layer, *norms, *(linear(f"{prefix}.{name}") for name in _LINEARS))
        packed.eval()
        layers.add_sublayer(str(number), packed)
    model.model.norm = _norm(model.model.norm, arrays["norm"])
    model.lm_head = linear("head")
    if "embed_tokens.weight" in arrays:
        model.model.embed_tokens.weight = _parameter(arrays["embed_tokens.weight"])
    else:
        own = "embed_tokens" in linears
        matrix = linear("embed_tokens") if own else model.lm_head
        model.model.embed_tokens = PackedEmbedding(matrix, contents["type"], own=own)
    run_packed(model)


def around(array: Array) -> Tensor:
    """Return a tensor whose memory is an array's, which it keeps; uint16 is bfloat16's bits."""
    core = paddle.base.core
    tensor: Tensor = core.eager.Tensor(
        value=array,
        place=core.CPUPlace(),
        persistable=True,
        zero_copy=True,
        name=paddle.utils.unique_name.generate("packed"),
        stop_gradient=True,
    )
    return tensor


def _parameter(array: Array) -> Tensor:
    weight: Tensor = paddle.base.framework.EagerParamBase.from_tensor(around(array))
    weight.stop_gradient = True
    return weight


def _norm(norm: RMSNorm, values: Array) -> RMSNorm:
    norm.weight = norm.create_parameter(
        list(values.shape),
        dtype="float32",
        default_initializer=nn.initializer.Assign(values),
    )
    return norm
