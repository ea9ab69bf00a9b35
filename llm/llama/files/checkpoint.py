"""A model directory in any layout, seen as complete tensors of Hugging Face's names and shapes.

:func:`find_tensors` is for networks that fill themselves; :func:`open_checkpoint`, for conversion,
also holds what is there against config.json. Only headers are read until a tensor is asked for.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.gguf import gguf_file, read_gguf
from llm.llama.config import LlamaConfig, load_config, read_raw
from llm.llama.files.dtypes import FLOATS
from llm.llama.files.gguf import gguf_arrays, stored_tensors
from llm.llama.files.gptq_files import as_compressed, is_gptq
from llm.llama.files.megatron import iteration_of, open_megatron
from llm.llama.files.meta import is_meta, open_meta
from llm.llama.files.rank_files import is_rank_directory, open_complete, open_ranks
from llm.llama.files.rank_layout import RankLayout, extent, tensor_shapes
from llm.llama.files.safetensors import StoredTensor, read_header
from llm.llama.files.spare import check_names, settle
from llm.llama.files.tensors import Block, Tensor, check_shape, put_together
from llm.llama.files.torch_files import read_state_dict
from llm.llama.places import check_place
from llm.llama.quant_config import GPTQSettings

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class _Kind:
    """Files of complete tensors: one, or shards with an index, and who reads their headers."""

    single: str
    index: str
    read: Callable[[Path, Sequence[str]], dict[str, StoredTensor]]

    def is_in(self, directory: Path) -> bool:
        return any((directory / name).is_file() for name in (self.single, self.index))


# In the order of preference: many a directory holds the same weights twice.
_KINDS = (
    _Kind(SINGLE_NAME, INDEX_NAME, read_header),
    _Kind("pytorch_model.bin", "pytorch_model.bin.index.json", read_state_dict),
)
_BY_NAME = "which is not named as weights are"
# What to do with other files, by their ending.
_WAYS = {
    ".bin": f"{_BY_NAME} (pytorch_model.bin)",
    ".pdparams": f"{_BY_NAME} (model_state.pdparams)",
    ".gguf": "a model by itself: give that file",
    ".pth": "which convert_checkpoint.py reads, without config.json beside it",
}


@dataclass(frozen=True)
class Checkpoint:
    """A model of any layout.

    Attributes:
        directory: of the model; or its one file.
        config: the architecture.
        raw: config.json, or what it would hold.
        tensors: complete, by Hugging Face's names.
        layout: of PaddleNLP's files.
        foreign: what the files are, where they are neither Hugging Face's nor PaddleNLP's.
    """

    directory: Path
    config: LlamaConfig
    raw: Mapping[str, Any]
    tensors: dict[str, Tensor]
    layout: RankLayout | None = None
    foreign: str | None = None

    @property
    def dtypes(self) -> list[str]:
        """The types of the tensors, as safetensors calls them."""
        return sorted({tensor.dtype for tensor in self.tensors.values()})

    @property
    def is_hugging_face(self) -> bool:
        """Whether names, matrices and config.json are Hugging Face's."""
        return self.layout is None and self.foreign is None

    def describe(self) -> str:
        """Say what the directory holds."""
        if self.foreign is not None:
            return self.foreign
        if self.layout is None:
            files = {tensor.file for tensor in self.tensors.values()}
            kind = "safetensors" if files.pop().suffix == ".safetensors" else "PyTorch"
            return f"{len(files) + 1} {kind} file{'s' * bool(files)}"
        return (
            f"PaddleNLP's files of {self.layout.tensor} tensor parallel x "
            f"{self.layout.pipeline} pipeline ranks"
        )


