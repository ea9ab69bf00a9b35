"""Native SwiGLU against float64."""

import numpy as np
import paddle
import pytest

from external_ops.swiglu import swiglu_native, swiglu_ref
from tests.unit.external_ops import oracle
from tests.unit.external_ops.oracle import to_bfloat16

SHAPES = [(1, 1), (1, 65), (5, 4096), (123, 65), (2, 3, 41), (2049, 17), (0, 64)]


def draw(shape, dtype="float32", scale=3.0):
    rng = np.random.default_rng(sum(shape))
    arrays = [rng.standard_normal(shape).astype(np.float32) * np.float32(scale) for _ in range(3)]
    return [to_bfloat16(a) for a in arrays] if dtype == "bfloat16" else arrays


def forward_and_gradients(gate, up, grad, keep):
    """Output and gradients, each operator's result stored by ``keep``."""
    sigmoid = 1 / (1 + np.exp(-gate))
    silu = keep(gate * sigmoid)
    grad_silu = keep(grad * up)
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    return keep(silu * up), keep(grad_silu * slope), keep(grad * silu)


def run_native(arrays, dtype):
    gate, up, grad = (paddle.to_tensor(a).astype(dtype).detach() for a in arrays)
    gate.stop_gradient = up.stop_gradient = False
    out = swiglu_native(gate, up)
    out.backward(grad)
    return [t.astype("float32").numpy() for t in (out, gate.grad, up.grad)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_times_rule(each_level, shape, dtype):
    arrays = draw(shape, dtype)
    exact = forward_and_gradients(*(a.astype(np.float64) for a in arrays), lambda x: x)
    keep = to_bfloat16 if dtype == "bfloat16" else np.float32
    plain = forward_and_gradients(*arrays, keep)
    for ours, theirs, truth in zip(run_native(arrays, dtype), plain, exact, strict=True):
        assert oracle.within_twice(ours, theirs, truth, dtype=dtype)


def test_slope_is_the_numeric_derivative():
    gate, up, grad = (a.astype(np.float64) for a in draw((2, 9)))
    step = 1e-6
    high, low = (forward_and_gradients(gate + d, up, grad, lambda x: x)[0] for d in (step, -step))
    _, grad_gate, _ = forward_and_gradients(gate, up, grad, lambda x: x)
    np.testing.assert_allclose((high - low) / (2 * step) * grad, grad_gate, atol=1e-6)


def test_extreme_values_are_those_of_the_plain_form(each_level):
    large = [0.0, -0.0, 1e4, -1e4, 88.0, -88.0, 89.0, -89.0, 104.0, -104.0, 1e-30, 3e38, -3e38]
    gate = np.array([*large, np.inf, -np.inf, np.nan] * 2, np.float32)
    up = np.repeat(np.array([2.0, -3.0], np.float32), len(gate) // 2)
    ours, theirs = (
        kernel(paddle.to_tensor(gate), paddle.to_tensor(up)).numpy()
        for kernel in (swiglu_native, swiglu_ref)
    )
    # Numbers below 1e-37 may be zero.
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-35)
    ones = np.ones(13, np.float32)
    for found in run_native([gate[:13], ones, ones], "float32"):
        assert np.isfinite(found).all()


@pytest.mark.parametrize("dtype, rows", [("float32", 3000), ("bfloat16", 5800)])
def test_threads_and_large_outputs(each_level, set_threads, dtype, rows):
    """Large outputs are written past the caches, by other instructions at every level."""
    # Other numbers for each level, or memory that is used again could hold the right ones.
    rng = np.random.default_rng(list(each_level.encode()))
    arrays = [4 * rng.random((rows, 2200), np.float32) - 2 for _ in range(3)]
    arrays = [paddle.to_tensor(array).astype(dtype).numpy() for array in arrays]

    def run(*arrays):
        # NumPy has no bfloat16: its bits come and go as uint16.
        gate, up, grad = (paddle.to_tensor(array).detach() for array in arrays)
        gate.stop_gradient = up.stop_gradient = False
        out = swiglu_native(gate, up)
        assert str(out.dtype) == f"paddle.{dtype}"
        out.backward(grad)
        return [t.numpy() for t in (out, gate.grad, up.grad)]

    set_threads(2)
    whole = run(*arrays)
    set_threads(1)
    for large, small in zip(whole, oracle.by_parts(run, arrays), strict=True):
        np.testing.assert_array_equal(large, small)


def test_refused_inputs_are_named(native_ops):
    gate = paddle.zeros([3, 8])
    with pytest.raises(ValueError, match=r"gate \[3, 8\] and up \[3, 4\]"):
        swiglu_native(gate, gate[:, :4])
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        swiglu_native(gate.astype("float64"), gate.astype("float64"))
