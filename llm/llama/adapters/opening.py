"""Adapters of any kind: opened by what their files say, and merged into complete models."""

from pathlib import Path
from typing import Protocol

import numpy as np
from paddle import nn

from common.errors import UserError
from common.files import new_directory
from llm.llama.adapters.lora import has_lora, load_lora, merge_lora
from llm.llama.adapters.prefix import load_prefix
from llm.llama.build import save_model
from llm.llama.config import load_config
from llm.llama.files import peft, weights
from llm.llama.modeling import LlamaForCausalLM

_LOADERS = {"LORA": load_lora, "PREFIX_TUNING": load_prefix}


class Tokenizer(Protocol):
    """What a complete model directory needs of a tokenizer."""

    def save(self, directory: str | Path) -> object:
        """Write vocabulary, tokenizer_config.json and chat template."""


def load_adapter(
    model: LlamaForCausalLM, path: str | Path, trainable: bool = False
) -> LlamaForCausalLM:
    """Put an adapter on a network, of the kind that its files name.

    Args:
        model: the network that the adapter was trained on.
        path: directory in PEFT's layout.
        trainable: whether the adapter goes on learning.

    Returns:
        The same network.

    Raises:
        UserError: no adapter, a damaged one, another model's, or a kind that is not supported.
    """
    kind = peft.read_config(path).get("peft_type")
    if kind not in _LOADERS:
        raise UserError(
            f"{Path(path) / peft.CONFIG_NAME}: peft_type={kind!r} is not supported; "
            f"supported: {', '.join(_LOADERS)}"
        )
    return _LOADERS[kind](model, path, trainable=trainable)


def check_vacant(directory: str | Path) -> None:
    """Refuse a place where :func:`save_merged` would overwrite something.

    Raises:
        UserError: a file, or a directory that is not empty.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is not empty; give a new directory for the merged model")


def save_merged(
    model: LlamaForCausalLM,
    directory: str | Path,
    tokenizer: Tokenizer,
    dtype: str | None = None,
) -> Path:
    """Merge a network's LoRA adapter and write a complete model directory.

    The directory holds weights, config.json, generation_config.json, the tokenizer's files and its
    chat template. It is read back and compared before it gets its name.

    Args:
        model: a network with an adapter, or one already merged; merged afterwards.
        directory: absent or empty.
        tokenizer: that of the model, from ``data.tokenizer``.
        dtype: to store weights in; the network is converted to it. The network's when not given.

    Returns:
        The directory.

    Raises:
        UserError: a directory that is not empty, a merge that changes logits, or files that differ
            from the network.
        OSError: a full or unwritable disk; the directory is as it was.
    """
    target = Path(directory)
    check_vacant(target)
    if has_lora(model):
        merge_lora(model)
    if dtype is not None:
        model.to(dtype=dtype)
    with new_directory(target) as temporary:
        tokenizer.save(temporary)
        save_model(model, temporary)
        _compare(model, temporary)
    return target


def _compare(model: LlamaForCausalLM, directory: Path) -> None:
    """Read a model directory back, tensor by tensor."""
    tensors = weights.find_tensors(directory)
    layers = dict(model.named_sublayers())
    names = [name for name, _ in model.named_parameters()]
    equal = load_config(directory) == model.config and sorted(names) == sorted(tensors)
    for name, parameter in model.named_parameters() if equal else ():
        value = parameter.astype("float32").numpy()
        if isinstance(layers[name.rpartition(".")[0]], nn.Linear):
            value = value.T
        equal = equal and np.array_equal(tensors[name].read().astype(np.float32), value)
    if not equal:
        raise UserError(
            f"what was written for {directory} does not read back as the merged model; is the disk "
            "failing?"
        )
