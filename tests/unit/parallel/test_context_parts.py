"""How rows and batches are cut over context ranks, and what is refused."""

from dataclasses import replace

import numpy as np
import paddle
import pytest

from common.errors import UserError
from llm.parallel.context import check_heads, cut, part
from llm.parallel.layout import Layout
from llm.parallel.topology import Topology


def runs(ranks, kind):
    layout = Layout(context=ranks, context_kind=kind)
    return [Topology(layout, rank) for rank in range(ranks)]


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_parts_make_up_the_row(ranks, kind):
    parts = [part(24, rank, ranks, kind) for rank in range(ranks)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(24))
    assert {len(held) for held in parts} == {24 // ranks}
    assert all((np.diff(held) > 0).all() for held in parts)


def test_ring_parts_cost_the_same():
    """Keys that a rank's queries see, a position at a time."""
    work = {sum(held + 1) for held in (part(32, rank, 4, "ring") for rank in range(4))}
    assert len(work) == 1
    assert len({sum(part(32, rank, 4, "ulysses") + 1) for rank in range(4)}) == 4


@pytest.mark.parametrize("tensors", [False, True], ids=["arrays", "tensors"])
def test_batches_are_cut_by_columns(tensors):
    whole = {
        "input_ids": np.arange(16).reshape(2, 8),
        "labels": 100 + np.arange(16).reshape(2, 8),
        "reference_logps": np.zeros(2),
    }
    if tensors:
        whole = {name: paddle.to_tensor(value) for name, value in whole.items()}
    batch = cut(whole, runs(2, "ring")[1])
    assert {type(value) for value in batch.values()} == {type(whole["labels"])}
    assert np.asarray(batch["input_ids"]).tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert np.asarray(batch["labels"])[0].tolist() == [102, 103, 104, 105]
    assert np.asarray(batch["positions"]).tolist() == [[2, 3, 4, 5]] * 2
    assert batch["reference_logps"].shape == whole["reference_logps"].shape
    assert "positions" not in whole


def test_positions_of_packed_rows_are_kept():
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 4]])
    batch = {"input_ids": positions + 7, "positions": positions, "segments": positions * 0}
    found = [cut(batch, run)["positions"].tolist() for run in runs(2, "ulysses")]
    assert found == [[[0, 1, 2, 0]], [[1, 2, 3, 4]]]


def test_one_rank_has_everything():
    batch = {"input_ids": np.arange(7).reshape(1, 7)}
    assert cut(batch, replace(runs(2, "ring")[0], layout=Layout())) is batch


@pytest.mark.parametrize(
    ("length", "ranks", "kind", "message"),
    [
        (10, 4, "ulysses", "a multiple of 4; pad them to 12"),
        (12, 4, "ring", "a multiple of 8; pad them to 16"),
    ],
)
def test_rows_that_do_not_split_are_refused(length, ranks, kind, message):
    with pytest.raises(UserError, match=message):
        part(length, 0, ranks, kind)


@pytest.mark.parametrize(("heads", "groups", "ranks"), [(6, 2, 4), (12, 3, 2), (4, 4, 8)])
def test_heads_that_do_not_split_are_refused(heads, groups, ranks):
    with pytest.raises(UserError, match="use --context_parallel_kind ring"):
        check_heads(heads, groups, ranks)


@pytest.mark.parametrize(("heads", "groups", "ranks"), [(8, 2, 4), (8, 1, 2), (8, 8, 2)])
def test_heads_that_split_or_are_repeated(heads, groups, ranks):
    check_heads(heads, groups, ranks)
