"""Weights in Hugging Face's layout: read and written tensor by tensor.

Names are the same on both sides; a linear's matrix is ``[out, in]`` in the files and ``[in, out]``
in the network. Quantized linears lie in the files as ``compressed-tensors`` writes them; see
:mod:`llm.llama.quantization.files`.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn
from tqdm import tqdm

from llm.errors import UserError
from llm.llama.model_files import INDEX_NAME, SINGLE_NAME, find_tensors
from llm.llama.quantization.files import Slot, quantized_slots
from llm.llama.quantization.linear import QuantizedLinear
from llm.llama.safetensors_io import FLOATS, StoredTensor, nbytes, write_file

_STORED_TYPE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def _is_matrix(model: nn.Layer) -> dict[str, bool]:
    """Return for each parameter whether the files hold it transposed."""
    linears = {name for name, layer in model.named_sublayers() if isinstance(layer, nn.Linear)}
    return {
        name: name.endswith(".weight") and name.removesuffix(".weight") in linears
        for name, _ in model.named_parameters()
    }


def _slot(parameter: paddle.Tensor, transposed: bool) -> Slot:
    """Say how a parameter lies in the files."""
    shape = tuple(parameter.shape[::-1] if transposed else parameter.shape)
    dtype = str(parameter.dtype).rsplit(".", 1)[-1]

    def fetch() -> np.ndarray:
        data = parameter.numpy()
        return data.T if transposed else data

    def fill(stored: StoredTensor) -> None:
        data = stored.read()
        tensor = paddle.to_tensor(np.ascontiguousarray(data.T if transposed else data))
        parameter.set_value(tensor.astype(parameter.dtype))

    return Slot(shape, _STORED_TYPE[dtype], FLOATS, fetch, fill)


def _slots(model: nn.Layer) -> dict[str, Slot]:
    """Return every tensor of a network under its name in the files."""
    transposed = _is_matrix(model)
    slots = {n: _slot(p, transposed[n]) for n, p in model.named_parameters()}
    for name, layer in model.named_sublayers():
        if isinstance(layer, QuantizedLinear):
            slots |= quantized_slots(name, layer)
    return slots


def _check_names(directory: Path, slots: dict[str, Slot], stored: set[str], tied: bool) -> None:
    ignored = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
    if tied:
        ignored.add("lm_head.weight")  # some files store the shared matrix twice
    missing = sorted(slots.keys() - stored)
    surplus = sorted(stored - slots.keys() - ignored)
    for names, what in ((missing, "lacks"), (surplus, "has unexpected")):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            raise UserError(f"{directory} {what} {shown}: config.json describes another model")


def load_weights(model: nn.Layer, directory: str | Path, *, tied: bool) -> None:
    """Fill a network from a model directory; peak memory is the network plus one tensor.

    Args:
        model: a ``LlamaForCausalLM``.
        directory: in Hugging Face's layout, single or sharded safetensors in fp32, fp16 or bf16;
            integers where the network has quantized linears.
        tied: the network shares embedding and output matrix.

    Raises:
        UserError: names, shapes or types that do not match, checked before anything is loaded; or
            scales that are damaged.
    """
    directory = Path(directory)
    tensors = find_tensors(directory, getattr(model, "quantization", None))
    slots = _slots(model)
    _check_names(directory, slots, set(tensors), tied)
    for name, slot in slots.items():
        stored = tensors[name]
        if stored.shape != slot.shape:
            raise UserError(
                f"{stored.file}: {name} has shape {list(stored.shape)}, the config asks for "
                f"{list(slot.shape)}"
            )
        if stored.dtype not in slot.accepts:
            raise UserError(
                f"{stored.file}: {name} has type {stored.dtype}, the config asks for "
                f"{' or '.join(slot.accepts)}"
            )
    bar = tqdm(slots.items(), "loading", disable=_quiet(slots), leave=False)
    for name, slot in bar:
        slot.fill(tensors[name])


def _quiet(slots: dict[str, Slot]) -> bool | None:
    """Show a bar for models that take seconds, and then only on a terminal."""
    return None if sum(slot.nbytes for slot in slots.values()) > 400_000_000 else True


def _shards(slots: dict[str, Slot], max_bytes: int) -> Iterator[dict[str, Slot]]:
    shard: dict[str, Slot] = {}
    size = 0
    for name, slot in slots.items():
        if shard and size + slot.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = slot
        size += slot.nbytes
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
    slots = _slots(model)
    shards = list(_shards(slots, max_shard_bytes))
    names = [SINGLE_NAME]
    contents = dict(documents or {})
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        contents[INDEX_NAME] = _index(shards, names)
    with _staged(directory) as stage:
        bar = tqdm(shards, "saving", disable=_quiet(slots), leave=False)
        for shard, name in zip(bar, names, strict=True):
            _write_shard(stage(name), shard)
        for name, content in contents.items():
            stage(name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    # While an index is there it decides what is read, so it goes before what it names.
    if len(names) == 1:
        (directory / INDEX_NAME).unlink(missing_ok=True)
    for stale in directory.glob("model*.safetensors"):
        if stale.name not in names:
            stale.unlink()


def _write_shard(file: Path, shard: dict[str, Slot]) -> None:
    # Wide types first, as the reference implementation does, so that every tensor is aligned.
    ordered = dict(sorted(shard.items(), key=lambda entry: -nbytes((1,), entry[1].dtype)))
    shapes = {name: slot.shape for name, slot in ordered.items()}
    types = {name: slot.dtype for name, slot in ordered.items()}
    write_file(file, shapes, types, lambda name: ordered[name].fetch())


def _index(shards: list[dict[str, Slot]], names: list[str]) -> dict[str, Any]:
    total = sum(slot.nbytes for shard in shards for slot in shard.values())
    weight_map = {t: name for shard, name in zip(shards, names, strict=True) for t in shard}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