def find_tensors(directory: Path, types: Sequence[str] = FLOATS) -> Mapping[str, Any]:
    """Return every tensor of a model directory, from one file or from the shards of its index.

    Args:
        directory: in Hugging Face's layout; in PaddleNLP's, whose tensors are then put together
            when they are read; or a GGUF file, or a directory that holds one.
        types: header names of the types that may occur.

    Raises:
        UserError: no weights, weights in another format, or a damaged or missing shard.
    """
    if is_assembled(directory):
        return open_checkpoint(directory).tensors
    found = _find_stored(directory, types)
    if _is_paddlenlp(found):
        return open_checkpoint(directory).tensors
    if is_gptq(found):
        raw, source = read_raw(directory)
        settings = GPTQSettings.of(raw.get("quantization_config"), source)
        if settings is not None:
            return as_compressed(found, settings)
    return found


def is_assembled(place: Path) -> bool:
    """Whether the tensors of a place are put together from pieces when they are read.

    Args:
        place: a model directory or file.
    """
    if gguf_file(place) is not None or is_rank_directory(place):
        return True
    return iteration_of(place) is not None or (is_meta(place) and not _holds_files(place))


def _holds_files(directory: Path) -> bool:
    """Whether complete tensors lie in a directory, in the files that are looked for first."""
    return any(kind.is_in(directory) for kind in _KINDS)


def _is_paddlenlp(stored: Mapping[str, StoredTensor]) -> bool:
    return any(name.startswith("llama.") for name in stored)


def _find_stored(directory: Path, types: Sequence[str]) -> dict[str, StoredTensor]:
    """Return what the files of a directory hold, by the files' own names."""
    kind = next((kind for kind in _KINDS if kind.is_in(directory)), None)
    if kind is None:
        others = [
            file
            for ending in ("bin", "pdparams", "gguf", "pth")
            for file in sorted(directory.glob(f"*.{ending}"))
        ]
        hint = f"; found {others[0].name}, {_WAYS[others[0].suffix]}" if others else ""
        raise UserError(f"{directory} has neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")
    index, single = directory / kind.index, directory / kind.single
    if not index.is_file():
        return kind.read(single, types)
    if single.is_file() and not _names(index, kind.single):
        raise UserError(
            f"{directory} holds {kind.single} and {kind.index}, which is of other files: two "
            "models, or parts of two; move one of them away"
        )
    try:
        shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        plain = all(Path(shard).name == shard for shard in shard_of.values())
    except OSError as error:
        raise UserError(f"cannot read {index}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged: {error!r}") from error
    if not plain:
        raise UserError(f"{index} names files outside its own directory")
    missing = sorted({n for n in shard_of.values() if not (directory / n).is_file()})
    if missing:
        raise UserError(f"{directory} lacks {', '.join(missing)}, which {kind.index} names")
    return _indexed(directory, shard_of, kind, types)


def _indexed(
    directory: Path, shard_of: Mapping[str, str], kind: _Kind, types: Sequence[str]
) -> dict[str, StoredTensor]:
    """Return the tensors of shards, which have to be those of the index, no fewer and no more."""
    headers = {n: kind.read(directory / n, types) for n in sorted(set(shard_of.values()))}
    tensors = {}
    for name, shard in shard_of.items():
        if name not in headers[shard]:
            raise UserError(
                f"{directory / shard} lacks tensor {name}, which {kind.index} puts there"
            )
        tensors[name] = headers[shard][name]
    for shard, header in headers.items():
        if stray := sorted(name for name in header if shard_of.get(name) != shard):
            named = shard_of.get(stray[0])
            where = f"puts it into {named}" if named else "does not have it"
            raise UserError(
                f"{directory / shard} holds {stray[0]}, but {kind.index} {where}; the files are of "
                "two saves, or the index is: fetch or make them again"
            )
    return tensors


