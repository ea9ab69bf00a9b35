"""Complete model directories: network, tokenizer and what else belongs to them, all or nothing."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import paddle
from paddle import Tensor

from common.errors import UserError
from common.files import check_directory, new_directory
from llm.llama.adapters.lora import has_lora
from llm.llama.build import look, save_model
from llm.llama.config import TINY_NAME, load_config
from llm.llama.files.checkpoint import find_tensors
from llm.llama.files.dtypes import HEADERS, NAMES, ROOMIER, TYPES, dtype_name
from llm.llama.files.finite import unfit
from llm.llama.files.slots import Slot, StoresItself
from llm.llama.layers import name_parameters
from llm.llama.merging import Loss, merge_lora, products, requantize
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.placement import is_matrix
from llm.llama.quantization.embedding import QuantizedEmbedding
from llm.llama.quantization.network import quantized_linears


class Tokenizer(Protocol):
    """What a complete model directory needs of a tokenizer."""

    def save(self, directory: str | Path) -> object:
        """Write vocabulary, tokenizer_config.json and chat template."""


def save_directory(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    documents: Mapping[str, Any] | None = None,
    compare: bool = False,
) -> None:
    """Write weights, config.json, generation_config.json, tokenizer and chat template.

    Args:
        model: a network without an adapter.
        tokenizer: that of the model, from ``data.tokenizer``.
        directory: absent or empty; it appears once it is complete.
        documents: JSON files that belong to it, name to content.
        compare: read the files back, tensor by tensor, before they get their name.

    Raises:
        UserError: weights that are nan or inf, or files that differ from the network.
        OSError: a full or unwritable disk; there is no output directory then.
    """
    _check_numbers(model)
    with new_directory(directory) as temporary:
        tokenizer.save(temporary)
        save_model(model, temporary)
        for name, content in (documents or {}).items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if compare and not _reads_back(model, temporary):
            raise UserError(
                f"what was written for {directory} does not read back as the model; is the disk "
                "failing?"
            )


def keep_types(model: LlamaForCausalLM, directory: str | Path) -> None:
    """Give a network's parameters the types that they have in the files it came from, in place.

    Args:
        model: a quantized network in float32, not to be computed with afterwards.
        directory: that it was loaded from; the built-in random model has none.
    """
    if str(directory) == TINY_NAME:
        return
    stored = look(Path(directory))[2]
    layers = dict(model.named_sublayers())
    for name, parameter in model.named_parameters():
        kind: Any = NAMES[stored[name].dtype] if name in stored else "float32"
        if kind in ("bfloat16", "float16"):
            owner, _, attribute = name.rpartition(".")
            kept = layers[owner].create_parameter(parameter.shape, dtype=kind)
            kept.set_value(parameter.astype(kind))
            setattr(layers[owner], attribute, kept)
    name_parameters(model)


def save_merged(
    model: LlamaForCausalLM,
    directory: str | Path,
    tokenizer: Tokenizer,
    dtype: str | None = None,
    *,
    quantized: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Merge a network's LoRA adapter and write a complete model directory, read back and compared.

    Over a base whose weights are integers, or lie in bfloat16 below a float32 network, the merged
    weights are float32 before they are stored.

    Args:
        model: a network with an adapter, or one already merged; merged afterwards.
        directory: absent or empty.
        tokenizer: that of the model, from ``data.tokenizer``.
        dtype: to store weights in; the network is converted to it. The network's when not given.
        quantized: round merged weights to integers again, as those of the base were.
        say: is told what rounding has lost, a line each.

    Returns:
        The directory.

    Raises:
        UserError: a directory that is not empty, a merge that changes logits, a weight that is nan
            or inf or would be in the type, or files that differ from the network.
        OSError: a full or unwritable disk; the directory is as it was.
    """
    target = Path(directory)
    check_directory(target, "output_dir", "the merged model")
    before, parts = dict(quantized_linears(model)), products(model)
    if quantized and not before:
        raise UserError(
            "quantize_merged: the base's weights are no integers that they could be rounded to "
            "again; leave it out, or run quantize_generation.py on the merged model"
        )
    before = {name.removesuffix(".base"): layer for name, layer in before.items()}
    embedding = model.model.embed_tokens
    if has_lora(model):
        merge_lora(model)
    if quantized:
        say(requantize(model, before, parts).describe())
    if dtype is not None:
        _check_numbers(model, dtype)
        loss = _convert(model, dtype, parts)
        if loss.largest:
            say(loss.describe())
    if quantized and isinstance(embedding, QuantizedEmbedding):  # no adapter changes one
        model.model.embed_tokens = embedding
    save_directory(model, tokenizer, target, compare=True)
    return target


def _convert(model: LlamaForCausalLM, dtype: str, parts: Mapping[str, Tensor]) -> Loss:
    """Convert a network's floating-point weights; return what that changed in merged ones."""
    loss = Loss(f"merged weights stored in {dtype}")
    for name, parameter in model.named_parameters():
        made = paddle.cast(parameter, dtype)  # type: ignore[arg-type]  # as below
        part = parts.get(name.removesuffix(".weight"))
        if part is not None:
            loss.add(parameter, made, part)
    kept = [
        (one, one.weight.clone(), one.weight_scale.clone()) for _, one in quantized_linears(model)
    ]
    model.to(dtype=dtype)  # type: ignore[arg-type]  # any of llm.llama.build.DTYPES
    for layer, integers, scale in kept:  # it would convert these too
        layer.weight, layer.weight_scale = integers, scale
    return loss


def _check_numbers(model: LlamaForCausalLM, dtype: str | None = None) -> None:
    """Refuse weights that are nan or inf, or would be in the type they are going to have.

    Read back, an inf would equal itself.
    """
    target = HEADERS[dtype] if dtype is not None else None
    for name, tensor in model.state_dict().items():
        kind = dtype_name(tensor)
        if kind not in HEADERS:  # integers of quantized weights
            continue
        problem = unfit(tensor.numpy(), HEADERS[kind], target)
        if problem is not None:
            cure = f"; use --dtype {ROOMIER[target]}" if target in ROOMIER else ""
            raise UserError(f"the model cannot be stored: {name} holds {problem}{cure}")


def _reads_back(model: LlamaForCausalLM, directory: Path) -> bool:
    tensors = find_tensors(directory, TYPES)
    parameters = dict(model.named_parameters())
    quantized: dict[str, Slot] = {}
    for name, layer in model.named_sublayers():
        if isinstance(layer, StoresItself):
            quantized |= layer.slots(name)
    if load_config(directory) != model.config:
        return False
    if parameters.keys() | quantized.keys() != tensors.keys():
        return False
    for name, slot in quantized.items():
        if not np.array_equal(tensors[name].read(), slot.fetch()):
            return False
    for name, parameter in parameters.items():
        value = parameter.astype("float32").numpy()
        stored = tensors[name].read().astype(np.float32)
        if not np.array_equal(stored, value.T if is_matrix(name) else value):
            return False
    return True
