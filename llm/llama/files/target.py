"""The files of a conversion, laid out before any number is moved."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from llm.llama.config import LlamaConfig
from llm.llama.files.checkpoint import INDEX_NAME, SINGLE_NAME
from llm.llama.files.dtypes import PADDLE_BFLOAT16, nbytes
from llm.llama.files.pdparams import frame
from llm.llama.files.rank_layout import (
    ArrayPlan,
    RankLayout,
    rank_arrays,
    stage_of,
    tensor_shapes,
    whole,
)
from llm.llama.files.safetensors import StoredTensor, safetensors_header
from llm.llama.files.tensors import Block
from llm.parallel.layout import divisors, nearest


@dataclass(frozen=True)
class Seal:
    """A CRC-32 that is known once the bytes are there: of which, and where it is written."""

    offset: int
    size: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class FilePlan:
    """One file: where its arrays start, the bytes around them, and checksums of arrays."""

    path: Path
    size: int
    around: tuple[tuple[int, bytes], ...]  # offset, bytes
    seals: tuple[Seal, ...] = ()


@dataclass
class Plan:
    """All files of a directory.

    ``blocks`` says for each array which tensors fill it.
    """

    files: list[FilePlan] = field(default_factory=list)
    blocks: dict[StoredTensor, list[tuple[str, Block]]] = field(default_factory=dict)
    documents: dict[str, Any] = field(default_factory=dict)  # JSON files; texts as they are

    def add(self, stored: StoredTensor, planned: ArrayPlan) -> None:
        """Say of an array of a file which parts of which tensors fill it."""
        self.blocks[stored] = [
            (
                part.tensor,
                Block(stored, planned.transposed, part.rows, part.cols, part.top, part.step),
            )
            for part in planned.parts
        ]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def plan_hugging_face(
    directory: Path, config: LlamaConfig, types: Mapping[str, str], max_shard_bytes: int
) -> Plan:
    """Lay out complete tensors in safetensors files.

    Args:
        directory: where the files are going to be.
        config: of the model.
        types: safetensors' name of the type of each tensor.
        max_shard_bytes: a new file starts beyond this size.
    """
    arrays = {
        name: ArrayPlan(name, (whole(name, shape),), False, len(shape) == 1)
        for name, shape in tensor_shapes(config).items()
    }
    return _plan_safetensors(directory, arrays, types, max_shard_bytes)


def plan_paddlenlp(
    directory: Path,
    config: LlamaConfig,
    types: Mapping[str, str],
    layout: RankLayout,
    max_shard_bytes: int,
) -> Plan:
    """Lay out PaddleNLP's complete arrays in safetensors files.

    Args:
        directory: where the files are going to be.
        config: of the model.
        types: safetensors' name of the type of each tensor.
        layout: of one rank; its fusions count.
        max_shard_bytes: a new file starts beyond this size.
    """
    arrays = rank_arrays(config, layout, 0)
    said = {"BF16": PADDLE_BFLOAT16}
    return _plan_safetensors(directory, arrays, types, max_shard_bytes, {"format": "np"}, said)


def _plan_safetensors(
    directory: Path,
    arrays: Mapping[str, ArrayPlan],
    types: Mapping[str, str],
    max_shard_bytes: int,
    described: Mapping[str, str] | None = None,
    said: Mapping[str, str] | None = None,
) -> Plan:
    """Lay out arrays in safetensors files, whose headers may call types something else."""
    kinds = {name: types[planned.parts[0].tensor] for name, planned in arrays.items()}
    sizes = {name: nbytes(planned.shape, kinds[name]) for name, planned in arrays.items()}
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    count = len(shards)
    names = [SINGLE_NAME]
    if count > 1:
        names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    plan = Plan()
    for shard, file_name in zip(shards, names, strict=True):
        path = directory / file_name
        shapes = {name: arrays[name].shape for name in shard}
        called = {name: (said or {}).get(kinds[name], kinds[name]) for name in shard}
        header = safetensors_header(shapes, called, described)
        position = len(header)
        for name in shard:
            planned = arrays[name]
            stored = StoredTensor(path, name, kinds[name], planned.shape, position)
            plan.add(stored, planned)
            position += sizes[name]
        plan.files.append(FilePlan(path, position, ((0, header),)))
    if count > 1:
        where = {n: file for shard, file in zip(shards, names, strict=True) for n in shard}
        total = sum(sizes.values())
        plan.documents[INDEX_NAME] = {"metadata": {"total_size": total}, "weight_map": where}
    return plan


def plan_ranks(
    directory: Path, config: LlamaConfig, types: Mapping[str, str], layout: RankLayout
) -> Plan:
    """Lay out PaddleNLP's file of every tensor and pipeline parallel rank.

    Args:
        directory: where the files are going to be.
        config: of the model.
        types: safetensors' name of the type of each tensor.
        layout: the degrees.

    Raises:
        UserError: degrees that the model cannot be cut into, with the nearest that fit.
    """
    check_degrees(config, layout)
    plan = Plan()
    for rank in range(layout.tensor):
        arrays = rank_arrays(config, layout, rank)
        for stage in range(layout.pipeline):
            path = directory / layout.file_name(rank, stage)
            here = {
                name: planned
                for name, planned in arrays.items()
                if stage_of(name, config, layout.pipeline) == stage
            }
            kinds = {name: types[planned.parts[0].tensor] for name, planned in here.items()}
            around, offsets = frame({n: (p.shape, kinds[n]) for n, p in here.items()})
            places, position = [], 0
            for before, (name, planned) in zip(around, here.items(), strict=False):
                places.append((position, before))
                stored = StoredTensor(path, name, kinds[name], planned.shape, offsets[name])
                plan.add(stored, planned)
                position = offsets[name] + nbytes(planned.shape, kinds[name])
            places.append((position, around[-1]))
            plan.files.append(FilePlan(path, position + len(around[-1]), tuple(places)))
    return plan


def check_degrees(config: LlamaConfig, layout: RankLayout) -> None:
    """Refuse degrees that do not fit the model.

    Raises:
        UserError: names the flag, the size that does not divide, and the nearest degrees that do.
    """
    sizes = {
        name: getattr(config, name)
        for name in ("num_key_value_heads", "num_attention_heads", "intermediate_size")
    }
    fitting = [d for d in divisors(sizes["num_key_value_heads"]) if _fits(d, sizes.values())]
    for name, size in sizes.items():
        if size % layout.tensor:
            raise UserError(
                f"tensor_parallel_degree={layout.tensor} does not divide the model's "
                f"{name}={size}; use {_neighbours(layout.tensor, fitting)}"
            )
    if layout.pipeline > config.num_hidden_layers:
        raise UserError(
            f"pipeline_parallel_degree={layout.pipeline} exceeds the model's num_hidden_layers="
            f"{config.num_hidden_layers}; use {config.num_hidden_layers} or fewer"
        )


def _fits(degree: int, sizes: Iterable[int]) -> bool:
    return all(size % degree == 0 for size in sizes)


def _neighbours(wanted: int, fitting: list[int]) -> str:
    """Name the nearest degrees on both sides."""
    sides = ([d for d in fitting if d < wanted], [d for d in fitting if d > wanted])
    return " or ".join(str(nearest(wanted, side)) for side in sides if side)
