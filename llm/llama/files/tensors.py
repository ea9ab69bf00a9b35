"""Complete tensors of Hugging Face's names and shapes, wherever their pieces lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from llm.llama.config import LlamaConfig
from llm.llama.files.dtypes import FLOATS, native, nbytes, widen
from llm.llama.files.rank_layout import ArrayPlan, extent, tensor_shapes
from llm.llama.files.safetensors import StoredTensor
from llm.llama.files.spare import same


@dataclass(frozen=True)
class Block:
    """A rectangle of a tensor, and the stored array that holds it from row ``top`` on.

    In an array that is not transposed, its rows may stand ``step`` behind each other.
    """

    array: StoredTensor
    transposed: bool
    rows: range
    cols: range
    top: int = 0
    step: int = 1

    def view(self, values: np.ndarray, rows: range, cols: range, first: int = 0) -> np.ndarray:
        """Return part of the block, oriented as Hugging Face does.

        Args:
            values: the array's rows from ``first`` on, as stored, two-dimensional.
            rows: of the tensor, within the block's.
            cols: likewise.
            first: row of the stored array with which ``values`` starts.
        """
        right = -self.cols.start
        if self.transposed:
            down, right = self.top - self.rows.start, right - first
            rows = range(rows.start + down, rows.stop + down)
            return values.T[rows.start : rows.stop, cols.start + right : cols.stop + right]
        start = self.top - first + (rows.start - self.rows.start) * self.step
        stop = start + (len(rows) - 1) * self.step + 1
        return values[start : stop : self.step, cols.start + right : cols.stop + right]

    def rows_within(self, first: int, count: int) -> range:
        """Return the rows of the tensor that lie in ``count`` rows of the array from one on."""
        start, stop = (-((self.top - at) // self.step) for at in (first, first + count))
        within = range(self.rows.start + start, self.rows.start + stop)
        return range(max(self.rows.start, within.start), min(self.rows.stop, within.stop))


@dataclass(frozen=True)
class Tensor:
    """A complete tensor, wherever its pieces lie; nothing is read until :meth:`read`.

    Stands in for a ``StoredTensor`` where networks are filled.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    blocks: tuple[Block, ...]
    copies: tuple[tuple[StoredTensor, StoredTensor], ...] = ()  # an array of a block, and its like

    @property
    def file(self) -> Path:
        """The file that holds the first piece."""
        return self.blocks[0].array.file

    @property
    def arrays(self) -> list[StoredTensor]:
        """The stored arrays, each once."""
        return list(dict.fromkeys(block.array for block in self.blocks))

    def read(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Assemble the tensor; bfloat16 widens to float32, others keep their type.

        Args:
            part: a slice of each leading axis; the others' numbers are only in memory meanwhile.
        """
        return widen(self.bits(part), self.dtype)

    def bits(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Assemble the tensor's bytes as they are: bfloat16 is uint16."""
        whole = np.empty([len(side) for side in extent(self.shape)], native(self.dtype))
        stored = {array: load(array, mapped=True) for array in self.arrays}
        for block in self.blocks:
            piece = block.view(stored[block.array], block.rows, block.cols)
            whole[block.rows.start : block.rows.stop, block.cols.start : block.cols.stop] = piece
        return whole.reshape(self.shape)[part]


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return a shape with a vector taken for one column."""
    return (shape[0], shape[1] if len(shape) > 1 else 1)


def load(array: StoredTensor, *, mapped: bool = False) -> np.ndarray:
    """Return an array's numbers as stored (bfloat16 as bits), two-dimensional.

    Raises:
        UserError: the file became shorter since it was examined.
    """
    shape = matrix_shape(array.shape)
    kind = native(array.dtype)
    if not array.verbatim:
        return array.bits().reshape(shape)
    if mapped and nbytes(array.shape, array.dtype):
        return np.memmap(array.file, kind, "r", array.offset, shape)
    count = shape[0] * shape[1]
    values = np.fromfile(array.file, kind, count, offset=array.offset)
    if len(values) < count:
        raise UserError(f"{array.file} changed while it was read: {array.name} is cut off")
    return values.reshape(shape)


def check_shape(stored: StoredTensor | Tensor, wanted: tuple[int, ...], of: str = "") -> None:
    """Refuse a tensor of another shape than a model asks for.

    Raises:
        UserError: names both, and what shares the model out (``of``).
    """
    if stored.shape != wanted:
        raise UserError(
            f"{stored.file}: {stored.name} has shape {list(stored.shape)}, the config asks for "
            f"{list(wanted)}{of}"
        )


def put_together(
    config: LlamaConfig,
    plans: Sequence[Mapping[str, ArrayPlan]],
    arrays: Sequence[Mapping[str, StoredTensor]],
    of: str = "",
) -> dict[str, Tensor]:
    """Return the complete tensors that stored arrays make.

    Args:
        config: of the model.
        plans: what each array of each rank holds.
        arrays: the arrays, by rank and name.
        of: what the ranks are, for the message about a shape.

    Raises:
        UserError: an array of another shape than planned, pieces of several types, or a file that
            holds another rank's share.
    """
    shapes = tensor_shapes(config)
    blocks: dict[str, list[Block]] = {name: [] for name in shapes}
    copies: dict[str, list[tuple[StoredTensor, StoredTensor]]] = {name: [] for name in shapes}
    for plan, found in zip(plans, arrays, strict=True):
        for name, planned in plan.items():
            array = found[name]
            check_shape(array, planned.shape, of)
            for part in planned.parts:
                block = Block(
                    *(array, planned.transposed, part.rows, part.cols, part.top, part.step)
                )
                known = blocks[part.tensor]
                like = [b for b in known if (b.rows, b.cols) == (block.rows, block.cols)]
                if not like:
                    known.append(block)
                elif len(planned.parts) == 1:
                    copies[part.tensor].append((like[0].array, array))
    _check_shares(plans, arrays)
    return {
        name: Tensor(
            *(name, shape, _one_type(name, blocks[name])),
            *(tuple(blocks[name]), tuple(copies[name])),
        )
        for name, shape in shapes.items()
    }


def _check_shares(
    plans: Sequence[Mapping[str, ArrayPlan]], arrays: Sequence[Mapping[str, StoredTensor]]
) -> None:
    """Refuse a file that is a copy of another rank's: all that they share out is equal."""
    for rank, (plan, found) in enumerate(zip(plans, arrays, strict=True)):
        shares: dict[Path, list[str]] = {}
        for name, planned in plan.items():
            if planned.parts != plans[0][name].parts:
                shares.setdefault(found[name].file, []).append(name)
        for file, names in shares.items():
            for other in arrays[:rank]:
                if all(_equal(other[name], found[name]) for name in names):
                    raise UserError(
                        f"{file} holds the same numbers as {other[names[0]].file}, of which each "
                        "has to hold a share: one is a copy of the other; fetch them again"
                    )


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two arrays hold equal numbers; a row tells of most that they do not."""
    row = (slice(0, 1),)
    return np.array_equal(one.read(row), other.read(row)) and same(one, other)


def _one_type(name: str, blocks: list[Block]) -> str:
    types = {block.array.dtype for block in blocks}
    if len(types) > 1 or not types <= set(FLOATS):
        raise UserError(
            f"{blocks[0].array.file}: {name} mixes the types {', '.join(sorted(types))}"
        )
    return types.pop()
