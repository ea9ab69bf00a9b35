"""Integer weights in the layout of Paddle's CUDA kernel, beside what Paddle itself lays out."""

import numpy as np
import paddle
import pytest

from external_ops.weight_only import interleaved, why_not

RANDOM = np.random.default_rng(3)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(64, 128), (192, 64), (128, 320)])
def test_the_layout_is_that_of_paddles_operator(bits, shape):
    limit = 2 ** (bits - 1) - 1
    integers = RANDOM.integers(-limit, limit + 1, shape).astype(np.int8)
    integers[:, 0] = limit  # so that Paddle, which chooses scales, takes 1
    weight = paddle.to_tensor(integers.T.astype("float32")).astype("bfloat16")
    wanted, scale = paddle._C_ops.weight_quantize(weight, f"weight_only_int{bits}", 80, -1)
    assert (scale.astype("float32").numpy() == 1).all()
    np.testing.assert_array_equal(interleaved(integers, bits), wanted.numpy())


@pytest.mark.parametrize(
    ("outputs", "inputs", "groups", "architecture", "said"),
    [
        (128, 256, 1, 90, ""),
        (128, 256, 4, 80, ""),
        (128, 256, 2, 75, ""),
        (128, 256, 8, 90, "groups of 64 or 128, not of 32"),
        (100, 256, 1, 90, "tiles of 64; the weight is 100 x 256"),
        (128, 100, 1, 90, "tiles of 64; the weight is 128 x 100"),
        (128, 256, 1, 70, "this GPU has 7.0"),
        (128, 256, 1, 120, "this GPU has 12.0"),
    ],
)
def test_weights_that_it_does_not_take(outputs, inputs, groups, architecture, said):
    found = why_not(outputs, inputs, groups, architecture)
    assert said in found and bool(said) == bool(found)
