"""A model directory in any layout, seen as complete tensors of Hugging Face's names and shapes.

:func:`find_tensors` is for networks that fill themselves; :func:`open_checkpoint`, for conversion,
also holds what is there against config.json. Only headers are read until a tensor is asked for.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from llm.llama.config import LlamaConfig, load_config
from llm.llama.files.dtypes import FLOATS, native, nbytes, widen
from llm.llama.files.pdparams import read_pdparams
from llm.llama.files.rank_layout import (
    EMBEDDING,
    GATE_UP,
    HEAD,
    QKV,
    ArrayPlan,
    RankLayout,
    extent,
    rank_arrays,
    tensor_shapes,
)
from llm.llama.files.safetensors import StoredTensor, read_header
from llm.llama.files.spare import check_names, same, settle

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_RANK_FILE = re.compile(
    r"model_state(?:\.(?:tp(?P<tp>\d+))?_?(?:pp(?P<pp>\d+))?)?"
    r"(?:-(?P<shard>\d{5})-of-(?P<shards>\d{5}))?\.pdparams"
)


@dataclass(frozen=True)
class Block:
    """A rectangle of a tensor, and the stored array that holds it from row ``top`` on."""

    array: StoredTensor
    transposed: bool
    rows: range
    cols: range
    top: int = 0

    def view(self, values: np.ndarray, rows: range, cols: range, first: int = 0) -> np.ndarray:
        """Return part of the block, oriented as Hugging Face does.

        Args:
            values: the array's rows from ``first`` on, as stored, two-dimensional.
            rows: of the tensor, within the block's.
            cols: likewise.
            first: row of the stored array with which ``values`` starts.
        """
        down, right = self.top - self.rows.start, -self.cols.start
        if self.transposed:
            values, right = values.T, right - first
        else:
            down -= first
        return values[rows.start + down : rows.stop + down, cols.start + right : cols.stop + right]


@dataclass(frozen=True)
class Tensor:
    """A complete tensor, wherever its pieces lie; nothing is read until :meth:`read`.

    Stands in for a ``StoredTensor`` where networks are filled.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    blocks: tuple[Block, ...]
    copies: tuple[tuple[StoredTensor, StoredTensor], ...] = ()  # an array of a block, and its like

    @property
    def file(self) -> Path:
        """The file that holds the first piece."""
        return self.blocks[0].array.file

    @property
    def arrays(self) -> list[StoredTensor]:
        """The stored arrays, each once."""
        return list(dict.fromkeys(block.array for block in self.blocks))

    def read(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Assemble the tensor; bfloat16 widens to float32, others keep their type.

        Args:
            part: a slice of each leading axis; the others' numbers are only in memory meanwhile.
        """
        return widen(self.bits(part), self.dtype)

    def bits(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Assemble the tensor's bytes as they are: bfloat16 is uint16."""
        whole = np.empty([len(side) for side in extent(self.shape)], native(self.dtype))
        for block in self.blocks:
            values = load(block.array, mapped=True)
            piece = block.view(values, block.rows, block.cols)
            whole[block.rows.start : block.rows.stop, block.cols.start : block.cols.stop] = piece
        return whole.reshape(self.shape)[part]


@dataclass(frozen=True)
class Checkpoint:
    """A model directory of any layout."""

    directory: Path
    config: LlamaConfig
    raw: Mapping[str, Any]  # config.json
    tensors: dict[str, Tensor]
    layout: RankLayout | None = None  # None: Hugging Face's

    @property
    def dtypes(self) -> list[str]:
        """The types of the tensors, as safetensors calls them."""
        return sorted({tensor.dtype for tensor in self.tensors.values()})

    def describe(self) -> str:
        """Say what the directory holds."""
        if self.layout is None:
            files = {tensor.file for tensor in self.tensors.values()}
            return f"{len(files)} safetensors file{'s' * (len(files) > 1)}"
        return (
            f"PaddleNLP's files of {self.layout.tensor} tensor parallel x "
            f"{self.layout.pipeline} pipeline ranks"
        )


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return a shape with a vector taken for one column."""
    return (shape[0], shape[1] if len(shape) > 1 else 1)


def load(array: StoredTensor, *, mapped: bool = False) -> np.ndarray:
    """Return an array's numbers as stored (bfloat16 as bits), two-dimensional.

    Raises:
        UserError: the file became shorter since it was examined.
    """
    shape = matrix_shape(array.shape)
    kind = native(array.dtype)
    if mapped and nbytes(array.shape, array.dtype):
        return np.memmap(array.file, kind, "r", array.offset, shape)
    count = shape[0] * shape[1]
    values = np.fromfile(array.file, kind, count, offset=array.offset)
    if len(values) < count:
        raise UserError(f"{array.file} changed while it was read: {array.name} is cut off")
    return values.reshape(shape)


def is_rank_directory(directory: Path) -> bool:
    """Whether a directory holds PaddleNLP's ``model_state*.pdparams``."""
    return any(_RANK_FILE.fullmatch(file.name) for file in directory.glob("*.pdparams"))


def find_tensors(
    directory: Path, types: Sequence[str] = FLOATS
) -> dict[str, StoredTensor] | dict[str, Tensor]:
    """Return every tensor of a model directory, from one file or from the shards of its index.

    Args:
        directory: in Hugging Face's layout; or with PaddleNLP's files of parallel ranks, whose
            tensors are then put together when they are read.
        types: header names of the types that may occur.

    Raises:
        UserError: no weights, weights in another format, or a damaged or missing shard.
    """
    index, single = directory / INDEX_NAME, directory / SINGLE_NAME
    if single.is_file() and not index.is_file():
        return read_header(single, types)
    if single.is_file() and not _names(index, SINGLE_NAME):
        raise UserError(
            f"{directory} holds {SINGLE_NAME} and {INDEX_NAME}, which is of other files: two "
            "models, or parts of two; move one of them away"
        )
    if not index.is_file():
        if is_rank_directory(directory):
            return open_checkpoint(directory).tensors
        others = sorted(p.name for p in directory.glob("*.bin")) + sorted(
            p.name for p in directory.glob("*.pdparams")
        )
        hint = f"; found {others[0]}, which has to be saved as safetensors first" if others else ""
        raise UserError(f"{directory} has neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")
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
        raise UserError(f"{directory} lacks {', '.join(missing)}, which {INDEX_NAME} names")
    return _indexed(directory, shard_of, types)


def _indexed(
    directory: Path, shard_of: Mapping[str, str], types: Sequence[str]
) -> dict[str, StoredTensor]:
    """Return the tensors of shards, which have to be those of the index, no fewer and no more."""
    headers = {n: read_header(directory / n, types) for n in sorted(set(shard_of.values()))}
    tensors = {}
    for name, shard in shard_of.items():
        if name not in headers[shard]:
            raise UserError(
                f"{directory / shard} lacks tensor {name}, which {INDEX_NAME} puts there"
            )
        tensors[name] = headers[shard][name]
    for shard, header in headers.items():
        if stray := sorted(name for name in header if shard_of.get(name) != shard):
            named = shard_of.get(stray[0])
            where = f"puts it into {named}" if named else "does not have it"
            raise UserError(
                f"{directory / shard} holds {stray[0]}, but {INDEX_NAME} {where}; the files are of "
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
    """Find every tensor of a model directory, without reading any.

    Args:
        directory: with config.json and either safetensors in Hugging Face's layout or PaddleNLP's
            ``model_state*.pdparams``.

    Raises:
        UserError: no model, two models, a missing or damaged file, or tensors that are not those
            that config.json describes.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{str(directory)!r} is not a model directory")
    config = load_config(directory)
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    _check_raw(raw, directory / "config.json")
    safe = (directory / SINGLE_NAME).is_file() or (directory / INDEX_NAME).is_file()
    if not is_rank_directory(directory):
        stored = find_tensors(directory)
        config = settle(directory, config, stored)
        check_tensors(directory, config, stored)
        tensors = _from_hugging_face(config, stored)
        return Checkpoint(directory, config, raw, tensors)
    if safe:
        raise UserError(
            f"{directory} holds safetensors and model_state*.pdparams; move one of them away, "
            "they may not be the same model"
        )
    return _open_ranks(directory, config, raw)


def _check_raw(raw: Mapping[str, Any], file: Path) -> None:
    if raw.get("quantization_config"):
        raise UserError(
            f"{file} describes a quantized model; convert the full-precision one and quantize the "
            "result"
        )


def _check_shape(stored: StoredTensor | Tensor, wanted: tuple[int, ...], of: str = "") -> None:
    if stored.shape != wanted:
        raise UserError(
            f"{stored.file}: {stored.name} has shape {list(stored.shape)}, the config asks for "
            f"{list(wanted)}{of}"
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
        _check_shape(stored[name], shape)


def _from_hugging_face(
    config: LlamaConfig, stored: Mapping[str, StoredTensor]
) -> dict[str, Tensor]:
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        array = stored[name]
        block = Block(array, False, *extent(shape))
        tensors[name] = Tensor(name, shape, array.dtype, (block,))
    return tensors


RankFiles = dict[tuple[int, int], list[Path]]  # (tensor rank, stage): the shards of its file


def _find_ranks(directory: Path, said: int | None) -> tuple[RankFiles, int, int]:
    """Return the files and the tensor and pipeline degrees that their names say."""
    files: RankFiles = {}
    for file in sorted(directory.glob("model_state*.pdparams")):
        found = _RANK_FILE.fullmatch(file.name)
        if found is None:
            raise UserError(
                f"{file} is not named as PaddleNLP names weights (model_state.tp00_pp00.pdparams)"
            )
        files.setdefault((int(found["tp"] or 0), int(found["pp"] or 0)), []).append(file)
        if found["shards"] is not None:
            _check_shards(file, int(found["shards"]))
    ranks = max(max(rank for rank, _ in files) + 1, said or 1)
    stages = max(stage for _, stage in files) + 1
    for rank in range(ranks):
        for stage in range(stages):
            if (rank, stage) not in files:
                name = RankLayout(ranks, stages).file_name(rank, stage)
                raise UserError(
                    f"{directory} lacks {name}: the files are those of {ranks} tensor parallel x "
                    f"{stages} pipeline ranks, and every rank's is needed"
                )
    return files, ranks, stages


def _check_shards(file: Path, count: int) -> None:
    stem = file.name.rsplit("-", 3)[0]
    for number in range(1, count + 1):
        name = f"{stem}-{number:05}-of-{count:05}.pdparams"
        if not (file.parent / name).is_file():
            raise UserError(f"{file.parent} lacks {name}, the companion of {file.name}")


def _open_ranks(directory: Path, config: LlamaConfig, raw: Mapping[str, Any]) -> Checkpoint:
    said = raw.get("tensor_parallel_degree")
    files, ranks, stages = _find_ranks(directory, said if isinstance(said, int) else None)
    arrays = []
    for rank in range(ranks):
        found: dict[str, StoredTensor] = {}
        for stage in range(stages):
            for file in files[rank, stage]:
                found |= read_pdparams(file)
        arrays.append(found)
    _check_ranks(arrays)
    _check_tied(directory, config, arrays)
    names = arrays[0]
    layout = RankLayout(
        ranks, stages, any(QKV in n for n in names), any(GATE_UP in n for n in names)
    )
    plans = [rank_arrays(config, layout, rank) for rank in range(ranks)]
    if config.tie_word_embeddings and HEAD not in names:
        for plan in plans:
            del plan[HEAD]
    check_names(files[0, 0][0].parent, plans[0], names)
    tensors = _from_ranks(config, plans, arrays)
    return Checkpoint(directory, config, raw, tensors, layout)


def _check_ranks(arrays: list[dict[str, StoredTensor]]) -> None:
    """Refuse ranks that do not hold the same names, shapes and types."""
    first = arrays[0]
    for rank, others in enumerate(arrays[1:], 1):
        if differing := sorted(first.keys() ^ others.keys()):
            raise UserError(
                f"tensor parallel ranks 0 and {rank} do not hold the same arrays: only one of them "
                f"has {differing[0]}"
            )
        for name, array in others.items():
            for what, mine, theirs in (
                ("shape", list(first[name].shape), list(array.shape)),
                ("type", first[name].dtype, array.dtype),
            ):
                if mine != theirs:
                    raise UserError(
                        f"{name} has {what} {mine} in {first[name].file.name} but {theirs} in "
                        f"{array.file.name}; the files are not of one checkpoint"
                    )


def _check_tied(
    directory: Path, config: LlamaConfig, arrays: list[dict[str, StoredTensor]]
) -> None:
    """Refuse a second copy of tied embeddings that is none; PaddleNLP would take the first."""
    embedding = "llama." + EMBEDDING.removeprefix("model.")
    for found in arrays:
        if not config.tie_word_embeddings or not {HEAD, embedding} <= found.keys():
            continue
        if not same(found[embedding], found[HEAD]):
            raise UserError(
                f"{found[HEAD].file}: config.json says tie_word_embeddings=true, but {HEAD} is "
                f"another matrix than {embedding}; if the model has both, set it to false in "
                f"{directory / 'config.json'} and save {HEAD} as [hidden, vocabulary]"
            )


def _from_ranks(
    config: LlamaConfig, plans: list[dict[str, ArrayPlan]], arrays: list[dict[str, StoredTensor]]
) -> dict[str, Tensor]:
    shapes = tensor_shapes(config)
    blocks: dict[str, list[Block]] = {name: [] for name in shapes}
    copies: dict[str, list[tuple[StoredTensor, StoredTensor]]] = {name: [] for name in shapes}
    for plan, found in zip(plans, arrays, strict=True):
        for name, planned in plan.items():
            array = found[name]
            _check_shape(array, planned.shape, f" of {len(plans)} tensor parallel ranks")
            for part in planned.parts:
                block = Block(array, planned.transposed, part.rows, part.cols, part.top)
                known = blocks[part.tensor]
                same = [b for b in known if (b.rows, b.cols) == (block.rows, block.cols)]
                if not same:
                    known.append(block)
                elif len(planned.parts) == 1:
                    copies[part.tensor].append((same[0].array, array))
    return {
        name: Tensor(
            *(name, shape, _one_type(name, blocks[name])),
            *(tuple(blocks[name]), tuple(copies[name])),
        )
        for name, shape in shapes.items()
    }


def _one_type(name: str, blocks: list[Block]) -> str:
    types = {block.array.dtype for block in blocks}
    if len(types) > 1 or not types <= set(FLOATS):
        raise UserError(
            f"{blocks[0].array.file}: {name} mixes the types {', '.join(sorted(types))}"
        )
    return types.pop()
