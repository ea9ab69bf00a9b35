"""Packed linears against float64 products of the integers and scales that were packed."""

import ctypes
import fcntl
import mmap
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import Tensor, nn

from external_ops import native
from external_ops.frozen_matmul import frozen_matmul_ref
from external_ops.linear import KINDS, PackedWeight, pack_weight, packed_linear, packed_rows
from llm.llama.quantization import linear as quantization
from tests.unit.external_ops import oracle

QUANTIZED = KINDS[2:]
ROUNDED = ("int8", "int4")


class Case:
    """A weight, packed, and what its numbers are.

    Args:
        outputs: O.
        inputs: I.
        kind: of the packed weight.
        groups: N.
        seed: of the numbers.
    """

    def __init__(self, outputs: int, inputs: int, kind: str, groups: int = 1, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.kind, self.bits = kind, 4 if kind.startswith("int4") else 8
        if kind in QUANTIZED:
            low, high = (-8, 7) if self.bits == 4 else (-128, 127)
            self.integers = rng.integers(low, high, (outputs, inputs), endpoint=True, dtype=np.int8)
            self.scale = (rng.uniform(0.5, 2, (outputs, groups)) / high).astype(np.float32)
            wide = self.integers * np.repeat(self.scale.astype(np.float64), inputs // groups, 1)
            stored = quantization.pack(self.integers) if self.bits == 4 else self.integers
            self.stored, scale = paddle.to_tensor(stored), paddle.to_tensor(self.scale)
        else:
            numbers = paddle.to_tensor(rng.standard_normal((outputs, inputs)).astype(np.float32))
            self.stored = numbers.astype(kind).astype("float32")
            wide, scale = self.stored.numpy().astype(np.float64), None
        self.wide = wide
        self.packed: PackedWeight = pack_weight(self.stored, kind, scale)

    def exact(self, x: np.ndarray) -> np.ndarray:
        """Multiply in float64, with inputs rounded where the kind does that."""
        if self.kind in ROUNDED:
            integers, scale = rounded(x)
            return (integers * scale.astype(np.float64)) @ self.wide.T
        return x.astype(np.float64) @ self.wide.T

    def plain(self, x: Tensor) -> np.ndarray:
        """Multiply with Paddle's operators."""
        if self.kind in QUANTIZED:
            x = quantization.round_tokens(x) if self.kind in ROUNDED else x
            scale = paddle.to_tensor(self.scale)
            return frozen_matmul_ref(x, self.stored, scale, transposed=True).numpy()
        return paddle.matmul(x.astype(self.kind).astype("float32"), self.stored.T).numpy()


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the integers of each row and their scale."""
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(127), np.float32(1e-30))
    return np.rint(x / scale), scale


def random(*shape: int, seed: int = 1) -> Tensor:
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return paddle.to_tensor(numbers.astype(np.float32))


def check(case: Case, x: Tensor) -> None:
    value = packed_linear(x, case.packed).numpy()
    terms = float(np.abs(x.numpy()).astype(np.float64).max() * np.abs(case.wide).max())
    assert oracle.within_twice(value, case.plain(x), case.exact(x.numpy()), terms)


# Rows, outputs, inputs, groups: every number of rows that a kernel treats differently, panels that
# are not full and more than go together, inputs that are no multiple of 8 and exceed the blocks of
# the kernels.
SHAPES = [
    *[(rows, 65, 128, 4) for rows in (1, 2, 3, 4, 5, 8, 17, 123)],
    *[(1, 130, 4096, 32), (2, 65, 1090, 1), (3, 64, 66, 1), (9, 1, 1090, 1)],
    *[(31, 66, 640, 5), (16, 65, 320, 40), (512, 65, 128, 2), (530, 65, 64, 1)],
    (10, 330, 4096, 32),
]


@pytest.mark.parametrize("kind", KINDS)
def test_products(each_level: str, kind: str) -> None:
    for rows, outputs, inputs, groups in SHAPES:
        case = Case(outputs, inputs, kind, groups if kind in QUANTIZED else 1)
        check(case, random(rows, inputs))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("int4")])
def test_odd_inputs(each_level: str, kind: str) -> None:
    for rows in (1, 6):
        check(Case(65, 65, kind), random(rows, 65))


def test_sums_of_integers_are_exact(each_level: str) -> None:
    """And so each row comes out the same, bit by bit, whatever other rows are beside it."""
    case = Case(66, 2100, "int8")
    x = random(47, 2100)
    integers, scale = rounded(x.numpy())
    sums = integers.astype(np.int64) @ case.integers.T.astype(np.int64)
    expected = sums.astype(np.float32) * case.scale.T * scale
    for rows in (1, 2, 3, 4, 5, 8, 14, 47):
        value = packed_linear(x[:rows], case.packed).numpy()
        np.testing.assert_array_equal(value, expected[:rows])


@pytest.mark.parametrize("kind", KINDS)
def test_threads_agree(kind: str, set_threads: Callable[[int], None]) -> None:
    case = Case(600, 1024, kind, 4 if kind in QUANTIZED else 1)
    for rows in (1, 7, 40):
        x, values = random(rows, 1024), []
        for count in (1, 2, 3):
            set_threads(count)
            values.append(packed_linear(x, case.packed).numpy())
        np.testing.assert_array_equal(values[1:], [values[0]] * 2)


@pytest.mark.parametrize("kind", KINDS)
def test_bias_and_residual(each_level: str, kind: str) -> None:
    case, bias = Case(70, 64, kind), random(70, seed=2)
    for rows in (1, 20):
        x, residual = random(rows, 64), random(rows, 70, seed=3)
        value = packed_linear(x, case.packed, bias, residual).numpy()
        alone = packed_linear(x, case.packed).numpy()
        np.testing.assert_allclose(value, alone + bias.numpy() + residual.numpy(), atol=2e-6)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_integers_at_their_limits(each_level: str, kind: str) -> None:
    """Inputs and weights of one size: intermediate sums are as large as they get."""
    low, high = (-8, 7) if kind.startswith("int4") else (-128, 127)
    inputs = 2304
    integers = np.stack(
        [np.full(inputs, low), np.full(inputs, high), np.resize([low, high], inputs)]
    )
    scale = np.ones((3, 1), np.float32)
    stored = integers.astype(np.int8)
    packed = pack_weight(
        paddle.to_tensor(quantization.pack(stored) if high == 7 else stored),
        kind,
        paddle.to_tensor(scale),
    )
    signs = np.stack([np.full(inputs, 127.0), np.full(inputs, -127.0)] * 4).astype(np.float32)
    value = packed_linear(paddle.to_tensor(signs), packed).numpy()
    np.testing.assert_array_equal(value, signs @ integers.T.astype(np.float64))
    one = packed_linear(paddle.to_tensor(signs[1:2]), packed).numpy()
    np.testing.assert_array_equal(one, value[1:2])


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_inputs(each_level: str, kind: str) -> None:
    case = Case(65, 96, kind, 3 if kind in QUANTIZED else 1)
    for rows in (3, 9):
        x = random(rows, 96).numpy()
        x[0], x[1], x[2] = 0, x[1] * np.float32(1e-30), x[2] * np.float32(1e30)
        for row in range(3):
            value = packed_linear(paddle.to_tensor(x), case.packed).numpy()[row : row + 1]
            exact, plain = (
                case.exact(x[row : row + 1]),
                case.plain(paddle.to_tensor(x[row : row + 1])),
            )
            assert oracle.within_twice(value, plain, exact, float(np.abs(exact).max())), row


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_row_that_is_not_finite_spoils_itself_only(
    each_level: str, kind: str, bad: float
) -> None:
    case = Case(65, 64, kind)
    for rows in (3, 9):
        x = random(rows, 64).numpy()
        clean = packed_linear(paddle.to_tensor(x), case.packed).numpy()
        x[1, 5] = bad
        value = packed_linear(paddle.to_tensor(x), case.packed).numpy()
        assert not np.isfinite(value[1]).any()
        np.testing.assert_array_equal(np.delete(value, 1, 0), np.delete(clean, 1, 0))


def test_no_rows(native_ops: None) -> None:
    assert packed_linear(random(2, 0, 64), Case(65, 64, "int8").packed).shape == [2, 0, 65]


def test_scales_that_are_not_bfloat16_stay_float32(each_level: str) -> None:
    rng = np.random.default_rng(0)
    stored = paddle.to_tensor(rng.integers(-127, 127, (65, 128), dtype=np.int8))
    scale = paddle.full([65, 4], 0.1)
    for factor in (paddle.float32, paddle.bfloat16):
        same = scale.astype("bfloat16").astype("float32") if factor == paddle.bfloat16 else scale
        packed = pack_weight(stored, "int8_weight_only", same)
        assert packed.scale.dtype == factor
        plain = frozen_matmul_ref(random(2, 128), stored, same, transposed=True)
        value = packed_linear(random(2, 128), packed)
        np.testing.assert_allclose(value.numpy(), plain.numpy(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_inputs_are_widened(native_ops: None, dtype: str) -> None:
    packed, x = Case(65, 64, "int4", 2).packed, random(3, 64).astype(dtype)
    value = packed_linear(x, packed)
    assert value.dtype == paddle.float32
    np.testing.assert_array_equal(value.numpy(), packed_linear(x.astype("float32"), packed).numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exported_programs_hold_the_weight(native_ops: None, tmp_path: Path, dtype: str) -> None:
    class Network(nn.Layer):
        def __init__(self, packed: PackedWeight) -> None:
            super().__init__()
            self.packed = packed

        def forward(self, x: Tensor) -> Tensor:
            return self.packed(x)

    case = Case(65, 64, "int4", 2)
    spec = [paddle.static.InputSpec([-1, 64], dtype)]
    network = Network(case.packed)
    network.eval()
    path = str(tmp_path / "program")
    paddle.jit.save(paddle.jit.to_static(network, input_spec=spec, full_graph=True), path)
    loaded = paddle.jit.load(path)
    for rows in (1, 6):
        x = random(rows, 64).astype(dtype)
        np.testing.assert_array_equal(loaded(x).numpy(), packed_linear(x, case.packed).numpy())


# ioctl(PAGEMAP_SCAN) of linux/fs.h: of the pages between two addresses, those of the category HUGE.
_SCAN = 0xC0606610
_HUGE = 1 << 6


def _in_large_pages(start: int, size: int) -> int:
    """Return how many bytes of a piece of memory lie in large pages.

    The sums in /proc/self/smaps would not do: memory that malloc hands out again may lie in large
    pages already, and one mapping holds the memory of many.

    Raises:
        OSError: Linux before 6.7.
    """
    found = (ctypes.c_uint64 * (3 * 1024))()  # start, end and categories of each piece
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    last = -(-(start + size) // mmap.PAGESIZE) * mmap.PAGESIZE
    wanted = (ctypes.addressof(found), len(found) // 3, 0, 0, _HUGE, 0, _HUGE)
    request = bytearray(struct.pack("12Q", 96, 0, first, last, 0, *wanted))
    with Path("/proc/self/pagemap").open("rb") as pages:
        count = fcntl.ioctl(pages, _SCAN, request)
    return sum(found[3 * i + 1] - found[3 * i] for i in range(count))


def _gives_large_pages(size: int) -> bool:
    """Tell whether Linux turns that many bytes into large pages now, and says so."""
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(bytes(size))
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        try:
            before = _in_large_pages(start, size)
            memory.madvise(25)  # MADV_COLLAPSE: Linux 6.1
            return before == 0 and _in_large_pages(start, size) >= size // 2
        except OSError:
            return False


def test_weights_move_to_large_pages(native_ops: None) -> None:
    """What a product reads lies in large pages, where Linux gives them to those who ask."""
    size = 40 << 20
    if not _gives_large_pages(size):
        pytest.skip("this system has large pages for everyone, for no one, or none left")
    packed = pack_weight(paddle.ones([2560, 4096]), "float32")
    # Half is enough: the ends may be refused.
    assert _in_large_pages(packed.data.data_ptr(), size) >= size // 2
    moved = paddle.to_tensor(packed.data.numpy())  # as a program loads it
    packed_linear(paddle.ones([1, 4096]), PackedWeight(moved, None, "float32", 2560, 4096))
    assert _in_large_pages(moved.data_ptr(), size) >= size // 2


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_weights(native_ops: None, kind: str) -> None:
    """Outputs looked up are what was packed, bit by bit, in any orientation and type."""
    weight = Case(130, 72, kind, 3 if kind in QUANTIZED else 1)
    ids = np.array([[129, 0, 63], [64, 1, 128]])
    wide = weight.stored.numpy()
    if kind in QUANTIZED:
        wide = weight.integers * np.repeat(weight.scale, 24, 1)
    got = packed_rows(paddle.to_tensor(ids), weight.packed).numpy()
    assert np.array_equal(got, wide[ids])
    if kind not in QUANTIZED:
        turned = pack_weight(weight.stored.T, kind, transposed=True)
        short = pack_weight(weight.stored.astype("bfloat16"), kind)
        same = weight.stored.astype("bfloat16").astype("float32")
        assert np.array_equal(turned.data.numpy(), weight.packed.data.numpy())
        assert np.array_equal(short.data.numpy(), pack_weight(same, kind).data.numpy())


def test_refusals(native_ops: None) -> None:
    weight, scale = paddle.zeros([65, 64], "int8"), paddle.ones([65, 1])
    packed = pack_weight(weight, "int8", scale)
    with pytest.raises(ValueError, match=r"fp8.*is not one of"):
        pack_weight(weight, "fp8", scale)
    with pytest.raises(ValueError, match="need a scale"):
        pack_weight(weight, "int8")
    with pytest.raises(ValueError, match="another type than kind"):
        pack_weight(weight, "int4", scale)
    with pytest.raises(ValueError, match=r"scale \[64, 1\] has to be \[65, groups\]"):
        pack_weight(weight, "int8", paddle.ones([64, 1]))
    with pytest.raises(ValueError, match="3 groups do not divide 64"):
        pack_weight(weight, "int8", paddle.ones([65, 3]))
    with pytest.raises(ValueError, match="multiples of 8"):
        pack_weight(weight, "int8", paddle.ones([65, 16]))
    with pytest.raises(ValueError, match=r"packed weight \[2, 4096\] .* 72 inputs"):
        packed_linear(random(1, 72), packed)
    with pytest.raises(ValueError, match="id 65 is not one of 0 to 64"):
        packed_rows(paddle.to_tensor([0, 65]), packed)
    with pytest.raises(ValueError, match=r"have to be \[outputs, inputs\]"):
        pack_weight(weight, "int8", scale, transposed=True)
    with pytest.raises(ValueError, match=r"bias \[64\] has to be float32 \[65\]"):
        packed_linear(random(1, 64), packed, random(64))
    with pytest.raises(ValueError, match=r"residual \[2, 65\] has to be float32 \[1, 65\]"):
        packed_linear(random(1, 64), packed, None, random(2, 65))
    with pytest.raises(ValueError, match=r"x has to be float32, bfloat16 or float16; cast it"):
        packed_linear(paddle.ones([1, 64], "int32"), packed)
    x = random(1, 64)
    x.stop_gradient = False
    with pytest.raises(ValueError, match="no gradient"):
        packed_linear(x, packed)


def test_says_why_there_is_no_native_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda: (None, "not built"))
    with pytest.raises(RuntimeError, match="not built"):
        pack_weight(paddle.zeros([1, 8]), "float32")
