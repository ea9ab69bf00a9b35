"""Tensors made from arrays in every step."""

import numpy as np
import paddle
import pytest

from external_ops.tensors import tensor_from

ARRAYS = {
    "scores": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "settings": np.array([[0.1, np.nan, np.inf]]),
    "a number": np.array(3, np.int32),
    "none": np.empty([0, 5], np.float32),
    "every other one": np.arange(24).reshape(4, 6)[::2, ::3],
    "the other way": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "truths": np.array([True, False]),
    "halves": np.array([1.5, -0.0], np.float16),
    "small ones": np.array([-128, 127], np.int8),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("on_host", [False, True])
def test_contents(name, on_host):
    array = ARRAYS[name].copy(order="K")
    tensor, known = tensor_from(array, on_host=on_host), paddle.to_tensor(array)
    array.fill(0)  # a copy
    assert tensor.dtype == known.dtype
    assert tensor.shape == known.shape
    assert tensor.stop_gradient
    np.testing.assert_array_equal(tensor.numpy(), ARRAYS[name])
