"""Fixtures of the native kernels' tests."""

from collections.abc import Callable, Iterator

import pytest

from external_ops import native


@pytest.fixture(scope="session")
def native_ops() -> None:
    """Skip where the compiled kernels are absent, with the reason."""
    if not native.available():
        pytest.skip(native.reason())


@pytest.fixture(params=native.LEVELS)
def each_level(request: pytest.FixtureRequest, native_ops: None) -> Iterator[str]:
    """Run a test on the kernels of every instruction set that this processor has."""
    if request.param not in native.supported_levels():
        pytest.skip(f"this processor cannot run {request.param}")
    with native.forced_level(request.param):
        yield request.param


@pytest.fixture
def set_threads(native_ops: None) -> Iterator[Callable[[int], None]]:
    """Set the number of threads of all kernels, however little there is to do, for one test."""
    from external_ops.cpu_threads import forced_policy

    library = native.library()
    before = library.omp_get_max_threads()
    with forced_policy("all"):
        yield library.omp_set_num_threads
    library.omp_set_num_threads(before)
