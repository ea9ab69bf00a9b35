"""Threads on CPUs: how many the native kernels take, and all cores for Paddle's own kernels.

A native kernel takes as many threads as its work repays and as other processes leave cores for
(csrc/include/llama_ops/threads.h): threads share work out evenly, so that one which has lost its
core holds all others. Results do not depend on it.

Softmax, exponentials and products run on one core in Paddle's CPU build, while matrix products use
every core through MKL. Paddle releases the interpreter's lock inside kernels, so slices of a batch
can go through them on Python threads; inside those, MKL is told to use one thread.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import paddle

from external_ops import native

Part = TypeVar("Part")
# As LLAMA_OPS_THREADS in the environment takes them: what the work repays and other processes leave
# cores for; what the work repays; all, however little there is to do.
POLICIES = ("measured", "fixed", "all")


def threads_for(nanoseconds: float, meetings: int = 0) -> int:
    """Return how many threads a native kernel would take now.

    Args:
        nanoseconds: that its work takes on one thread.
        meetings: how often all threads wait for each other in it.
    """
    function = native.library().llama_ops_threads_for
    function.argtypes = (ctypes.c_double, ctypes.c_int64)
    return int(function(nanoseconds, meetings))


def done() -> None:
    """Say that work has ended: what others do until the next begins does not count."""
    native.library().llama_ops_threads_done()


def free_cores() -> float:
    """Return the cores that other processes left lately; infinite where that is not known."""
    function = native.library().llama_ops_free_cores
    function.restype = ctypes.c_double
    return float(function())


def course(looks: np.ndarray, cores: int, most: int) -> list[int]:
    """Return the threads that cores would be left for after each look, by what looks say.

    Args:
        looks: float64 [count, 5], in seconds since some start: the clock, the time of this process,
            of all processes with the usual priority and with a lower one, and the end of the last
            kernel.
        cores: that there are.
        most: threads to limit.
    """
    looks = np.ascontiguousarray(looks, np.float64)
    limits = np.empty(len(looks), np.int32)
    native.library().llama_ops_threads_course(
        looks.ctypes.data_as(ctypes.c_void_p),
        len(looks),
        cores,
        most,
        limits.ctypes.data_as(ctypes.c_void_p),
    )
    return limits.tolist()


@contextlib.contextmanager
def forced_policy(name: str) -> Iterator[None]:
    """Choose threads by another of :data:`POLICIES` for a while."""
    choose = native.library().llama_ops_set_threads_policy
    before = choose(POLICIES.index(name))
    try:
        yield
    finally:
        choose(before)


@lru_cache(maxsize=1)
def _mkl() -> Any | None:
    library = Path(paddle.__file__).parent / "libs" / "libmklml_intel.so"
    try:
        return ctypes.CDLL(str(library)).MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):  # a build with another math library
        return None


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor | None:
    """Return this process's threads; a fork has none of its parent's and makes its own."""
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    set_local_threads = _mkl()
    if threads < 2 or set_local_threads is None:
        return None
    return ThreadPoolExecutor(
        threads, f"cpu-{process}", initializer=set_local_threads, initargs=(1,)
    )


def map_slices(function: Callable[[slice], Part], count: int) -> list[Part]:
    """Return ``function`` of slices that cover ``range(count)``, computed side by side.

    Args:
        function: runs Paddle ops on its slice; no gradient is recorded.
        count: what is divided, such as the rows of a batch.
    """
    pool = _pool(os.getpid())
    if pool is None or count < 2:
        return [function(slice(0, count))]
    parts = min(count, pool._max_workers)
    cuts = [count * part // parts for part in range(parts + 1)]

    def run(part: int) -> Part:
        with paddle.no_grad():  # the switch is per thread
            return function(slice(cuts[part], cuts[part + 1]))

    return list(pool.map(run, range(parts)))


def join(parts: list[paddle.Tensor]) -> paddle.Tensor:
    """Concatenate the results of slices along the first axis."""
    return parts[0] if len(parts) == 1 else paddle.concat(parts, axis=0)
