"""An adapter's directory in the layout of Hugging Face PEFT.

``adapter_config.json`` says what kind of adapter it is, ``adapter_model.safetensors`` holds its
tensors. The layout is that of ``PeftModel.save_pretrained`` in peft 0.21.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import Work, replacing
from llm.llama.files.finite import read_finite
from llm.llama.files.paddle_lora import CONFIG_NAME as LORA_CONFIG
from llm.llama.files.paddle_lora import is_paddle_lora, peft_config, peft_tensors
from llm.llama.files.parts import Part, PartFiles, saving
from llm.llama.files.safetensors import StoredTensor, read_header, write_file
from llm.llama.files.torch_files import read_state_dict
from llm.parallel.topology import Topology

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# What a PiSSA adapter was trained as, beside the plain one that its files hold.
STARTED = "pissa.json"
# What may lie beside them of one adapter and not of another.
_BESIDE = frozenset({STARTED})
_CURES = {
    "LORA": "give it as --lora_path",
    "PREFIX_TUNING": "give it as --prefix_path where a script has that; it cannot be merged",
}


def read_config(directory: str | Path, peft_type: str | None = None) -> dict[str, Any]:
    """Return an adapter's configuration as stored.

    Args:
        directory: the adapter.
        peft_type: the only kind that will do, such as ``LORA``; None takes any.

    Raises:
        UserError: no directory, a model's directory, a missing or damaged file, another kind.
    """
    directory = Path(directory)
    file = directory / CONFIG_NAME
    if not directory.is_dir():
        raise UserError(f"{str(directory)!r} is not a directory with an adapter")
    if not file.is_file():
        if is_paddle_lora(directory):
            return _of_kind(peft_config(directory), directory / LORA_CONFIG, peft_type)
        if (directory / "prefix_config.json").is_file():
            raise UserError(
                f"{directory} is a prefix of PaddleNLP's, whose layout is not read; tune it again "
                "with finetune_generation.py --prefix_tuning true"
            )
        if (directory / "config.json").is_file():
            raise UserError(
                f"{directory} is a model, not an adapter (it has config.json and no {CONFIG_NAME});"
                " give it as --model_name_or_path"
            )
        raise UserError(f"{directory} has no {CONFIG_NAME}: it is no adapter in PEFT's layout")
    return _of_kind(_read_object(file), file, peft_type)


def read_beside(directory: str | Path, name: str) -> dict[str, Any] | None:
    """Return a JSON file that lies beside an adapter's; None where there is none.

    Raises:
        UserError: a damaged file.
    """
    file = Path(directory) / name
    return _read_object(file) if file.is_file() else None


def _read_object(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file} is damaged: not a JSON object")
    return raw


def _of_kind(raw: dict[str, Any], file: Path, peft_type: str | None) -> dict[str, Any]:
    """Return a configuration of the kind that is asked for; refuse another."""
    found = raw.get("peft_type")
    if peft_type is not None and found != peft_type:
        hint = f"; {_CURES[found]}" if found in _CURES else ""
        raise UserError(f"{file}: peft_type={found!r} is not {peft_type!r}{hint}")
    return raw


def read_tensors(directory: str | Path) -> Mapping[str, Any]:
    """Return an adapter's tensors by their names in the file; no data is read yet.

    Raises:
        UserError: a missing or damaged file.
    """
    file = Path(directory) / WEIGHTS_NAME
    if not file.is_file():
        if is_paddle_lora(Path(directory)):
            return peft_tensors(Path(directory))
        pickled = file.with_suffix(".bin")
        if pickled.is_file():
            return read_state_dict(pickled)
        raise UserError(f"{directory} lacks {WEIGHTS_NAME}")
    return read_header(file)


def check_tensors(
    directory: str | Path,
    tensors: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    trained_on: str | None,
) -> None:
    """Compare names and shapes with those that the model at hand needs.

    Raises:
        UserError: the adapter belongs to another model.
    """
    origin = f" (it was trained on {trained_on})" if trained_on else ""
    for names, what in (
        (sorted(expected.keys() - tensors.keys()), "lacks what this model needs"),
        (sorted(tensors.keys() - expected.keys()), "has what this model has no place for"),
    ):
        if any("lora_embedding_" in name for name in names):
            raise UserError(
                f"{directory} adapts embeddings ({names[0]}), which is not supported: train it "
                "without embed_tokens in target_modules, or merge it with PEFT"
            )
        if what.startswith("has") and any(".lm_head.lora_" in name for name in names):
            raise UserError(
                f"{directory} adapts lm_head, which this model shares with its embedding "
                "(tie_word_embeddings); train it without lm_head in target_modules, or merge it "
                "with PEFT into a model that has both"
            )
        if names:
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            raise UserError(
                f"{directory} {what}: {', '.join(names[:2])}{more}; it is another model's adapter"
                f"{origin}"
            )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{directory}: {name} has shape {list(tensors[name].shape)}, this model needs "
                f"{list(shape)}; it is another model's adapter{origin}"
            )


def read_values(tensors: Mapping[str, StoredTensor]) -> dict[str, np.ndarray]:
    """Return the tensors' data in float32.

    Raises:
        UserError: infinite or undefined numbers.
    """
    return {
        n: read_finite(tensor, target="F32").astype(np.float32) for n, tensor in tensors.items()
    }


def write_adapter(
    directory: str | Path,
    config: Mapping[str, Any],
    parts: Sequence[Part],
    *,
    beside: Mapping[str, Mapping[str, Any]] | None = None,
    topology: Topology | None = None,
    work: Work | None = None,
) -> None:
    """Write both files; each replaces its predecessor only when both are complete.

    PEFT knows no adapters of several files: where several processes hold one, each writes a file,
    and rank 0 makes one of them.

    Args:
        directory: created when absent.
        config: content of adapter_config.json.
        parts: float32 tensors by their names in the file, of which this process holds pieces.
        beside: JSON files, name to content, that appear together with them; those of an adapter
            that is replaced go.
        topology: this process in the job; None is a job of one process.
        work: of a larger save, whose owner finishes it.

    Raises:
        OSError: a full or unwritable disk; what was in the directory is unchanged.
    """
    with saving(directory, Path(WEIGHTS_NAME).stem, topology, work) as files:
        documents = {CONFIG_NAME: dict(sorted(config.items())), **(beside or {})}
        files.work.last(partial(_finish, files, documents))
        files.write(parts)


def _finish(files: PartFiles, documents: dict[str, Mapping[str, Any]]) -> None:
    directory, tensors = files.directory, files.tensors()
    shapes = {name: tensors[name].shape for name in sorted(tensors)}
    with ExitStack() as stack:
        for name, content in documents.items():
            text = stack.enter_context(replacing(directory / name))
            text.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        data = stack.enter_context(replacing(directory / WEIGHTS_NAME))
        write_file(data, shapes, "F32", lambda name: tensors[name].read())
    for name in _BESIDE - documents.keys():
        (directory / name).unlink(missing_ok=True)
    files.remove()
