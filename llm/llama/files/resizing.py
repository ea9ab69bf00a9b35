"""A checkpoint with more rows for tokens: those that were added to its tokenizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from common.errors import UserError
from llm.llama.files.checkpoint import Checkpoint
from llm.llama.files.dtypes import cast, widen
from llm.llama.files.rank_layout import EMBEDDING, HEAD, extent
from llm.llama.files.safetensors import StoredTensor
from llm.llama.files.tensors import Block, Tensor, load

# Rows that are added up at a time.
_SLAB = 4096


@contextmanager
def resized(source: Checkpoint, vocab_size: int) -> Iterator[Checkpoint]:
    """The checkpoint with `vocab_size` rows in its embedding and its head.

    New rows are the mean of the old ones, as in transformers' `resize_token_embeddings`, there with
    noise: a token that nobody has trained is then as likely as an average one.

    Args:
        source: from :func:`llm.llama.files.checkpoint.open_checkpoint`.
        vocab_size: ids of the tokenizer.

    Raises:
        UserError: fewer rows than there are.
    """
    new = vocab_size - source.config.vocab_size
    if new < 0:
        raise UserError(
            f"vocab_size={vocab_size} would drop rows of {source.directory}, which has "
            f"{source.config.vocab_size}: give that or more"
        )
    if new == 0:
        yield source
        return
    with TemporaryDirectory() as directory:
        tensors = {
            name: _grown(tensor, new, Path(directory) / name)
            if name in (EMBEDDING, HEAD)
            else tensor
            for name, tensor in source.tensors.items()
        }
        config = source.config.replace(vocab_size=vocab_size)
        raw = {**source.raw, "vocab_size": vocab_size}
        yield replace(source, config=config, raw=raw, tensors=tensors)


def _grown(tensor: Tensor, new: int, path: Path) -> Tensor:
    """A matrix with `new` more rows, which lie in a file of their own."""
    rows, width = tensor.shape
    total = np.zeros(width, np.float64)
    for block in tensor.blocks:
        values = load(block.array, mapped=True)
        piece = block.view(values, block.rows, block.cols)
        for first in range(0, len(piece), _SLAB):
            slab = widen(np.ascontiguousarray(piece[first : first + _SLAB]), tensor.dtype)
            total[block.cols.start : block.cols.stop] += slab.sum(axis=0, dtype=np.float64)
    mean = cast((total / rows).astype(np.float32), "F32", tensor.dtype)
    path.write_bytes(np.tile(mean, (new, 1)).tobytes())
    array = StoredTensor(path, tensor.name, tensor.dtype, (new, width), 0)
    _, cols = extent((new, width))
    block = Block(array, False, range(rows, rows + new), cols)
    return replace(tensor, shape=(rows + new, width), blocks=(*tensor.blocks, block))
