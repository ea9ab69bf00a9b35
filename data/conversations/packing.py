"""Several examples in a row, and rows in a batch."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError, check_integer

Sample = dict[str, NDArray[np.int64]]

IGNORED = -100


class Samples(Protocol):
    """What can be packed: samples with known lengths."""

    lengths: NDArray[np.int64]
    label_counts: NDArray[np.int64]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def best_fit(lengths: Sequence[int] | NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Rows of indices whose lengths sum to at most `capacity`, by best-fit decreasing.

    The longest example comes first; each goes to the row with the least room that still holds it.
    At most 11/9 of the rows of a perfect packing, plus one (Johnson, 1974). The result depends
    on the lengths alone: equal lengths are taken by index, indices rise in a row, and rows are
    in the order of their first index.

    Raises:
        DataError: a length above the capacity or below 1.
    """
    sizes = np.asarray(lengths, np.int64)
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    # Bit r says that some row has room for r more; the lowest bit from `size` on is the best fit.
    rooms = 0
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        if not 1 <= size <= capacity:
            raise DataError(f"example {index} has {size} tokens; a row holds 1 to {capacity}")
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room = capacity
            row = len(rows)
            rows.append([])
        rows[row].append(index)
        left = room - size
        with_room.setdefault(left, []).append(row)
        rooms |= 1 << left
    return sorted(sorted(row) for row in rows)


class PackedDataset:
    """Rows of several examples, none of which sees another.

    `dataset[i]` holds "input_ids" and "labels" as the examples' own, laid end to end, and
    "positions", which restart at 0 with each example, and "segments", the number of the
    example in the row: attention is to stay within a segment. All int64 [S], S <= max_length.

    The rows are made once, by `best_fit`, and are the same in every pass over the data; the
    order in which they come is the caller's (`Passes`).

    Attributes:
        rows: the examples of each row.
        lengths, label_counts: of each row, int64 [rows].
    """

    def __init__(self, dataset: Samples, max_length: int) -> None:
        check_integer("max_length", max_length, least=1)
        self.dataset = dataset
        self.max_length = max_length
        lengths = np.asarray(dataset.lengths)
        long = np.flatnonzero(lengths > max_length)
        if len(long):
            worst = int(lengths.argmax())
            raise DataError(
                f"{len(long)} of {len(lengths)} examples do not fit into a row of {max_length} "
                f"tokens (max_length); the longest has {lengths[worst]} (example {worst}). Raise "
                "max_length, or lower src_length and tgt_length"
            )
        self.rows = best_fit(lengths, max_length)
        counts = np.asarray(dataset.label_counts)
        self.lengths: NDArray[np.int64] = np.array([lengths[row].sum() for row in self.rows])
        self.label_counts: NDArray[np.int64] = np.array([counts[row].sum() for row in self.rows])

    @property
    def fill(self) -> float:
        """Share of the rows' places that hold a token, 0 to 1."""
        return float(self.lengths.sum() / (len(self.rows) * self.max_length))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        samples = [self.dataset[item] for item in self.rows[index]]
        sizes = [len(sample["input_ids"]) for sample in samples]
        return {
            "input_ids": np.concatenate([sample["input_ids"] for sample in samples]),
            "labels": np.concatenate([sample["labels"] for sample in samples]),
            "positions": np.concatenate([np.arange(size, dtype=np.int64) for size in sizes]),
            "segments": np.repeat(np.arange(len(sizes), dtype=np.int64), sizes),
        }


def collate(
    samples: Sequence[Sample], *, pad_id: int = 0, multiple_of: int = 8
) -> dict[str, NDArray[np.int64]]:
    """A batch [B, S] of samples, padded on the right; S is a multiple of `multiple_of`.

    Padding has the id `pad_id` and the label -100. "positions" and "segments" are there when any
    sample has them; padding is then a segment of its own, with positions from 0.

    Raises:
        DataError: no samples, or arrays of a sample that differ in length.
    """
    check_integer("multiple_of", multiple_of, least=1)
    if not samples:
        raise DataError("there are no samples to collate")
    lengths = [len(sample["input_ids"]) for sample in samples]
    width = -(-max(*lengths, 1) // multiple_of) * multiple_of
    fills = {"input_ids": pad_id, "labels": IGNORED}
    packed = any("segments" in sample for sample in samples)
    keys = ["input_ids", "labels", *(["positions", "segments"] if packed else [])]
    batch = {key: np.full((len(samples), width), fills.get(key, 0), np.int64) for key in keys}
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        for key in keys:
            values = sample[key] if key in sample else _alone(key, length)
            if len(values) != length:
                raise DataError(f"{key!r} has {len(values)} entries, 'input_ids' has {length}")
            batch[key][row, :length] = values
        if packed:
            last = batch["segments"][row, :length]
            batch["segments"][row, length:] = int(last.max(initial=-1)) + 1
            batch["positions"][row, length:] = np.arange(width - length)
    return batch


def _alone(key: str, length: int) -> NDArray[Any]:
    """Positions or segments of a sample that is one document."""
    if key == "segments":
        return np.zeros(length, np.int64)
    return np.arange(length, dtype=np.int64)
