"""PaddleNLP's LoRA directories, seen in PEFT's layout.

``lora_config.json`` and ``lora_model_state.pdparams``, as ``paddlenlp.peft.LoRAModel`` saves them;
its matrices are ``[in, r]`` and ``[r, out]``, PEFT's ``[r, in]`` and ``[out, r]``.
"""

import json
import re
from pathlib import Path
from typing import Any

from common.errors import UserError
from llm.llama.files.pdparams import read_pdparams
from llm.llama.files.rank_layout import extent
from llm.llama.files.tensors import Block, Tensor

CONFIG_NAME = "lora_config.json"
WEIGHTS_NAME = "lora_model_state.pdparams"
_MATRIX = re.compile(r"(llama\.)?(?P<name>.+)\.(?P<which>lora_[AB])")
_MERGE = "merge it with PaddleNLP's merge_lora_params.py, and open the merged model"
# What changes the function, or the base, at the values at which it does not; and what to do.
_IDLE: dict[str, tuple[tuple[Any, ...], str]] = {
    "pissa": ((None, False), _MERGE),
    "loraga": ((None, False), _MERGE),
    "use_mora": ((None, False), _MERGE),
    "lora_use_mixer": ((None, False), _MERGE),
    "trainable_bias": ((None,), _MERGE),
    "trainable_modules": ((None, []), _MERGE),
    "tensor_parallel_degree": ((None, -1, 0, 1), "save it whole (merge_tensor_parallel_path)"),
}


def is_paddle_lora(directory: Path) -> bool:
    """Whether a directory is an adapter of PaddleNLP's."""
    return (directory / CONFIG_NAME).is_file()


def peft_config(directory: Path) -> dict[str, Any]:
    """Return what ``adapter_config.json`` of the adapter would hold.

    Raises:
        UserError: a damaged file, or an adapter that is more than two matrices beside a linear.
    """
    file = directory / CONFIG_NAME
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if not isinstance(raw, dict) or "r" not in raw:
        raise UserError(f"{file} is damaged: it names no rank (r)")
    for key, (idle, cure) in _IDLE.items():
        if raw.get(key) not in idle:
            raise UserError(
                f"{file}: {key}={raw[key]!r}, which PEFT's adapters do not have; {cure}"
            )
    return {
        "peft_type": "LORA",
        "r": raw["r"],
        "lora_alpha": raw.get("lora_alpha", raw["r"]),
        "lora_dropout": raw.get("lora_dropout", 0.0),
        "use_rslora": bool(raw.get("rslora", False)),
        "target_modules": sorted({name for name, _ in _matrices(directory)}),
        "base_model_name_or_path": raw.get("base_model_name_or_path"),
    }


def peft_tensors(directory: Path) -> dict[str, Tensor]:
    """Return the matrices by PEFT's names, turned.

    Raises:
        UserError: a missing or damaged file, or tensors that are no such matrices.
    """
    found = {}
    for (linear, which), array in _matrices(directory).items():
        name = f"base_model.model.{linear}.{which}.weight"
        shape = array.shape[::-1]
        block = Block(array, True, *extent(shape))
        found[name] = Tensor(name, shape, array.dtype, (block,))
    return found


def _matrices(directory: Path) -> dict[tuple[str, str], Any]:
    """Return the stored matrices by linear and by which of the two."""
    file = directory / WEIGHTS_NAME
    if not file.is_file():
        raise UserError(f"{directory} lacks {WEIGHTS_NAME}, the weights of {CONFIG_NAME}")
    found = {}
    for name, array in read_pdparams(file).items():
        match = _MATRIX.fullmatch(name)
        if match is None or len(array.shape) != 2:
            raise UserError(f"{file}: {name} is no matrix of LoRA beside a linear")
        inside = "model." if match[1] else ""
        found[inside + match["name"], match["which"]] = array
    return found
