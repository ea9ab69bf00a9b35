"""Where the tensors of a model directory lie: found without paddle, before anything is read."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from llm.errors import UserError
from llm.llama.quantization.config import QuantConfig
from llm.llama.safetensors_io import FLOATS, TYPES, StoredTensor, read_header

if TYPE_CHECKING:
    from llm.llama.convert.checkpoints import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def find_tensors(
    directory: Path, quantization: QuantConfig | None = None
) -> "dict[str, StoredTensor] | dict[str, Tensor]":
    """Return every tensor of a model directory, from one file or from the shards of its index.

    Args:
        directory: in Hugging Face's layout; or with PaddleNLP's files of parallel ranks, whose
            tensors are then put together when they are read.
        quantization: of the model; integers are only expected with it.

    Raises:
        UserError: no weights, weights in another format, or a damaged or missing shard.
    """
    index, single = directory / INDEX_NAME, directory / SINGLE_NAME
    types = FLOATS if quantization is None else TYPES
    if single.is_file() and not index.is_file():
        return read_header(single, types)
    if not index.is_file():
        from llm.llama.convert.checkpoints import is_rank_directory, open_checkpoint

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
    headers = {n: read_header(directory / n, types) for n in sorted(set(shard_of.values()))}
    tensors = {}
    for name, shard in shard_of.items():
        if name not in headers[shard]:
            raise UserError(
                f"{directory / shard} lacks tensor {name}, which {INDEX_NAME} puts there"
            )
        tensors[name] = headers[shard][name]
    return tensors
