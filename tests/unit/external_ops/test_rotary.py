"""Rotary embedding against multiplication of complex numbers."""

import numpy as np
import paddle
import pytest

from external_ops.rotary import rotary

SHAPES = [(1, 5, 3, 8), (2, 7, 1, 2), (9, 4, 64), (0, 2, 16)]


def draw(shape, dtype=np.float64):
    rng = np.random.default_rng(len(shape))
    x, grad = rng.standard_normal(shape), rng.standard_normal(shape)
    angles = rng.uniform(-100, 100, (*shape[:-2], 1, shape[-1] // 2))
    return (a.astype(dtype) for a in (x, grad, np.cos(angles), np.sin(angles)))


def turn(x, cos, sin, direction=1):
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * direction * sin)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_output_and_gradient(shape, dtype):
    x, grad, cos, sin = draw(shape, dtype)
    tensor = paddle.to_tensor(x, stop_gradient=False)
    out = rotary(tensor, paddle.to_tensor(cos), paddle.to_tensor(sin))
    out.backward(paddle.to_tensor(grad))
    tolerance = {"rtol": 0, "atol": 1e-13 if dtype == np.float64 else 1e-6}
    np.testing.assert_allclose(out.numpy(), turn(x, cos, sin), **tolerance)
    np.testing.assert_allclose(tensor.grad.numpy(), turn(grad, cos, sin, -1), **tolerance)


def test_gradient_is_the_numeric_derivative():
    x, grad, cos, sin = draw((2, 3, 2, 6))
    tensor = paddle.to_tensor(x, stop_gradient=False)
    tables = paddle.to_tensor(cos), paddle.to_tensor(sin)
    rotary(tensor, *tables).backward(paddle.to_tensor(grad))
    for index in [(0, 0, 0, 0), (1, 2, 1, 5), (0, 1, 1, 3)]:
        ends = []
        for step in (1e-6, -1e-6):
            moved = x.copy()
            moved[index] += step
            ends.append((rotary(paddle.to_tensor(moved), *tables).numpy() * grad).sum())
        derivative = (ends[0] - ends[1]) / 2e-6
        assert tensor.grad.numpy()[index] == pytest.approx(derivative, abs=1e-8)


def test_equal_with_and_without_gradients():
    x, _, cos, sin = draw((2, 5, 4, 16), np.float32)
    tables = paddle.to_tensor(cos), paddle.to_tensor(sin)
    trained = rotary(paddle.to_tensor(x, stop_gradient=False), *tables)
    frozen = rotary(paddle.to_tensor(x), *tables)
    np.testing.assert_array_equal(trained.numpy(), frozen.numpy())
    assert frozen.stop_gradient and not trained.stop_gradient
