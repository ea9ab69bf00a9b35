"""Weights in Hugging Face's layout: read and written tensor by tensor.

Names are the same on both sides; a linear's matrix is ``[out, in]`` in the files and ``[in, out]``
in the network.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn
from tqdm import tqdm

from llm.errors import UserError
from llm.llama.safetensors_io import StoredTensor, read_header, write_file

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_STORED_TYPE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a model directory, from one file or from the shards of its index.

    Raises:
        UserError: no weights, weights in another format, or a damaged or missing shard.
    """
    index, single = directory / INDEX_NAME, directory / SINGLE_NAME
    if single.is_file() and not index.is_file():
        return read_header(single)
    if not index.is_file():
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
    headers = {name: read_header(directory / name) for name in sorted(set(shard_of.values()))}
    tensors = {}
    for name, shard in shard_of.items():
        if name not in headers[shard]:
            raise UserError(
                f"{directory / shard} lacks tensor {name}, which {INDEX_NAME} puts there"
            )
        tensors[name] = headers[shard][name]
    return tensors


def _is_matrix(model: nn.Layer) -> dict[str, bool]:
    """Return for each parameter whether the files hold it transposed."""
    linears = {name for name, layer in model.named_sublayers() if isinstance(layer, nn.Linear)}
    return {
        name: name.endswith(".weight") and name.removesuffix(".weight") in linears
        for name, _ in model.named_parameters()
    }


def _check_names(
    directory: Path, model: nn.Layer, tensors: dict[str, StoredTensor], tied: bool
) -> None:
    wanted = {name for name, _ in model.named_parameters()}
    ignored = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
    if tied:
        ignored.add("lm_head.weight")  # some files store the shared matrix twice
    missing = sorted(wanted - tensors.keys())
    surplus = sorted(tensors.keys() - wanted - ignored)
    for names, what in ((missing, "lacks"), (surplus, "has unexpected")):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            raise UserError(f"{directory} {what} {shown}: config.json describes another model")


def load_weights(model: nn.Layer, directory: str | Path, *, tied: bool) -> None:
    """Fill a network from a model directory; peak memory is the network plus one tensor.

    Args:
        model: a ``LlamaForCausalLM``.
        directory: in Hugging Face's layout, single or sharded safetensors in fp32, fp16 or bf16.
        tied: the network shares embedding and output matrix.

    Raises:
        UserError: names or shapes that do not match; checked before anything is loaded.
    """
    directory = Path(directory)
    tensors = find_tensors(directory)
    _check_names(directory, model, tensors, tied)
    transposed = _is_matrix(model)
    for name, parameter in model.named_parameters():
        stored = tensors[name].shape
        expected = tuple(parameter.shape[::-1] if transposed[name] else parameter.shape)
        if stored != expected:
            raise UserError(
                f"{tensors[name].file}: {name} has shape {list(stored)}, the config asks for "
                f"{list(expected)}"
            )
    parameters = list(model.named_parameters())
    for name, parameter in tqdm(parameters, "loading", disable=_quiet(parameters), leave=False):
        data = tensors[name].read()
        data = data.T if transposed[name] else data
        tensor = paddle.to_tensor(np.ascontiguousarray(data))
        parameter.set_value(tensor.astype(parameter.dtype))


def _quiet(parameters: list) -> bool | None:
    """Show a bar for models that take seconds, and then only on a terminal."""
    return None if sum(p.size for _, p in parameters) > 100_000_000 else True


def _shards(
    shapes: dict[str, tuple[int, ...]], width: int, max_bytes: int
) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        nbytes = width * math.prod(shape)
        if shard and size + nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += nbytes
    yield shard


@contextlib.contextmanager
def _staged(directory: Path) -> Iterator[Callable[[str], Path]]:
    """Yield a function from names to temporary files, which take their names together at the end.

    Raises:
        OSError: the files could not be written; none of them took its name.
    """
    files: dict[str, Path] = {}

    def stage(name: str) -> Path:
        files[name] = directory / f".{name}.{os.getpid()}.tmp"
        return files[name]

    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield stage
        for name, file in files.items():
            file.replace(directory / name)
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)


def save_weights(
    model: nn.Layer,
    directory: str | Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    documents: Mapping[str, Any] | None = None,
) -> None:
    """Write a network's weights, each in its own type, in Hugging Face's layout.

    Files appear under their names only once all are complete; weights of an earlier save in the
    same directory are replaced.

    Args:
        model: a ``LlamaForCausalLM``.
        directory: created when absent.
        max_shard_bytes: a new file starts beyond this size.
        documents: JSON files, name to content, that appear together with the weights.

    Raises:
        OSError: a full or unwritable disk; what was in the directory is unchanged.
    """
    directory = Path(directory)
    parameters = dict(model.named_parameters())
    transposed = _is_matrix(model)
    shapes = {n: tuple(p.shape[::-1] if transposed[n] else p.shape) for n, p in parameters.items()}
    dtype = str(next(iter(parameters.values())).dtype).rsplit(".", 1)[-1]
    stored = _STORED_TYPE[dtype]

    def fetch(name: str) -> np.ndarray:
        data = parameters[name].numpy()
        return data.T if transposed[name] else data

    width = 4 if stored == "F32" else 2
    shards = list(_shards(shapes, width, max_shard_bytes))
    names = [SINGLE_NAME]
    contents = dict(documents or {})
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        contents[INDEX_NAME] = _index(shards, names, width)
    with _staged(directory) as stage:
        bar = tqdm(shards, "saving", disable=_quiet(list(parameters.items())), leave=False)
        for shard, name in zip(bar, names, strict=True):
            write_file(stage(name), shard, stored, fetch)
        for name, content in contents.items():
            stage(name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    # While an index is there it decides what is read, so it goes before what it names.
    if len(names) == 1:
        (directory / INDEX_NAME).unlink(missing_ok=True)
    for stale in directory.glob("model*.safetensors"):
        if stale.name not in names:
            stale.unlink()


def _index(shards: list, names: list[str], width: int) -> dict[str, Any]:
    total = sum(width * math.prod(shape) for shard in shards for shape in shard.values())
    weight_map = {t: name for shard, name in zip(shards, names, strict=True) for t in shard}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
