"""Weights in Hugging Face's layout: read and written tensor by tensor.

Names are the same on both sides; a linear's matrix is ``[out, in]`` in the files and ``[in, out]``
in the network. Quantized linears lie in the files as ``compressed-tensors`` writes them; see
:mod:`llm.llama.quantization.files`.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn
from tqdm import tqdm

from common.errors import UserError
from common.files import Work, replacing
from llm.llama.files.checkpoint import INDEX_NAME, find_tensors
from llm.llama.files.dtypes import FLOATS, TYPES, header_type, nbytes
from llm.llama.files.finite import read_finite
from llm.llama.files.parts import Part, PartFiles, quiet, saving
from llm.llama.files.safetensors import StoredTensor
from llm.llama.files.slots import Slot, StoresItself
from llm.llama.files.spare import check_names
from llm.llama.placement import is_matrix
from llm.parallel.pieces import Gatherer, share, split_axis, whole_shape
from llm.parallel.topology import Topology, single

_SLAB = 2**24  # numbers of a tensor that are read at a time
_LAYER = re.compile(r"model\.layers\.\d+\.(.+)")


def _slot(name: str, parameter: paddle.Tensor, topology: Topology) -> Slot:
    """Say how a parameter lies in the files, complete, and what of it is this process's."""
    transposed = is_matrix(name)
    axis = split_axis(parameter)
    shape = whole_shape(parameter.shape, axis, topology)
    if transposed:
        shape, axis = shape[::-1], None if axis is None else 1 - axis
    part = share(shape, axis, topology)

    def fetch() -> np.ndarray:
        data = parameter.numpy()
        return data.T if transposed else data

    def fill(stored: StoredTensor) -> None:
        if not transposed and not part and parameter.size > _SLAB:
            _fill_rows(parameter, stored)
            return
        data = read_finite(stored, part, header_type(parameter))
        tensor = paddle.to_tensor(np.ascontiguousarray(data.T if transposed else data))
        parameter.set_value(tensor.astype(parameter.dtype))

    return Slot(shape, header_type(parameter), FLOATS, fetch, fill)


