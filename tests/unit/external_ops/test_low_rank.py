"""Low-rank products of several adapters, against float64, at every instruction set."""

import numpy as np
import paddle
import pytest

from external_ops.low_rank import LowRank, LowRankStep, Piece, low_rank_native, low_rank_ref
from tests.unit.external_ops import oracle
from tests.unit.external_ops.oracle import to_bfloat16

# Rows, inputs, outputs; what adapters add to: first output, number of outputs, rank.
SHAPES = [
    (1, 1, 1, [[(0, 1, 1)]]),
    (9, 65, 130, [[(0, 65, 3), (65, 65, 5)], [(3, 9, 16)], []]),
    (40, 300, 1100, [[(0, 1100, 8)], [(1, 1099, 1), (0, 1, 33)]]),
    (5, 2048, 64, [[(0, 64, 16)]]),
]
LINEAR = 6


def draw(rows, inputs, outputs, adapters, dtype):
    """Return x, what a linear made of it, each row's adapter, and the adapters' pieces."""
    rng = np.random.default_rng(rows)
    numbers = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    keep = to_bfloat16 if dtype == "bfloat16" else np.float32
    pieces = [
        [
            Piece(LINEAR, at, keep(numbers(rank, inputs)), keep(numbers(rank, size)), 0.7)
            for at, size, rank in adapter
        ]
        + [Piece(LINEAR + 1, 0, numbers(2, 3), numbers(2, 5), 1.0)]  # of another linear
        for adapter in adapters
    ]
    of = rng.integers(-1, len(adapters), rows).astype(np.int32)
    of[:1] = 0
    return numbers(rows, inputs), numbers(rows, outputs), of, pieces


def sums(x, out, of, pieces, wide):
    """Return the same by NumPy in one type."""
    out = out.astype(wide)
    for row, number in enumerate(of):
        for piece in pieces[number] if number >= 0 else []:
            if piece.linear == LINEAR:
                a, b = piece.a_RI.astype(wide), piece.b_RO.astype(wide)
                inner = x[row].astype(wide) @ a.T * wide(np.float32(piece.scale))
                out[row, piece.first : piece.first + b.shape[1]] += inner @ b
    return out


def run(kernel, x, out, of, pieces, dtype="float32", **more):
    step = LowRankStep([LowRank(one, dtype) for one in pieces], of)
    tensors = paddle.to_tensor(x), paddle.to_tensor(out)
    return kernel(*tensors, step, linear=LINEAR, **more).numpy()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_times_rule(each_level, shape, dtype):
    x, out, of, pieces = draw(*shape, dtype)
    truth = sums(x, out, of, pieces, np.float64)
    plain = sums(x, out, of, pieces, np.float32)
    found = run(low_rank_native, x, out, of, pieces, dtype)
    assert oracle.within_twice(found, plain, truth)
    np.testing.assert_array_equal(found[of < 0], out[of < 0])
    assert np.abs(found - out)[of == 0].max() > 0.01
    np.testing.assert_allclose(run(low_rank_ref, x, out, of, pieces, dtype), truth, atol=2e-4)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_a_row_s_bits_do_not_depend_on_others(each_level, set_threads, shape):
    x, out, of, pieces = draw(*shape, "float32")
    set_threads(1)
    alone = np.concatenate(
        [
            run(low_rank_native, *(one[n : n + 1] for one in (x, out, of)), pieces)
            for n in range(len(x))
        ]
    )
    for threads in (1, 2):
        set_threads(threads)
        found = run(low_rank_native, x, out, of, pieces)
        np.testing.assert_array_equal(found.view(np.int32), alone.view(np.int32))
    backwards = run(low_rank_native, x[::-1].copy(), out[::-1].copy(), of[::-1].copy(), pieces)
    np.testing.assert_array_equal(backwards[::-1].view(np.int32), alone.view(np.int32))


@pytest.mark.usefixtures("native_ops")
@pytest.mark.parametrize("kernel", [low_rank_ref, low_rank_native])
def test_a_part_of_a_linear_s_outputs(kernel):
    """As networks have them that are not packed: q, k and v apart."""
    x, out, of, pieces = draw(*SHAPES[1], "float32")
    whole = run(kernel, x, out, of, pieces)
    some = run(kernel, x, out[:, 65:].copy(), of, pieces, first=65)
    first = (of == 0)[:, None] & np.ones(65, bool)
    np.testing.assert_array_equal(some[first], whole[:, 65:][first])


@pytest.mark.usefixtures("native_ops")
def test_a_row_that_is_no_number_spoils_itself_alone():
    x, out, of, pieces = draw(*SHAPES[2], "float32")
    expected = run(low_rank_native, x, out, of, pieces)
    x[np.flatnonzero(of >= 0)[3]] = np.nan
    found = run(low_rank_native, x, out, of, pieces)
    spoiled = np.isnan(found).any(1)
    assert spoiled.sum() == 1
    np.testing.assert_array_equal(found[~spoiled], expected[~spoiled])


@pytest.mark.usefixtures("native_ops")
def test_refused_inputs_are_named():
    x, out, of, pieces = draw(*SHAPES[1], "float32")
    with pytest.raises(ValueError, match=r"row 0 has adapter 3; there are 3"):
        run(low_rank_native, x, out, np.full_like(of, 3), pieces)
    with pytest.raises(ValueError, match=r"adapter \[2\] has to be int32 \[9\]"):
        run(low_rank_native, x, out, of[:2], pieces)
    with pytest.raises(ValueError, match=r"product \[65, 65\] does not fit a linear of 64 inputs"):
        run(low_rank_native, x[:, :64].copy(), out, of, pieces)
    with pytest.raises(ValueError, match="outputs"):
        run(low_rank_native, x, out[:, :129].copy(), of, pieces)
    with pytest.raises(ValueError, match="float32"):
        step = LowRankStep([LowRank(one) for one in pieces], of)
        low_rank_native(
            paddle.to_tensor(x).astype("bfloat16"), paddle.to_tensor(out), step, linear=LINEAR
        )
