"""The one key/value cache: blocks shared by dygraph generation and exported programs."""

from typing import Any

import numpy as np
import paddle

from common.errors import UserError
from external_ops.paged_attention import stored_dim
from llm.llama.config import LlamaConfig
from llm.llama.seams import CacheLayout
from llm.parallel.layout import divisors, nearest

AUTO = "auto"
DEFAULT_BLOCK_SIZE = 16


def choose_cache_dtype(layout: CacheLayout, wanted: str, network: str) -> str:
    """Return the type of a cache.

    Args:
        layout: of its blocks.
        wanted: a type, or ``auto`` for that of the network.
        network: the type of the network.

    Raises:
        UserError: another type than the network's, where what reads the cache has no form for it.
    """
    if wanted in (AUTO, network):
        return network
    if layout.own_type:
        raise UserError(
            f"cache_dtype={wanted} is for CPUs and for the reference ops: on GPUs, Paddle's kernel "
            f"of decoder layers reads a cache in the network's type, {network}; leave the flag "
            "out, or give --ops decoder=reference"
        )
    return wanted


def choose_block_size(layout: CacheLayout, wanted: int | None, prefix: int) -> int:
    """Return the size nearest to the wanted one, the layout's best where that is None.

    Args:
        layout: of the blocks.
        wanted: tokens per block.
        prefix: tokens that have to fill whole blocks.
    """
    sizes = list(layout.block_sizes) or (divisors(prefix) if prefix else [])
    fitting = [size for size in sizes if prefix % size == 0]
    if wanted is None and layout.block_sizes:
        return fitting[0]
    wanted = wanted or DEFAULT_BLOCK_SIZE
    return nearest(wanted, fitting) if fitting else wanted


def cache_shape(
    config: LlamaConfig, num_blocks: int | None, block_size: int, dtype: str
) -> list[int | None]:
    """Return ``[blocks, block, G, D]``, the shape of one layer's keys and of its values.

    In int8 the last axis is longer (:mod:`external_ops.paged_attention`).
    """
    numbers = stored_dim(config.head_dim, dtype)
    return [num_blocks, block_size, config.num_key_value_heads, numbers]


def block_bytes(config: LlamaConfig, block_size: int, dtype: str) -> int:
    """Return the memory that one block takes in all layers, keys and values together."""
    _, block, heads, numbers = cache_shape(config, 1, block_size, dtype)
    size = {"float32": 4, "int8": 1}.get(dtype, 2)
    return 2 * config.num_hidden_layers * block * heads * numbers * size


def new_caches(
    config: LlamaConfig,
    num_blocks: int,
    block_size: int,
    dtype: str,
    parts: int = 1,
    layout: CacheLayout | None = None,
) -> list[Any]:
    """Return zeroed key and value blocks of each layer in turn, two tensors per layer.

    ``parts`` is the number of processes that share the heads.
    """
    blocks, block, heads, dim = cache_shape(config, num_blocks, block_size, dtype)
    shape = [blocks, block, heads // parts, dim]
    if layout is not None and layout.heads_first:
        shape[1:3] = shape[2], shape[1]
    return [paddle.zeros(shape, dtype=dtype) for _ in range(2 * config.num_hidden_layers)]


class StepInputs:
    """Tensors that take a step's arrays, made once: refilling one costs a tenth of making it."""

    def __init__(self) -> None:
        self._tensors: list[Any] = []

    def fill(self, arrays: tuple[np.ndarray, ...]) -> list[Any]:
        """Return tensors with these contents, overwritten by the next call."""
        if not self._tensors:
            self._tensors = [paddle.to_tensor(array) for array in arrays]
            self._place = paddle.framework._current_expected_place()
        else:
            for tensor, array in zip(self._tensors, arrays, strict=True):
                tensor.get_tensor().set(array, self._place)
        return self._tensors
