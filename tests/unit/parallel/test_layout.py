"""Which process is where, and what a stage holds."""

import random
from itertools import product

import pytest

from llm.parallel.layout import Coordinates, Layout, divisors, largest_first, nearest

LAYOUT = Layout(tensor=2, pipeline=3, data=2, sharding=2, sharding_stage=1, context=2)


def test_every_rank_has_its_own_place_and_tensor_ranks_are_neighbours():
    places = [LAYOUT.coordinates(rank) for rank in range(LAYOUT.world_size)]
    assert len(set(places)) == LAYOUT.world_size == 48
    assert [LAYOUT.rank_of(at) for at in places] == list(range(48))
    assert places[1] == Coordinates(tensor=1)
    with pytest.raises(ValueError, match="rank 48 is not one of the 48"):
        LAYOUT.coordinates(48)


def test_the_order_of_axes_is_fleets():
    """Fleet counts ranks in the order dp, pp, sharding, sep, mp, the last fastest."""
    order = list(product(range(2), range(3), range(2), range(2), range(2)))
    assert [
        (at.data, at.pipeline, at.sharding, at.context, at.tensor)
        for at in map(LAYOUT.coordinates, range(48))
    ] == order


@pytest.mark.parametrize("axes", [("tensor",), ("pipeline",), ("data", "sharding")])
def test_groups_cut_the_job_into_equal_parts(axes):
    groups = LAYOUT.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(48))
    for group in groups:
        places = [LAYOUT.coordinates(rank) for rank in group]
        others = {tuple(v for k, v in vars(at).items() if k not in axes) for at in places}
        assert len(others) == 1


@pytest.mark.parametrize("layers", [3, 7, 12, 80])
@pytest.mark.parametrize("pipeline", [1, 2, 3])
def test_stages_hold_every_layer_once_and_evenly(layers, pipeline):
    stages = Layout(pipeline=pipeline).stages(layers)
    held = [index for stage in stages for chunk in stage.layers for index in chunk]
    assert sorted(held) == list(range(layers))
    sizes = [sum(map(len, stage.layers)) for stage in stages]
    assert max(sizes) - min(sizes) <= 1
    assert [stage.first for stage in stages].index(True) == 0 and stages[-1].last


def test_interleaved_stages_take_every_third_piece():
    stages = Layout(pipeline=3, virtual_pipeline=2).stages(12)
    assert stages[0].layers == (range(2), range(6, 8))
    assert stages[2].layers == (range(4, 6), range(10, 12))


def test_the_bubble_of_the_schedule():
    """4 stages, 8 micro-batches: 3 of 11 slots are idle; with 2 chunks 3 of 19."""
    assert Layout(pipeline=4).bubble(8) == pytest.approx(3 / 11)
    assert Layout(pipeline=4, virtual_pipeline=2).bubble(8) == pytest.approx(3 / 19)
    assert Layout().bubble(4) == 0


def test_nearest_is_by_ratio():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert nearest(5, divisors(12)) == 6
    assert nearest(3, [1, 2, 4]) == 4


@pytest.mark.parametrize("bins", [1, 3, 8])
@pytest.mark.parametrize("fixed", [{}, {"7": 0, "20": 2}])
def test_the_largest_go_first_to_who_has_least(bins, fixed):
    """By looking at every bin each time, as a reader would."""
    rng = random.Random(bins)
    sizes = {str(number): rng.choice([0, 1, 1, 5, 5, 40, 300]) for number in range(60)}
    fixed = {name: place % bins for name, place in fixed.items()}
    load, wanted = [0] * bins, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        wanted[name] = fixed.get(name, load.index(min(load)))
        load[wanted[name]] += sizes[name]
    assert largest_first(sizes, bins, fixed) == wanted
    assert list(largest_first(sizes, bins)) == list(sizes)
