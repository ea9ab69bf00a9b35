"""Adapters of any kind, opened by what their files say."""

from pathlib import Path

from common.errors import UserError
from llm.llama.adapters.lora import load_lora
from llm.llama.adapters.prefix import load_prefix
from llm.llama.files import peft
from llm.llama.modeling import LlamaForCausalLM

_LOADERS = {"LORA": load_lora, "PREFIX_TUNING": load_prefix}


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
