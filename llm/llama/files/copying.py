"""Moves the numbers of a checkpoint into the files of a plan.

The unit of work is a set of tensors that share stored arrays: their source is read in one go, and
every target is put together in slabs of a few megabytes; arrays that stay as they are go from file
to file. Threads do several at a time as long as what they hold stays within twice the largest.
"""

import contextlib
import errno
import itertools
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from llm.llama.files.dtypes import native, nbytes, transfer
from llm.llama.files.finite import check_stored
from llm.llama.files.safetensors import StoredTensor
from llm.llama.files.target import Plan, Seal
from llm.llama.files.tensors import Block, Tensor, load, matrix_shape

_SLAB = 16 << 20  # bytes
_ROOM = 256 << 20  # small tensors may be many at a time
# File systems that cannot copy from file to file say one of these.
_UNABLE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


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

    @property
    def kept(self) -> dict[StoredTensor, StoredTensor]:
        """The targets that equal an array of the source byte by byte, and that array."""
        sources = {tensor.name: tensor.blocks for tensor in self.tensors}
        pairs = {
            target: (parts[0][1], sources[parts[0][0]][0])
            for target, parts in self.targets.items()
            if len(parts) == 1 == len(sources[parts[0][0]])
        }
        return {
            target: theirs.array
            for target, (mine, theirs) in pairs.items()
            if replace(mine, array=theirs.array) == theirs
            and _alike(target, theirs.array)
            and target.verbatim
            and theirs.array.verbatim
        }


def _size(array: StoredTensor) -> int:
    return nbytes(array.shape, array.dtype)


def _alike(one: StoredTensor, other: StoredTensor) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype)


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
        UserError: nan or inf, a number beyond the target's type, or a source that changes
            meanwhile.
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
            differing.extend(_run(job, budget, lambda path: files[path]))
            return job.size

        pool = stack.enter_context(ThreadPoolExecutor(threads))
        total = sum(job.size for job in jobs)
        bar = tqdm(total=total, desc=said, unit="B", unit_scale=True, disable=None, leave=False)
        stack.enter_context(bar)
        try:
            for done in as_completed([pool.submit(work, job) for job in jobs]):
                bar.update(done.result())
            list(pool.map(_seal, files.values(), [file.seals for file in plan.files]))
            list(pool.map(os.fsync, files.values()))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return sorted(differing)


def _create(path: Path, size: int, stack: contextlib.ExitStack) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)  # Megatron's files lie in directories
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


def _seal(number: int, seals: Sequence[Seal]) -> None:
    """Write the checksums of a file."""
    for seal in seals:
        code = 0
        for offset in range(seal.offset, seal.offset + seal.size, _SLAB):
            left = seal.offset + seal.size - offset
            code = zlib.crc32(os.pread(number, min(left, _SLAB), offset), code)
        for place in seal.places:
            _write(number, struct.pack("<I", code), place)


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


def _run(job: _Job, budget: _Budget, file_of: Callable[[Path], int]) -> list[str]:
    """Do one job; return the names of tensors whose copies differ."""
    kept = job.kept
    for array in job.sources:
        check_stored(array, load(array, mapped=True))
    for target, source in kept.items():
        _keep(source, file_of(target.file), target.offset)
    made = {target: parts for target, parts in job.targets.items() if target not in kept}
    if made:
        with budget.hold(job.size):
            _make(job, made, file_of)
    return [
        tensor.name for tensor in job.tensors if not all(itertools.starmap(_same, tensor.copies))
    ]


def _keep(source: StoredTensor, number: int, offset: int) -> None:
    """Copy an array as it is."""
    position, left = source.offset, _size(source)
    with source.file.open("rb") as stream:
        while left:
            try:
                done = os.copy_file_range(stream.fileno(), number, left, position, offset)
            except OSError as error:
                if error.errno not in _UNABLE:
                    raise
                content = os.pread(stream.fileno(), min(left, _SLAB), position)
                _write(number, content, offset)
                done = len(content)
            if not done:
                raise UserError(
                    f"{source.file} changed while it was read: {source.name} is cut off"
                )
            position, offset, left = position + done, offset + done, left - done


def _make(
    job: _Job,
    targets: Mapping[StoredTensor, list[tuple[str, Block]]],
    file_of: Callable[[Path], int],
) -> None:
    """Read the sources of a job, put its targets together and write them."""
    loaded = {array: load(array) for array in job.sources}
    tensors = {tensor.name: tensor for tensor in job.tensors}
    for target, parts in targets.items():
        height, width = matrix_shape(target.shape)
        step = max(1, _SLAB // max(1, width * native(target.dtype).itemsize))
        for first in range(0, height, step):
            slab = np.empty((min(step, height - first), width), native(target.dtype))
            for name, block in parts:
                _fill(slab, first, block, tensors[name], loaded)
            stored = target.packed(slab)
            offset = target.offset + first * (stored.nbytes // len(slab))
            _write(file_of(target.file), stored.data, offset)


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    values, like = load(one, mapped=True), load(other, mapped=True)
    bits = f"u{values.itemsize}"
    return np.array_equal(values.view(bits), like.view(bits))


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
        rows = block.rows_within(first, len(slab))
    for source in tensor.blocks:
        height, width = _common(rows, source.rows), _common(cols, source.cols)
        if height and width:
            transfer(
                block.view(slab, height, width, first),
                source.view(loaded[source.array], height, width),
                (source.array.dtype, block.array.dtype),
            )
