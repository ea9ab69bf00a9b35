"""GGUF files, laid out before any number is moved; the ``gguf`` package writes what stands before.

Matrices have the type that is asked for; vectors are float32, as llama.cpp computes with them.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError, UserError
from common.gguf import BLOCKS
from data.tokenization.base import Tokenizer
from data.tokenization.gguf_entries import template_entries, vocabulary_entries
from data.vocabulary import check_vocabulary
from llm.llama.config import LlamaConfig
from llm.llama.files.dtypes import FLOATS, nbytes
from llm.llama.files.gguf import BlockTensor, check_blocks, gguf_arrays
from llm.llama.files.safetensors import StoredTensor
from llm.llama.files.target import FilePlan, Plan
from llm.llama.gguf_config import ARCHITECTURE, ROPE_FACTORS, metadata, rope_factors

FILE_NAME = "model.gguf"
_ALIGNMENT = 32
# llama.cpp's number for what most matrices of a file are.
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}


@dataclass(frozen=True)
class GGUFForm:
    """What a GGUF file is to hold beside the weights.

    Attributes:
        tokenizer: of the model.
        name: what readers show.
        blocks: type of the matrices where it is no floating-point one.
    """

    tokenizer: Tokenizer
    name: str
    blocks: str | None = None


def plan_gguf(
    directory: Path, config: LlamaConfig, types: Mapping[str, str], form: GGUFForm
) -> Plan:
    """Lay out a model as one file.

    Args:
        directory: where the file is going to be.
        config: of the model.
        types: header's name of the type of each tensor; vectors, and float64, become float32.
        form: tokenizer, name and blocks.

    Raises:
        UserError: a model or a tokenizer that the format cannot hold.
    """
    if form.blocks is not None:
        check_blocks(config, form.blocks)
    check_vocabulary(form.tokenizer, config.vocab_size)
    path, shapes, kinds = directory / FILE_NAME, {}, {}
    arrays = gguf_arrays(config)
    for name, planned in arrays.items():
        own = types[planned.parts[0].tensor]
        matrix = "F32" if own not in BLOCKS else own
        shapes[name] = planned.shape
        kinds[name] = "F32" if planned.vector else form.blocks or matrix
    factors = b""
    if config.rope_scaling.rope_type == "llama3":
        values = rope_factors(config.rope_scaling, config.rope_theta, config.head_dim)
        factors = np.array(values, "<f4").tobytes()
        shapes[ROPE_FACTORS], kinds[ROPE_FACTORS] = (len(values),), "F32"
    header = _header(path.name, config, form, shapes, kinds)
    plan, position = Plan(), _aligned(len(header))
    around = [(0, header)]
    for name, shape in shapes.items():
        if name == ROPE_FACTORS:
            around.append((position, factors))
        else:
            planned = arrays[name]
            stored = _stored(path, name, shape, kinds[name], position)
            plan.add(stored, planned)
        position = _aligned(position + _size(shape, kinds[name]))
    plan.files.append(FilePlan(path, position, tuple(around)))
    return plan


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _size(shape: tuple[int, ...], kind: str) -> int:
    numbers, size = BLOCKS[kind]
    return nbytes(shape, "I8") // numbers * size


def _stored(
    path: Path, name: str, shape: tuple[int, ...], kind: str, position: int
) -> StoredTensor:
    if kind in FLOATS:
        return StoredTensor(path, name, kind, shape, position)
    return BlockTensor(path, name, "F32", shape, position, kind)


def _header(
    file_name: str,
    config: LlamaConfig,
    form: GGUFForm,
    shapes: Mapping[str, tuple[int, ...]],
    kinds: Mapping[str, str],
) -> bytes:
    """Return all that stands before the tensors."""
    import gguf

    matrices = [kind for name, kind in kinds.items() if len(shapes[name]) > 1]
    entries: dict[str, Any] = {
        "general.type": "model",
        "general.name": form.name,
        "general.file_type": _FILE_TYPES[max(matrices, key=matrices.count)],
        "general.quantization_version": 2,
        **dict(metadata(config, config.vocab_size)),
    }
    try:
        entries |= vocabulary_entries(form.tokenizer, config.vocab_size)
        entries |= template_entries(form.tokenizer)
    except DataError as error:
        raise UserError(f"the tokenizer has no place in a GGUF file: {error}") from error
    with tempfile.TemporaryDirectory() as place:
        writer = gguf.GGUFWriter(Path(place) / file_name, ARCHITECTURE)
        adders = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        adders |= {float: writer.add_float32, list: writer.add_array}
        for key, value in entries.items():
            adders[type(value)](key, value)
        for name, shape in shapes.items():
            raw_dtype = gguf.GGMLQuantizationType[kinds[name]]
            size = _size(shape, kinds[name])
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return (Path(place) / file_name).read_bytes()
