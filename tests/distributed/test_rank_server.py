"""The server that the other tests of this directory run on."""

import time

import pytest

from tests.distributed.rank_server import RankError


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_values_come_back_by_rank(ranks, count):
    found = ranks(count, "jobs_server:echo", {"a": [1, None]})
    assert [value["rank"] for value in found] == list(range(count))
    assert all(value["value"] == {"a": [1, None]} for value in found)
    assert all(value["ranks"] == count and value["paddle"] for value in found)


def test_failure_shows_what_every_rank_said_and_ends_the_others(ranks):
    start = time.monotonic()
    with pytest.raises(RankError, match="planted on rank 1") as caught:
        ranks(2, "jobs_server:fail_on", 1)
    assert time.monotonic() - start < 20
    assert "exit codes [-9, 1]" in str(caught.value)
    assert "in fail_on" in str(caught.value).split("--- rank 1")[0]


def test_late_ranks_are_killed_with_their_stacks(ranks):
    with pytest.raises(RankError, match=r"did not end within 0\.5 s") as caught:
        ranks(2, "jobs_server:sleep", 60, timeout=0.5)
    assert str(caught.value).count("in sleep") == 2
    assert ranks(1, "jobs_server:echo", 1)[0]["value"] == 1
