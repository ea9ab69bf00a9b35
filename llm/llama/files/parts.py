"""Safetensors files that several processes write together, each its own.

While a save goes on, files have hidden names. Once all processes are through, rank 0 counts the
files, gives them their names and writes the index; so nobody has to know beforehand how many there
will be. In one process the same steps make what Hugging Face's libraries write.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.files import Work
from llm.llama.files.dtypes import TYPES, nbytes
from llm.llama.files.safetensors import StoredTensor, TensorFile, read_header
from llm.parallel.pieces import assign, stage_ranks
from llm.parallel.topology import Topology, single

_SHOW_FROM = 400_000_000  # bytes that take seconds


@dataclass(frozen=True)
class Part:
    """One tensor to be written.

    Args:
        name: in the file.
        shape: in the file.
        dtype: the header's name of the type.
        fetch: returns the complete tensor to the rank that is its argument, None to others; all
            ranks that hold a piece call it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    fetch: Callable[[int], np.ndarray | None]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return nbytes(self.shape, self.dtype)


def quiet(parts: Iterable[Any]) -> bool | None:
    """Show a bar for models that take seconds, and then only on a terminal."""
    return None if sum(part.nbytes for part in parts) > _SHOW_FROM else True


def _shards(parts: Sequence[Part], max_bytes: int) -> Iterator[list[Part]]:
    """Cut tensors into files of at most ``max_bytes``, or of one tensor."""
    shard: list[Part] = []
    size = 0
    for part in parts:
        if shard and size + part.nbytes > max_bytes:
            yield _wide_first(shard)
            shard, size = [], 0
        shard.append(part)
        size += part.nbytes
    if shard:
        yield _wide_first(shard)


def _wide_first(parts: Sequence[Part]) -> list[Part]:
    """Order as the reference implementation does, so that every tensor is aligned."""
    return sorted(parts, key=lambda part: -nbytes((1,), part.dtype))


class PartFiles:
    """The files of one name that the processes of a save write.

    All processes make one together.

    Args:
        directory: where; created when absent.
        stem: of the names, such as ``model``.
        topology: this process.
        work: does everything that touches the disk.
        max_bytes: a new file starts beyond this size.
    """

    def __init__(
        self, directory: Path, stem: str, topology: Topology, work: Work, max_bytes: int
    ) -> None:
        self.directory, self.stem, self.topology = directory, stem, topology
        self.work, self.max_bytes = work, max_bytes
        # Files that a killed save left in the same place have another number.
        self._save = topology.gather_objects(os.getpid())[0]
        work.do(partial(directory.mkdir, parents=True, exist_ok=True))

    def write(self, parts: Sequence[Part], ranks: Sequence[int] | None = None) -> None:
        """Write what is this process's to write; called by all who hold pieces.

        Args:
            parts: in an order that is the same in all of those processes.
            ranks: who share the writing; the processes of this stage when not given.
        """
        layout, rank = self.topology.layout, self.topology.rank
        ranks = stage_ranks(layout, self.topology.at.pipeline) if ranks is None else ranks
        writers = assign({part.name: part.nbytes for part in parts}, ranks)
        if layout.world_size > 1:
            parts = _wide_first(parts)  # all come together in the order of the files
        cut = list(_shards([part for part in parts if writers[part.name] == rank], self.max_bytes))
        if layout.world_size == 1:
            parts = [part for shard in cut for part in shard]
        file_of: dict[str, TensorFile] = {}
        for index, shard in enumerate(cut):
            file = self._file(index, shard)
            file_of |= {part.name: file for part in shard}
        hidden = True if rank else quiet(parts)
        for part in tqdm(parts, "saving", disable=hidden, leave=False):
            data = part.fetch(writers[part.name])
            if data is not None:
                self.work.do(partial(file_of[part.name].add, part.name, data))

    def _file(self, index: int, shard: list[Part]) -> TensorFile:
        path = self._path(f"{self.topology.rank:05}-{index:05}")
        types = {part.name: part.dtype for part in shard}
        return TensorFile(path, {part.name: part.shape for part in shard}, types)

    def _path(self, number: str) -> Path:
        return self.directory / f".{self.stem}.{self._save}-{number}.part"

    def named(self) -> dict[Path, str]:
        """Return the files of all processes with the names that they are to have."""
        found = sorted(self.directory.glob(self._path("*").name))
        if len(found) == 1:
            return {found[0]: f"{self.stem}.safetensors"}
        total = len(found)
        return {
            file: f"{self.stem}-{number:05}-of-{total:05}.safetensors"
            for number, file in enumerate(found, start=1)
        }

    def take_names(self) -> None:
        """Give the files of all processes their names."""
        for file, name in self.named().items():
            file.replace(self.directory / name)

    def tensors(self) -> dict[str, StoredTensor]:
        """Return every tensor that the processes wrote."""
        found: dict[str, StoredTensor] = {}
        for file in self.named():
            found |= read_header(file, TYPES)
        return found

    def remove(self) -> None:
        """Remove the files of all processes that have no name yet."""
        for file in self.named():
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def saving(
    directory: str | Path,
    stem: str,
    topology: Topology | None,
    work: Work | None,
    max_bytes: int = 5 * 10**9,
) -> Iterator[PartFiles]:
    """Yield files to write; without an owner of the work, it is settled at the end.

    Args:
        directory, stem, topology, max_bytes: those of :class:`PartFiles`; without a topology the
            job has one process.
        work: of a larger save, whose owner finishes it.

    Raises:
        OSError, ValueError: the first that any process met, the same in all of them.
    """
    topology = topology or single()
    cleanup = contextlib.ExitStack()
    with cleanup, settled(topology, work) as done_by:
        files = PartFiles(Path(directory), stem, topology, done_by, max_bytes)
        if work is None and topology.rank == 0:
            cleanup.callback(files.remove)  # finds nothing after a save that succeeded
        yield files


@contextlib.contextmanager
def settled(topology: Topology, work: Work | None) -> Iterator[Work]:
    """Yield the work of a larger save, or work of its own that is settled at the end.

    Raises:
        OSError, ValueError: the first that any process met, the same in all of them.
    """
    if work is not None:
        yield work
        return
    work = Work()
    yield work
    failed = _first(topology.gather_objects(work.error))
    if failed is None:
        if topology.rank == 0:
            work.conclude()
        failed = _first(topology.gather_objects(work.error))
    if failed is not None:
        raise failed


def _first(errors: list[Exception | None]) -> Exception | None:
    return next((error for error in errors if error is not None), None)
