"""Native kernels take as many threads as their work repays and other processes leave cores for."""

import contextlib
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from external_ops import native
from external_ops.cpu_threads import POLICIES, course, done, forced_policy, free_cores, threads_for

pytestmark = pytest.mark.usefixtures("native_ops")


@pytest.fixture
def four_threads() -> Iterator[None]:
    """Let OpenMP have four threads."""
    library = native.library()
    before = library.omp_get_max_threads()
    library.omp_set_num_threads(4)
    yield
    library.omp_set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
def test_threads_follow_the_work():
    with forced_policy("fixed"):
        found = [threads_for(1e3 * us) for us in (0, 30, 35, 60, 1e6, math.inf)]
        assert found == [1, 1, 2, 3, 4, 4]
        # Steps of the demo's model, 300 us and 40 meetings, and of SmolLM2-135M, 10 ms and 300.
        assert threads_for(300e3, 40) == 1
        assert threads_for(10e6, 300) == 4
    with forced_policy("all"):
        assert threads_for(0) == 4


@pytest.mark.parametrize("policy", POLICIES)
def test_one_thread_stays_one(policy):
    library = native.library()
    before = library.omp_get_max_threads()
    library.omp_set_num_threads(1)
    with forced_policy(policy):
        assert threads_for(math.inf, 1) == 1
    library.omp_set_num_threads(before)


@pytest.fixture
def all_cores() -> Iterator[int]:
    """Let OpenMP have a thread for each core; return how many there are."""
    cores = len(os.sched_getaffinity(0))
    if cores == 1 or sys.platform != "linux":
        pytest.skip("needs two cores, and Linux's /proc/stat")
    library = native.library()
    before = library.omp_get_max_threads()
    library.omp_set_num_threads(cores)
    yield cores
    library.omp_set_num_threads(before)


@contextlib.contextmanager
def _neighbours(count: int) -> Iterator[None]:
    """Run processes that keep a core busy each."""
    loops = [
        subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)
    ]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def test_busy_cores_are_left_to_others(all_cores):
    with _neighbours(all_cores), forced_policy("measured"):
        assert free_cores() == math.inf and threads_for(math.inf) == all_cores
        deadline = time.monotonic() + 20
        while (found := threads_for(math.inf)) > 1 and time.monotonic() < deadline:
            done()
        assert found == 1
        with forced_policy("fixed"):
            assert threads_for(math.inf) == all_cores


def test_what_others_did_while_this_process_waited_does_not_count(all_cores):
    with forced_policy("measured"):
        assert threads_for(math.inf) == all_cores
        done()
        with _neighbours(all_cores):
            time.sleep(1)
        assert threads_for(math.inf) == all_cores


def test_one_long_kernel_is_judged_when_it_ends(all_cores):
    with _neighbours(all_cores), forced_policy("measured"):
        assert threads_for(math.inf) == all_cores
        until = time.monotonic() + 1
        while time.monotonic() < until:
            pass  # as a prompt in one kernel
        done()
        assert free_cores() < all_cores - 0.35


def _course(*phases: tuple[int, float, float, float]) -> list[list[int]]:
    """Return the limit on two cores by phase, looked at each 0.2 s.

    Args:
        phases: looks; share of a window in which this process works, on each core left to it; share
            of a core that others take, and that those of lower priority fill if it is idle.
    """
    looks, limits, now = [[0.0] * 5], [2], np.zeros(4)
    for count, works, others, nice in phases:
        for _ in range(count):
            took = min(limits[-1], 2 - others) * works
            filled = min(nice, 2 - others - took)
            now += 0.2 * np.array([1, took, took + others, filled])
            looks.append([*now, now[0] - 0.2 * (1 - works)])
            limits.append(course(np.array(looks), 2, 2)[-1])
    ends = np.cumsum([1, *(phase[0] for phase in phases)])
    return [limits[begin:end] for begin, end in itertools.pairwise(ends)]


def test_a_limit_ends_when_the_neighbours_have_gone_however_often_they_came():
    """As rows of a benchmark beside a busy process and without one."""
    for index, limits in enumerate(_course(*[(6, 1, 1, 0), (3, 1, 0, 0)] * 8)):
        assert limits[-1] == (2 if index % 2 else 1), index
        assert limits.index(limits[-1]) <= 2


def test_a_limit_ends_over_a_pause_in_which_nobody_was_there():
    assert _course((6, 1, 1, 0), (3, 0.1, 0, 0)) == [[1] * 6, [1, 2, 2]]
    assert _course((6, 1, 1, 0), (3, 0.1, 1, 0)) == [[1] * 6, [1, 1, 1]]


def test_a_process_of_low_priority_costs_no_thread_for_long():
    """It fills the core that a limit leaves; half a core taken from two threads is worth a wait."""
    assert _course((20, 1, 0, 1)) == [[2] * 20]
    assert _course((6, 1, 0.5, 1), (3, 1, 0, 1)) == [[1] * 6, [2] * 3]