def _fill_rows(parameter: paddle.Tensor, stored: StoredTensor) -> None:
    """Fill an embedding by pieces: the vocabulary in float32, twice, would be most of a peak."""
    step = max(_SLAB // parameter.shape[1], 1)
    with paddle.no_grad():
        for first in range(0, parameter.shape[0], step):
            rows = slice(first, first + step)
            data = read_finite(stored, (rows,), header_type(parameter))
            parameter[rows] = paddle.to_tensor(np.ascontiguousarray(data)).astype(parameter.dtype)


def _slots(model: nn.Layer, topology: Topology) -> dict[str, Slot]:
    """Return every tensor of a network under its name in the files."""
    slots = {name: _slot(name, p, topology) for name, p in model.named_parameters()}
    for name, layer in model.named_sublayers():
        if isinstance(layer, StoresItself):
            slots |= layer.slots(name)
    return slots


def _whole(model: nn.Layer, held: Iterable[str], tied: bool) -> set[str]:
    """Return the names of the complete network, of which a stage holds some.

    All layers have the same names, and every stage has a layer.
    """
    inside = {match[1] for match in map(_LAYER.fullmatch, held) if match}
    layers = range(model.config.num_hidden_layers)
    ends = {"model.embed_tokens.weight", "model.norm.weight"}
    ends |= set() if tied else {"lm_head.weight"}
    return {f"model.layers.{index}.{name}" for index in layers for name in inside} | ends


def load_weights(
    model: nn.Layer, directory: str | Path, *, tied: bool, topology: Topology | None = None
) -> None:
    """Fill a network from a model directory; peak memory is the network plus one tensor.

    Where a layout splits the network, only this process's share is read from the disk: its layers,
    and of matrices that are split its rows or columns.

    Args:
        model: a ``LlamaForCausalLM``, or this process's share of one.
        directory: in Hugging Face's layout, single or sharded safetensors in fp32, fp16 or bf16;
            integers where the network has quantized linears.
        tied: the network shares embedding and output matrix.
        topology: this process in the job; None is a job of one process.

    Raises:
        UserError: names, shapes or types that do not match, checked before anything is loaded; or
            scales that are damaged; or a tensor with nan or inf, by name. All processes raise what
            one of them found.
    """
    directory = Path(directory)
    topology = topology or single()
    slots = _slots(model, topology)
    only_floats = all(slot.accepts == FLOATS for slot in slots.values())
    tensors = find_tensors(directory, FLOATS if only_floats else TYPES)
    staged = topology.layout.pipeline > 1
    expected = _whole(model, slots, tied) if staged else slots.keys()
    check_names(directory, expected, tensors, tied)
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
    topology.agree(_filled(slots, tensors))


def _filled(slots: Mapping[str, Slot], tensors: Mapping[str, Any]) -> UserError | None:
    """Fill slots; return what is wrong with numbers that only this process has read."""
    bar = tqdm(slots.items(), "loading", disable=quiet(slots.values()), leave=False)
    try:
        for name, slot in bar:
            slot.fill(tensors[name])
    except UserError as error:
        return error
    return None


def _parts(model: nn.Layer, gather: Gatherer) -> list[Part]:
    """Return the tensors to be written, of which this process holds pieces."""
    topology = gather.topology
    if topology.layout.world_size == 1:
        slots = _slots(model, topology)
        return [Part(n, s.shape, s.dtype, lambda _, s=s: s.fetch()) for n, s in slots.items()]
    parts = []
    for name, parameter in model.named_parameters():
        if getattr(parameter, "stage_shared", False) and not topology.stage_first:
            continue
        slot = _slot(name, parameter, topology)

        def fetch(writer: int, parameter: Any = parameter, turn: bool = is_matrix(name)) -> Any:
            data = gather.parameter(parameter, writer)
            return data.T if turn and data is not None else data

        parts.append(Part(name, slot.shape, slot.dtype, fetch))
    return parts


def save_weights(
    model: nn.Layer,
    directory: str | Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    documents: Mapping[str, Any] | None = None,
    topology: Topology | None = None,
    full: Callable[[Any], AbstractContextManager[Any]] = nullcontext,
    work: Work | None = None,
) -> None:
    """Write a network's weights, each in its own type, in Hugging Face's layout.

    Files appear under their names only once all are complete; weights of an earlier save in the
    same directory are replaced. Where a layout splits the network, all processes call this: each
    tensor is brought together in one of them, which writes it, so that memory holds one complete
    tensor beside the share; the files are those of the complete network.

    Args:
        model: a ``LlamaForCausalLM``, or this process's share of one.
        directory: created when absent; all processes see the same one.
        max_shard_bytes: a new file starts beyond this size.
        documents: JSON files, name to content, that appear together with the weights.
        topology: this process in the job; None is a job of one process.
        full: brings a parameter together that sharding has taken apart, such as
            ``Updater.full_parameter``; see :class:`Gatherer`.
        work: takes what touches the disk, for whoever owns the save to finish; without it this
            function does.

    Raises:
        OSError: a full or unwritable disk of any process; what was in the directory is unchanged.
    """
    with saving(directory, "model", topology, work, max_shard_bytes) as files:
        parts = _parts(model, Gatherer(files.topology, full))
        names = [part.name for part in parts]
        files.work.last(partial(_finish, files, names, dict(documents or {})))
        files.write(parts)


def _finish(files: PartFiles, order: list[str], documents: dict[str, Any]) -> None:
    """Give the files of all processes their names, together with what lies beside them."""
    directory, named = files.directory, files.named()
    if len(named) > 1:
        documents[INDEX_NAME] = _index(files, order)
    with ExitStack() as stack:
        for name, content in documents.items():
            temporary = stack.enter_context(replacing(directory / name))
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        files.take_names()
    # While an index is there it decides what is read, so it goes before what it names.
    if len(named) == 1:
        (directory / INDEX_NAME).unlink(missing_ok=True)
    for stale in directory.glob("model*.safetensors"):
        if stale.name not in named.values():
            stale.unlink()


def _index(files: PartFiles, order: list[str]) -> dict[str, Any]:
    """Return the index's content; tensors of rank 0 first, in the order of its network."""
    named, tensors = files.named(), files.tensors()
    total = sum(nbytes(tensor.shape, tensor.dtype) for tensor in tensors.values())
    names = [*order, *(name for name in tensors if name not in set(order))]
    weight_map = {name: named[tensors[name].file] for name in names}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
