"""PaddleNLP's ``model_state*.pdparams``: which files there are, and what their arrays make."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from llm.llama.config import LlamaConfig
from llm.llama.files.pdparams import read_pdparams
from llm.llama.files.rank_layout import (
    EMBEDDING,
    GATE_UP,
    HEAD,
    QKV,
    RankLayout,
    rank_arrays,
)
from llm.llama.files.safetensors import StoredTensor
from llm.llama.files.spare import check_names, same
from llm.llama.files.tensors import Tensor, put_together

_RANK_FILE = re.compile(
    r"model_state(?:\.(?:tp(?P<tp>\d+))?_?(?:pp(?P<pp>\d+))?)?"
    r"(?:-(?P<shard>\d{5})-of-(?P<shards>\d{5}))?\.pdparams"
)


def is_rank_directory(directory: Path) -> bool:
    """Whether a directory holds PaddleNLP's ``model_state*.pdparams``."""
    return any(_RANK_FILE.fullmatch(file.name) for file in directory.glob("*.pdparams"))


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


def open_ranks(
    directory: Path, config: LlamaConfig, raw: Mapping[str, Any]
) -> tuple[dict[str, Tensor], RankLayout]:
    """Return the complete tensors of a directory of rank files, and how they share the model out.

    Args:
        directory: with ``model_state*.pdparams``.
        config: of the model.
        raw: its config.json.

    Raises:
        UserError: a missing or damaged file, or arrays that are not those of the model.
    """
    said = raw.get("tensor_parallel_degree")
    files, ranks, stages = _find_ranks(directory, said if isinstance(said, int) else None)
    arrays = []
    for rank in range(ranks):
        found: dict[str, StoredTensor] = {}
        for stage in range(stages):
            for file in files[rank, stage]:
                found |= read_pdparams(file)
        arrays.append(found)
    return _of_arrays(directory, config, arrays, stages)


def open_complete(
    directory: Path, config: LlamaConfig, stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, Tensor], RankLayout]:
    """Return the tensors of PaddleNLP's safetensors, which one process holds whole.

    Args:
        directory: of the model.
        config: of the model.
        stored: by PaddleNLP's names, linears ``[in, out]``.

    Raises:
        UserError: as of :func:`open_ranks`.
    """
    return _of_arrays(directory, config, [dict(stored)], 1)


def _of_arrays(
    directory: Path, config: LlamaConfig, arrays: list[dict[str, StoredTensor]], stages: int
) -> tuple[dict[str, Tensor], RankLayout]:
    check_ranks(arrays)
    _check_tied(directory, config, arrays)
    names = arrays[0]
    layout = RankLayout(
        len(arrays), stages, any(QKV in n for n in names), any(GATE_UP in n for n in names)
    )
    plans = [rank_arrays(config, layout, rank) for rank in range(len(arrays))]
    if config.tie_word_embeddings and HEAD not in names:
        for plan in plans:
            del plan[HEAD]
    check_names(directory, plans[0], names)
    of = f" of {len(arrays)} tensor parallel ranks"
    return put_together(config, plans, arrays, of), layout


def check_ranks(arrays: Sequence[Mapping[str, StoredTensor]]) -> None:
    """Refuse ranks that do not hold the same names, shapes and types.

    Raises:
        UserError: names what differs, and where.
    """
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
