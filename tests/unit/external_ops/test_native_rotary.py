"""Native rotary embedding against multiplication of complex numbers."""

import numpy as np
import paddle
import pytest

from external_ops.rotary import rotary, rotary_native
from tests.unit.external_ops import oracle
from tests.unit.external_ops.oracle import to_bfloat16

# shape of x, axes of the tables before [1, D/2]
CASES = [
    ((2, 17, 3, 64), (1, 17)),
    ((2, 17, 3, 64), (2, 17)),
    ((2, 5, 4, 80), (2, 1)),
    ((3, 5, 2, 10), (1, 1)),
    ((1000, 1, 128), (1000,)),
    ((5, 8, 6), (5,)),
    ((2, 3, 4, 2, 14), (1, 3, 1)),
    ((1, 1, 1, 2), (1, 1)),
    ((0, 4, 64), (0,)),
    ((2, 0, 4, 64), (1, 0)),
]


def draw(shape, lead, dtype):
    rng = np.random.default_rng(len(shape))
    angles = rng.uniform(-100, 100, (*lead, 1, shape[-1] // 2))
    arrays = rng.standard_normal(shape), rng.standard_normal(shape), np.cos(angles), np.sin(angles)
    arrays = [a.astype(np.float32) for a in arrays]
    return [to_bfloat16(a) for a in arrays] if dtype == "bfloat16" else arrays


def turn(x, cos, sin, direction=1):
    """The truth in float64."""
    half = x.shape[-1] // 2
    factor = cos.astype(np.float64) + 1j * direction * sin.astype(np.float64)
    turned = (x[..., :half] + 1j * x[..., half:].astype(np.float64)) * factor
    return np.concatenate([turned.real, turned.imag], axis=-1)


def turn_plainly(x, cos, sin, direction, keep):
    """With every operator's result rounded."""
    half, sin = x.shape[-1] // 2, sin * np.float32(direction)
    real, imaginary = x[..., :half], x[..., half:]
    return np.concatenate(
        [
            keep(keep(real * cos) - keep(imaginary * sin)),
            keep(keep(imaginary * cos) + keep(real * sin)),
        ],
        axis=-1,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_times_rule(each_level, case, dtype):
    x, grad, cos, sin = draw(*case, dtype)
    leaf, up, *tables = (paddle.to_tensor(a).astype(dtype).detach() for a in (x, grad, cos, sin))
    leaf.stop_gradient = False
    out = rotary_native(leaf, *tables)
    out.backward(up)
    keep = to_bfloat16 if dtype == "bfloat16" else np.float32
    for tensor, start, direction in ((out, x, 1), (leaf.grad, grad, -1)):
        exact = turn(start, cos, sin, direction)
        theirs = turn_plainly(start, cos, sin, direction, keep)
        ours = tensor.astype("float32").numpy()
        assert oracle.within_twice(ours, theirs, exact, dtype=dtype)


def test_gradients_agree_with_the_plain_form(each_level):
    x, grad, cos, sin = draw((2, 9, 3, 22), (1, 9), "float32")
    results = []
    for kernel in (rotary_native, rotary):
        leaf = paddle.to_tensor(x, stop_gradient=False)
        out = kernel(leaf * 1.5, paddle.to_tensor(cos), paddle.to_tensor(sin))
        out.backward(paddle.to_tensor(grad))
        results.append((out.numpy(), leaf.grad.numpy()))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    "dtype, shape",
    [("float32", (3200, 16, 128)), ("float32", (3200, 25, 80)), ("bfloat16", (3200, 32, 128))],
    ids=["float32", "float32, halves not aligned", "bfloat16"],
)
def test_threads_and_large_outputs(set_threads, dtype, shape):
    """Large outputs are written past the caches where halves of heads are aligned."""
    rng = np.random.default_rng(0)
    tables = [rng.random((shape[0], 1, shape[2] // 2), np.float32) for _ in range(2)]
    rows = [rng.random(shape, np.float32) - np.float32(0.5), *tables]

    def run(*arrays):
        tensors = [paddle.to_tensor(array).astype(dtype) for array in arrays]
        return [rotary_native(*tensors).astype("float32").numpy()]

    set_threads(2)
    (whole,) = run(*rows)
    set_threads(1)
    np.testing.assert_array_equal(whole, oracle.by_parts(run, rows)[0])


def test_tables_of_float32_beside_bfloat16(each_level):
    x, _, cos, sin = draw((7, 2, 64), (7,), "float32")
    x = to_bfloat16(x)
    tables = paddle.to_tensor(cos), paddle.to_tensor(sin)
    out = rotary_native(paddle.to_tensor(x).astype("bfloat16"), *tables)
    assert out.dtype == paddle.bfloat16
    np.testing.assert_array_equal(
        out.astype("float32").numpy(), to_bfloat16(turn(x, cos, sin).astype(np.float32))
    )


def test_refused_inputs_are_named(native_ops):
    x, table = paddle.zeros([2, 5, 3, 8]), paddle.zeros([2, 5, 1, 4])
    with pytest.raises(ValueError, match="even head dimension"):
        rotary_native(paddle.zeros([2, 5, 3, 7]), table, table)
    with pytest.raises(ValueError, match=r"cos \[2, 5, 1, 4\] and sin \[5, 1, 4\]"):
        rotary_native(x, table, table[0])
    for wrong in ([5, 1, 4], [2, 4, 1, 4], [2, 5, 3, 4], [2, 5, 1, 8]):
        with pytest.raises(ValueError, match=r"has to be \[\.\.\., 1, D/2\]"):
            rotary_native(x, paddle.zeros(wrong), paddle.zeros(wrong))
    alone = paddle.zeros([2, 1, 4, 1, 4])
    with pytest.raises(ValueError, match="expand it"):
        rotary_native(paddle.zeros([2, 3, 4, 5, 8]), alone, alone)
