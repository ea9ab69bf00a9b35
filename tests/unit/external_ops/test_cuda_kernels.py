"""The CUDA kernels on the CPU: csrc/laboratory/cuda as C++ over tests/native/cuda_emulator.h."""

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from tests.native import cuda_checks as checks
from tests.native import emulated, storage
from tests.native.attention_checks import Case, check_attention
from tests.native.cuda_interface import STRUCTURES, CudaOps

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


def test_structures_are_those_of_the_headers(ops: CudaOps) -> None:
    """Python's copies of the argument structures have grown with the C ones."""
    sizes = (emulated.ctypes.c_int64 * len(STRUCTURES))()
    ops.library.probe_sizes(sizes)
    assert list(sizes) == [emulated.ctypes.sizeof(one) for one in STRUCTURES]


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


_ATTENTION = {
    "one query": Case(1, 128, heads=4),
    "two tiles": Case(130, 64, heads=4),
    "two tiles, 128": Case(130, 128, groups=2, dtype="float16"),
    "prefix": Case(17, 128, prefix=70),
    "all keys seen": Case(20, 64, prefix=30, extra_keys=-19),
    "keys that nobody reaches": Case(9, 64, prefix=4, extra_keys=70),
    "documents": Case(
        150, 64, documents=((150,), (-150,), (10, 140), (70, -10, 1, 69)), dtype="float16"
    ),
    "documents, 128": Case(130, 128, heads=4, documents=((60, 70), (1, -9, 120))),
    "prefix of all documents": Case(20, 64, prefix=100, documents=((5, 15), (20,))),
    "prefix of the first": Case(20, 64, prefix=100, documents=((5, 15),), every=False),
    "many documents": Case(300, 64, heads=1, documents=((100, 100, 100),)),
}


@pytest.mark.parametrize("name", _ATTENTION)
def test_attention_and_gradients(ops: CudaOps, name: str) -> None:
    """Tiles that are whole, cut off, masked in part and left out; no bank is read twice at once."""
    ops.library.emulator_conflicts()
    check_attention(ops, ops.arrays, _ATTENTION[name])
    assert ops.library.emulator_conflicts() == 0


def test_attention_gives_the_same_bits_under_every_schedule(ops: CudaOps) -> None:
    """Sums have one order, and what crosses a barrier does not depend on who comes first."""
    rng, arrays = np.random.default_rng(1), ops.arrays
    q, k, v, grad = (checks.normals(rng, "bfloat16", 1, 70, 2, 64) for _ in range(4))
    put = [arrays.put(a, "bfloat16") for a in (q, k, v, grad)]
    seen = []
    for seed in range(3):
        ops.library.emulator_seed(seed)
        out, lse, called = ops.attention(*put[:3], None, None, 0, "bfloat16")
        gradients = ops.attention_backward(put[0], put[1], called, put[3], "bfloat16")
        seen.append(b"".join(a.tobytes() for a in (out, lse, *gradients)))
    assert len(set(seen)) == 1


def test_attention_refuses_what_it_has_no_kernel_for(ops: CudaOps) -> None:
    """Other head sizes and float32 are for the plain form."""
    for size, dtype in ((80, "bfloat16"), (64, "float32")):
        with pytest.raises(ValueError, match="no kernel"):
            check_attention(ops, ops.arrays, Case(4, size, dtype=dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("shape", "groups", "bias"),
    [
        ((1, 16, 256), 1, False),
        ((5, 33, 288), 9, True),
        ((16, 20, 2048), 64, False),
        ((17, 130, 352), 1, True),
        ((65, 40, 128), 2, False),
        ((70, 140, 96), 3, True),
    ],
)
def test_linear(
    ops: CudaOps, shape: tuple[int, int, int], groups: int, bias: bool, bits: int, dtype: str
) -> None:
    """Few and many tokens; outputs, tokens and inputs that fill no tile; one scale or several."""
    checks.check_linear(ops, ops.arrays, shape, bits, groups, dtype, bias=bias)


@pytest.mark.parametrize(
    ("inputs", "groups", "bits"), [(40, 1, 8), (96, 6, 4), (96, 2, 8), (48, 1, 4)]
)
def test_linear_refuses_rows_and_groups_that_do_not_divide(
    ops: CudaOps, inputs: int, groups: int, bits: int
) -> None:
    """A lane's 16 bytes have to lie in one row and one group, groups in powers of two."""
    with pytest.raises(ValueError, match="no kernel"):
        checks.check_linear(ops, ops.arrays, (2, 8, inputs), bits, groups, "bfloat16")


def test_the_emulated_product_follows_the_documented_positions(ops: CudaOps) -> None:
    """A, B and C by the formulas of the PTX ISA, written out once more in emulator_probe.cu."""
    rng, arrays = np.random.default_rng(0), ops.arrays
    a, b = rng.integers(-9, 9, (16, 16)), rng.integers(-9, 9, (16, 8))
    c = arrays.empty((16, 8), "float32")
    stored = [arrays.put(x.astype(np.float32), "bfloat16") for x in (a, b)]
    pointers = map(storage.NumpyArrays.pointer, (*stored, c))
    ops.library.probe_mma(*map(emulated.ctypes.c_void_p, pointers), None)
    np.testing.assert_array_equal(c, a @ b)


def test_the_emulated_matrix_loads_follow_the_documented_positions(ops: CudaOps) -> None:
    """Lane 4 * i + j gets columns 2 * j and 2 * j + 1 of row i, or rows of column i transposed."""
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    out = np.zeros((2, 4, 32), np.uint32)
    ops.library.probe_matrices(
        *(emulated.ctypes.c_void_p(x.ctypes.data) for x in (matrices, out)), None
    )
    pairs = np.stack([matrices, matrices.swapaxes(1, 2)]).copy().view(np.uint32)
    np.testing.assert_array_equal(out, pairs.reshape(2, 4, 32))


def _mistake(ops: CudaOps, kind: int) -> set[bytes]:
    """Run the faulty kernel under many schedules; return what it computed."""
    found = set()
    for seed in range(20):
        ops.library.emulator_seed(seed)
        out = np.zeros(64, np.int32)
        ops.library.probe_mistake(emulated.ctypes.c_void_p(out.ctypes.data), kind)
        found.add(out.tobytes())
    return found


def test_missing_barriers_and_waits_show(ops: CudaOps) -> None:
    """Without either, some schedule gives another result; with both, none does."""
    right = ((np.arange(64) + 32) % 64 + 4).astype(np.int32).tobytes()
    assert _mistake(ops, 0) == {right}
    assert len(_mistake(ops, 1)) > 1
    assert len(_mistake(ops, 2)) > 1


@pytest.mark.parametrize(
    ("kind", "message"), [(3, "threads"), (4, "a write past the end of shared memory")]
)
def test_the_emulator_stops_at_errors(ops: CudaOps, kind: int, message: str) -> None:
    """Lanes that do not meet and writes past the end stop the process, so in one of its own."""
    code = "from sys import argv; from ctypes import CDLL, c_int; "
    code += "CDLL(argv[1]).probe_mistake((c_int * 64)(), int(argv[2]))"
    command = [sys.executable, "-c", code, ops.library._name, str(kind)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert message in done.stderr
