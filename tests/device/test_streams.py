"""Collectives of the rehearsal device, and what happens to those that nobody waits for."""

import pytest

JOBS = "tests.device.jobs_streams"


@pytest.mark.parametrize("role", ["gpu", "itself"])
def test_a_wait_that_was_forgotten_gives_wrong_numbers(device, role):
    assert device.call(role, f"{JOBS}:summed", True, ranks=2) == [[3, 3], [3, 3]]
    assert device.call(role, f"{JOBS}:summed", False, ranks=2) == [[1, 1], [2, 2]]


def test_tensors_that_are_gathered_apart_need_a_wait_too(device):
    assert device.call("gpu", f"{JOBS}:gathered", True, False, ranks=2) == [[1, 2], [1, 2]]
    for parts in device.call("gpu", f"{JOBS}:gathered", False, False, ranks=2):
        assert parts != [1, 2]


def test_a_copy_on_a_stream_of_its_own_needs_a_wait_too(device):
    waited, _ = device.call("gpu", f"{JOBS}:gathered", True, True, ranks=2)
    assert waited == [1, 2]
    forgotten, _ = device.call("gpu", f"{JOBS}:gathered", False, True, ranks=2)
    assert forgotten[0] != 1, "the first rank's own part is a copy"


def test_a_rank_that_takes_no_part_is_missed(device):
    first, second = device.call("gpu", f"{JOBS}:alone", ranks=2)
    assert first and not second


def test_numbers_that_were_overwritten_before_the_wait_are_summed(device):
    assert device.call("gpu", f"{JOBS}:overwritten", ranks=2) == [[20, 20], [20, 20]]


def test_ranks_may_wait_in_opposite_orders(device):
    assert device.call("gpu", f"{JOBS}:opposite_orders", ranks=2) == [[2, 4], [2, 4]]


def test_every_collective(device):
    both = {
        "sum": [3, 30],
        "max": [2, 20],
        "bfloat16": [3, 30],
        "all_gather": [1, 10, 2, 20],
        "broadcast": [2, 20],
        "send": [1, 10],
    }
    first, second = device.call("itself", f"{JOBS}:every_collective", ranks=2)
    assert first == both | {"reduce_scatter": [3], "all_to_all": [1, 2]}
    assert second == both | {"reduce_scatter": [30], "all_to_all": [10, 20]}
