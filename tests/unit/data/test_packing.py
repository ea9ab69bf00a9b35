"""Packing against brute force, and batches against their definition."""

import itertools
import math

import numpy as np
import pytest

from common.errors import DataError
from data.conversations.packing import IGNORED, PackedDataset, best_fit, collate


def fewest_rows(lengths: list[int], capacity: int) -> int:
    """The number of rows of a perfect packing, by trying every assignment that can differ."""
    best = len(lengths)

    def place(index: int, rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if index == len(lengths):
            best = len(rooms)
            return
        for row, room in enumerate(rooms):
            # Rows with equal room are the same choice.
            if room >= lengths[index] and room not in rooms[:row]:
                place(index + 1, [*rooms[:row], room - lengths[index], *rooms[row + 1 :]])
        place(index + 1, [*rooms, capacity - lengths[index]])

    place(0, [])
    return best


def slow_best_fit(lengths: list[int], capacity: int) -> int:
    """Best-fit decreasing by looking at every row; returns the number of rows."""
    rooms: list[int] = []
    for size in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - size)
        else:
            rooms.append(capacity - size)
    return len(rooms)


def test_rows_hold_every_example_once_and_are_few() -> None:
    random = np.random.default_rng(0)
    for _ in range(60):
        capacity = int(random.integers(5, 25))
        lengths = random.integers(1, capacity + 1, int(random.integers(1, 10))).tolist()
        rows = best_fit(lengths, capacity)
        assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
        optimum = fewest_rows(lengths, capacity)
        assert optimum <= len(rows) <= 11 / 9 * optimum + 1
        assert len(rows) == slow_best_fit(lengths, capacity)
        assert rows == best_fit(lengths, capacity)
        assert all(row == sorted(row) for row in rows) and rows == sorted(rows)


def test_many_examples() -> None:
    random = np.random.default_rng(1)
    lengths = np.minimum(random.lognormal(4.5, 0.8, 5000).astype(np.int64) + 2, 1000)
    rows = best_fit(lengths, 2048)
    assert len(rows) == slow_best_fit(lengths.tolist(), 2048)
    assert len(rows) <= 1.005 * math.ceil(lengths.sum() / 2048)
    with pytest.raises(DataError, match="example 1 has 9 tokens; a row holds 1 to 8"):
        best_fit([3, 9], 8)
    with pytest.raises(DataError, match="example 0 has 0 tokens; a row holds 1 to 8"):
        best_fit([0], 8)


class Documents:
    """Documents of the given lengths; token 100 * document + place, of which every third counts."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, np.int64)
        self.label_counts = np.array(
            [(self[i]["labels"] != IGNORED).sum() for i in range(len(self))]
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        ids = 100 * index + np.arange(self.lengths[index])
        return {"input_ids": ids, "labels": np.where(ids % 3 == 0, ids + 1, IGNORED)}


def test_packed_rows() -> None:
    documents = Documents([3, 8, 5, 2, 7, 1, 6])
    packed = PackedDataset(documents, 10)
    assert len(packed) == 4 and packed.fill == 32 / 40
    seen = []
    for number in range(len(packed)):
        row = packed[number]
        assert {array.dtype for array in row.values()} == {np.dtype(np.int64)}
        assert len(row["input_ids"]) == packed.lengths[number] <= 10
        assert (row["labels"] != IGNORED).sum() == packed.label_counts[number]
        # Segment by segment, the documents come out again as they went in.
        for segment in range(row["segments"].max() + 1):
            at = np.flatnonzero(row["segments"] == segment)
            assert (np.diff(at) == 1).all()
            document = packed.rows[number][segment]
            seen.append(document)
            for key, values in documents[document].items():
                assert row[key][at].tolist() == values.tolist()
            assert row["positions"][at].tolist() == list(range(len(at)))
    assert sorted(seen) == list(range(7))
    assert packed.label_counts.sum() == documents.label_counts.sum()


def test_collate_pads_on_the_right() -> None:
    documents = Documents([3, 8])
    batch = collate([documents[0], documents[1]], pad_id=9, multiple_of=5)
    assert list(batch) == ["input_ids", "labels"]
    assert batch["input_ids"].tolist() == [[0, 1, 2, *[9] * 7], [*range(100, 108), 9, 9]]
    assert batch["labels"][0].tolist() == [1, *[IGNORED] * 9]
    assert (batch["labels"][1, 8:] == IGNORED).all()
    assert collate([documents[1]])["input_ids"].shape == (1, 8)
    assert collate([documents[0]], multiple_of=1)["input_ids"].shape == (1, 3)


def test_padding_of_packed_rows_is_a_segment_of_its_own() -> None:
    documents = Documents([3, 4, 2])
    packed = PackedDataset(documents, 7)
    row = packed[0]
    batch = collate([row, documents[2]], pad_id=9, multiple_of=8)
    assert batch["segments"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, *[1] * 6]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert batch["labels"][1].tolist() == [*documents[2]["labels"].tolist(), *[IGNORED] * 6]
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}
