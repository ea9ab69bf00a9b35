"""Native kernels take as many threads as their work repays and other processes leave cores for."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from external_ops import native
from external_ops.cpu_threads import POLICIES, forced_policy, free_cores, threads_for

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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_busy_cores_are_left_to_others():
    cores = len(os.sched_getaffinity(0))
    if cores == 1:
        pytest.skip("one core")
    library = native.library()
    before = library.omp_get_max_threads()
    library.omp_set_num_threads(cores)
    loops = [
        subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(cores)
    ]
    try:
        with forced_policy("measured"):
            assert free_cores() == math.inf and threads_for(math.inf) == cores
            deadline = time.monotonic() + 20
            while (found := threads_for(math.inf)) > 1 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert found == 1
            with forced_policy("fixed"):
                assert threads_for(math.inf) == cores
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
        library.omp_set_num_threads(before)
