"""A stream of passes: each sample once a pass, every place known beforehand."""

import pickle

import numpy as np
import pytest

from data.order import Passes


class Numbers:
    """A dataset of n numbers."""

    def __init__(self, n: int) -> None:
        self.label_counts = np.arange(n, dtype=np.int64) * 10

    def __len__(self) -> int:
        return len(self.label_counts)

    def __getitem__(self, index: int) -> int:
        return index


def test_passes() -> None:
    stream = Passes(Numbers(7), 17, seed=3)
    taken = [stream[k] for k in range(17)]
    assert len(stream) == 17 and stream.epochs == 3
    assert sorted(taken[:7]) == sorted(taken[7:14]) == list(range(7))
    assert len(set(taken[14:])) == 3 and taken[:7] != taken[7:14]
    # Any place alone, in any order, in another process.
    again = pickle.loads(pickle.dumps(Passes(Numbers(7), 17, seed=3)))
    for k in (16, 2, 9, 0, 13, 7):
        assert again.index(k) == again[k] == taken[k]
    # A longer run begins the same way; another seed does not.
    assert [Passes(Numbers(7), 30, seed=3)[k] for k in range(17)] == taken
    assert [Passes(Numbers(7), 17, seed=4)[k] for k in range(17)] != taken
    counts = stream.label_counts(np.arange(16).reshape(2, 8))
    assert counts.tolist() == (10 * np.array(taken[:16]).reshape(2, 8)).tolist()
    for k in (-1, 17):
        with pytest.raises(IndexError):
            stream.index(k)
    starts = [Passes(Numbers(5), 5, seed)[0] for seed in range(200)]
    # No sample is a favourite: 40 of 200 each, five standard deviations are 28.
    assert all(abs(starts.count(n) - 40) < 28 for n in range(5))
