"""The CUDA kernels on the CPU: csrc/cuda as C++ over tests/native/cuda_emulator.h."""

from collections.abc import Iterator

import pytest

from tests.native import cuda_checks as checks
from tests.native import emulated
from tests.native.cuda_interface import CudaOps

HALVES = ("bfloat16", "float16")


@pytest.fixture(scope="module")
def library() -> CudaOps:
    """The kernels, compiled when a source has changed."""
    if emulated.compiler() is None:
        pytest.skip("no C++ compiler")
    return emulated.load()


@pytest.fixture
def ops(library: CudaOps, request: pytest.FixtureRequest) -> Iterator[CudaOps]:
    """The kernels with a schedule of this test's own; checks afterwards what lies around arrays."""
    library.library.emulator_seed(sum(request.node.name.encode()))
    yield library
    library.arrays.check()


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize(
    ("rows", "size"), [(1, 65), (5, 1024), (123, 64), (5, 4096), (2, 8200), (0, 64)]
)
def test_rms_norm_and_gradients(ops: CudaOps, rows: int, size: int, dtype: str) -> None:
    """Odd sizes by numbers, short rows by warps, long ones by blocks that read parts again."""
    checks.check_rms_norm(ops, ops.arrays, rows, size, dtype)


def test_weight_gradient_of_many_rows_is_summed_over_blocks(ops: CudaOps) -> None:
    """More rows than blocks: each block walks several, by whole blocks and by warps."""
    checks.check_rms_norm(ops, ops.arrays, 2100, 8, "bfloat16")
    checks.check_rms_norm(ops, ops.arrays, 520, 5, "float32")


def test_rows_too_long_for_shared_memory_are_refused(ops: CudaOps) -> None:
    """The gradient's sums have to fit; nothing has been written then."""
    with pytest.raises(ValueError, match="no kernel"):
        checks.check_rms_norm(ops, ops.arrays, 1, 50_000, "float32")


@pytest.mark.parametrize(
    ("dtype", "table"),
    [
        ("float32", "float32"),
        ("bfloat16", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
    ],
)
@pytest.mark.parametrize("size", [64, 10, 128])
def test_rotary(ops: CudaOps, size: int, dtype: str, table: str) -> None:
    """Queries and keys of different head counts in one launch, and the gradient."""
    checks.check_rotary(ops, ops.arrays, 17, (4, 1), size, dtype, table)