def _names(index: Path, file: str) -> bool:
    """Whether an index names a file; its other faults are for whoever reads it."""
    try:
        return file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Find every tensor of a model, without reading any.

    Args:
        directory: with config.json and either safetensors in Hugging Face's or PaddleNLP's layout
            or PaddleNLP's ``model_state*.pdparams``; or a GGUF file, or a directory that holds one;
            or a release of Meta's; or a checkpoint of Megatron's.

    Raises:
        UserError: no model, two models, a missing or damaged file, or tensors that are not those
            that config.json describes.
    """
    directory = Path(directory)
    file = gguf_file(directory)
    if file is None:
        check_place(directory)
    _check_kinds(directory)
    if file is None and iteration_of(directory) is not None:
        config, tensors, said = open_megatron(directory)
        return Checkpoint(directory, config, {}, tensors, foreign=said)
    if file is None and is_meta(directory) and not _holds_files(directory):
        config, tensors, form = open_meta(directory)
        said = f"Meta's files of {form.processes} process{'es' * (form.processes > 1)}"
        return Checkpoint(directory, config, {}, tensors, foreign=said)
    config, (raw, source) = load_config(directory), read_raw(directory)
    if file is not None:
        return _open_gguf(file, config, raw)
    _check_raw(raw, Path(source))
    if is_rank_directory(directory):
        return Checkpoint(directory, config, raw, *open_ranks(directory, config, raw))
    stored = _find_stored(directory, FLOATS)
    if _is_paddlenlp(stored):
        return Checkpoint(directory, config, raw, *open_complete(directory, config, stored))
    config = settle(directory, config, stored)
    check_tensors(directory, config, stored)
    return Checkpoint(directory, config, raw, _from_hugging_face(config, stored))


def _check_kinds(directory: Path) -> None:
    """Refuse a directory of which it would be chance which of two models is read.

    Complete tensors come first where a publisher puts another form of them beside: Meta's, GGUF.
    """
    complete = _holds_files(directory)
    found = [
        name
        for name, there in (
            ("safetensors or pytorch_model.bin", complete),
            ("model_state*.pdparams", is_rank_directory(directory)),
            ("Megatron's checkpoint", directory.is_dir() and iteration_of(directory) is not None),
            ("consolidated.*.pth", is_meta(directory) and not complete),
            ("a GGUF file", directory.is_dir() and gguf_file(directory) is not None),
        )
        if there
    ]
    if len(found) > 1:
        raise UserError(
            f"{directory} holds {' and '.join(found)}, which may not be the same model; move one "
            "of them away"
        )


def _open_gguf(file: Path, config: LlamaConfig, raw: Mapping[str, Any]) -> Checkpoint:
    header = read_gguf(file)
    stored, plan = stored_tensors(header), gguf_arrays(config)
    check_names(file, plan, stored)
    tensors = put_together(config, [plan], [stored])
    kinds = sorted({tensor.dtype for tensor in header.tensors.values()})
    said = f"a GGUF file of {', '.join(kinds)}"
    return Checkpoint(file, config, raw, tensors, foreign=said)


def _check_raw(raw: Mapping[str, Any], file: Path) -> None:
    if raw.get("quantization_config"):
        raise UserError(
            f"{file} describes a quantized model; convert the full-precision one and quantize the "
            "result, or widen it first (quantize_generation.py --dequantize)"
        )


def check_tensors(
    place: Path, config: LlamaConfig, stored: Mapping[str, StoredTensor] | Mapping[str, Tensor]
) -> None:
    """Refuse tensors that are not those of a config, by name and shape.

    Args:
        place: the directory, for the message.
        config: of a model of floating-point numbers.
        stored: in Hugging Face's layout.

    Raises:
        UserError: names or shapes that differ.
    """
    shapes = tensor_shapes(config)
    check_names(place, shapes, stored, config.tie_word_embeddings)
    for name, shape in shapes.items():
        check_shape(stored[name], shape)


def _from_hugging_face(
    config: LlamaConfig, stored: Mapping[str, StoredTensor]
) -> dict[str, Tensor]:
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        array = stored[name]
        block = Block(array, False, *extent(shape))
        tensors[name] = Tensor(name, shape, array.dtype, (block,))
    return tensors
