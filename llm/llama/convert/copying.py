"""Moves the numbers of a checkpoint into the files of a plan.

The unit of work is a set of tensors that share stored arrays: their source is read in one go, and
every target is put together in slabs of a few megabytes. Threads do several at a time as long as
what they hold stays within twice the largest.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llm.llama.convert.casting import native, transfer
from llm.llama.convert.checkpoints import Block, Tensor, load, matrix_shape
from llm.llama.convert.planning import Plan
from llm.llama.safetensors_io import StoredTensor, nbytes

_SLAB = 16 << 20  # bytes
_ROOM = 256 << 20  # small tensors may be many at a time


@dataclass
class _Job:
    tensors: list[Tensor] = field(default_factory=list)
    targets: dict[StoredTensor, list[tuple[str, Block]]] = field(default_factory=dict)

    @property
    def sources(self) -> list[StoredTensor]:
        return list(dict.fromkeys(array for tensor in self.tensors for array in tensor.arrays))

    @property
    def size(self) -> int:
        return sum(_size(array) for array in self.sources)


def _size(array: StoredTensor) -> int:
    return nbytes(array.shape, array.dtype)


class _Budget:
    """Lets threads hold bytes up to a limit; whoever needs more than all of it goes alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + size <= self._limit)
            self._held += size
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()


def copy(tensors: Mapping[str, Tensor], plan: Plan, threads: int, said: str) -> list[str]:
    """Fill the files of a plan; they are on the disk when this returns.

    Args:
        tensors: the source, by name.
        plan: the files to make, in a directory that exists.
        threads: how many read and write at a time.
        said: the progress bar's title.

    Returns:
        Names of tensors of which ranks hold copies that differ; the first rank's was taken.

    Raises:
        UserError: a number beyond the target's type, or a source that changes meanwhile.
        OSError: a full or unwritable disk.
    """
    jobs = _jobs(tensors, plan)
    budget = _Budget(max(2 * max(job.size for job in jobs), _ROOM))
    differing: list[str] = []
    with contextlib.ExitStack() as stack:
        files = {file.path: _create(file.path, file.size, stack) for file in plan.files}
        for file in plan.files:
            for offset, content in file.around:
                _write(files[file.path], content, offset)

        def work(job: _Job) -> int:
            with budget.hold(job.size):
                differing.extend(_run(job, lambda path: files[path]))
            return job.size

        pool = stack.enter_context(ThreadPoolExecutor(threads))
        total = sum(job.size for job in jobs)
        bar = tqdm(total=total, desc=said, unit="B", unit_scale=True, disable=None, leave=False)
        stack.enter_context(bar)
        try:
            for done in as_completed([pool.submit(work, job) for job in jobs]):
                bar.update(done.result())
            list(pool.map(os.fsync, files.values()))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return sorted(differing)


def _create(path: Path, size: int, stack: contextlib.ExitStack) -> int:
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    stack.callback(os.close, number)
    if size:
        os.posix_fallocate(number, 0, size)  # a full disk shows now
    return number


def _write(number: int, content: bytes | memoryview, offset: int) -> None:
    view = memoryview(content).cast("B")
    while view:
        written = os.pwrite(number, view, offset)
        view, offset = view[written:], offset + written


def _jobs(tensors: Mapping[str, Tensor], plan: Plan) -> list[_Job]:
    """Group tensors that share an array of the source or of the plan."""
    job_of: dict[str, _Job] = {name: _Job([tensor]) for name, tensor in tensors.items()}

    def join(names: list[str]) -> None:
        first = job_of[names[0]]
        for name in names[1:]:
            other = job_of[name]
            if other is not first:
                first.tensors += other.tensors
                first.targets |= other.targets
                job_of.update(dict.fromkeys((t.name for t in other.tensors), first))

    sharing: dict[StoredTensor, list[str]] = {}
    for tensor in tensors.values():
        for array in tensor.arrays:
            sharing.setdefault(array, []).append(tensor.name)
    for names in sharing.values():
        join(names)
    for array, parts in plan.blocks.items():
        join([name for name, _ in parts])
        job_of[parts[0][0]].targets[array] = parts
    return list({id(job): job for job in job_of.values()}.values())


def _run(job: _Job, file_of: Callable[[Path], int]) -> list[str]:
    """Do one job; return the names of tensors whose copies differ."""
    loaded = {array: load(array) for array in job.sources}
    tensors = {tensor.name: tensor for tensor in job.tensors}
    for target, parts in job.targets.items():
        height, width = matrix_shape(target.shape)
        step = max(1, _SLAB // max(1, width * native(target.dtype).itemsize))
        for first in range(0, height, step):
            slab = np.empty((min(step, height - first), width), native(target.dtype))
            for name, block in parts:
                _fill(slab, first, block, tensors[name], loaded)
            offset = target.offset + first * width * slab.itemsize
            _write(file_of(target.file), slab.data, offset)
    return [
        tensor.name
        for tensor in job.tensors
        if any(not _same(loaded[array], copy) for array, copy in tensor.copies)
    ]


def _same(values: np.ndarray, copy: StoredTensor) -> bool:
    bits = f"u{values.itemsize}"
    return np.array_equal(values.view(bits), load(copy, mapped=True).view(bits))


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _fill(
    slab: np.ndarray,
    first: int,
    block: Block,
    tensor: Tensor,
    loaded: Mapping[StoredTensor, np.ndarray],
) -> None:
    """Fill in what a slab, which starts at a row of the target, holds of a tensor."""
    rows, cols = block.rows, block.cols
    if block.transposed:
        start = cols.start + first
        cols = _common(cols, range(start, start + len(slab)))
    else:
        start = rows.start + first - block.top
        rows = _common(rows, range(start, start + len(slab)))
    for source in tensor.blocks:
        height, width = _common(rows, source.rows), _common(cols, source.cols)
        if height and width:
            transfer(
                block.view(slab, height, width, first),
                source.view(loaded[source.array], height, width),
                (source.array.dtype, block.array.dtype),
            )
