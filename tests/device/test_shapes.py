"""Paddle's shape inference takes the operators of GPUs at the sizes of Llama 3 8B and 70B."""

import pytest

from tests.device.jobs_shapes import SIZES


@pytest.mark.parametrize("size", SIZES)
def test_operators_at_the_sizes_of_real_models(device, size):
    (found,) = device.call("gpu", "tests.device.jobs_shapes:inferred", size)
    hidden, heads, groups, ffn = SIZES[size]
    expected = {
        "block_multihead_attention": [24, heads * 128],
        "flash_attn_unpadded": [24, heads, 128],
        "rotary": [2, 512, heads, 128],
        "swiglu": [24, ffn],
        "swiglu joined": [24, ffn],
        "norm of a sum": [24, hidden],
        "int8": [24, 2 * ffn],
        "int4": [24, hidden],
        "int4 in groups": [24, (heads + 2 * groups) * 128],
    }
    assert {name: shape for name, (shape, _) in found.items()} == expected
    assert {dtype for _, dtype in found.values()} == {"paddle.bfloat16"}
