"""Complete model directories: network, tokenizer and what else belongs to them, all or nothing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.errors import UserError
from common.files import check_directory, new_directory
from llm.llama.adapters.lora import has_lora, merge_lora
from llm.llama.build import look, save_model
from llm.llama.config import TINY_NAME, load_config
from llm.llama.files.checkpoint import find_tensors
from llm.llama.files.dtypes import HEADERS, NAMES, ROOMIER, dtype_name
from llm.llama.files.finite import unfit
from llm.llama.layers import name_parameters
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.placement import is_matrix


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
) -> Path:
    """Merge a network's LoRA adapter and write a complete model directory, read back and compared.

    Args:
        model: a network with an adapter, or one already merged; merged afterwards.
        directory: absent or empty.
        tokenizer: that of the model, from ``data.tokenizer``.
        dtype: to store weights in; the network is converted to it. The network's when not given.

    Returns:
        The directory.

    Raises:
        UserError: a directory that is not empty, a merge that changes logits, a weight that is nan
            or inf or would be in the type, or files that differ from the network.
        OSError: a full or unwritable disk; the directory is as it was.
    """
    target = Path(directory)
    check_directory(target, "output_dir", "the merged model")
    if has_lora(model):
        merge_lora(model)
    if dtype is not None:
        _check_numbers(model, dtype)
        model.to(dtype=dtype)  # type: ignore[arg-type]  # any of llm.llama.build.DTYPES
    save_directory(model, tokenizer, target, compare=True)
    return target


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
    tensors = find_tensors(directory)
    parameters = dict(model.named_parameters())
    if load_config(directory) != model.config or parameters.keys() != tensors.keys():
        return False
    for name, parameter in parameters.items():
        value = parameter.astype("float32").numpy()
        stored = tensors[name].read().astype(np.float32)
        if not np.array_equal(stored, value.T if is_matrix(name) else value):
            return False
    return True
