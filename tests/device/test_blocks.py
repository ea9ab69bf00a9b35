"""Generation through Paddle's kernels for blocks: prompts, their later parts and single tokens.

Whole rows in float32 say what is right: no cache, no blocks, another attention.
"""

import numpy as np
import pytest

from tests.device.jobs_blocks import STEPS

JOBS = "tests.device.jobs_blocks"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# Two layers of half precision beside float32: error by size, of each token's logits.
BAND = {"bfloat16": 4e-2, "float16": 8e-3}


def check_rows(logits, expected, band, name=""):
    assert np.isfinite(logits).all(), name
    wrong = np.linalg.norm(np.subtract(logits, expected), axis=-1)
    assert (wrong / np.linalg.norm(expected, axis=-1)).max() < band, name


def check_steps(found, band):
    for name in STEPS:
        logits, where = found[name]
        check_rows(logits, [found["whole"][key][place] for key, place in where], band, name)


@pytest.mark.parametrize(
    ("dtype", "shape", "block", "prefix"),
    [
        ("bfloat16", {"rope_scaling": YARN}, 32, 0),
        ("float16", {"num_key_value_heads": 4, "attention_bias": True}, 1, 0),
        ("float16", {"num_key_value_heads": 1, "hidden_size": 256}, 64, 0),
        ("float16", {}, None, 32),
    ],
)
def test_steps_score_as_whole_rows(device, dtype, shape, block, prefix):
    (found,) = device.call("gpu", f"{JOBS}:steps", dtype, shape, block, prefix)
    check_steps(found, BAND[dtype])
    check_rows(found["rows"], found["rows expected"], BAND[dtype])


@pytest.mark.parametrize(
    ("kind", "group", "linear"),
    [
        ("W8", None, "WeightOnlyLinear"),
        ("W4", 64, "WeightOnlyLinear"),
        ("W4", 32, "QuantizedLinear"),
        ("A8W8", None, "QuantizedLinear"),
    ],
)
def test_integer_weights(device, kind, group, linear):
    (found,) = device.call("gpu", f"{JOBS}:quantized", kind, group, "float16")
    assert found["linear"] == linear
    # An input that half precision moves over the middle between two integers moves by a whole one.
    check_steps(found, 0.1 if kind.startswith("A8") else BAND["float16"])


def test_ranks_that_share_a_network(device):
    leader, follower = device.call("gpu", f"{JOBS}:shared", 2, ranks=2)
    check_steps(leader, BAND["bfloat16"])
    assert follower is None


def test_networks_that_the_kernels_do_not_run_say_why(device):
    (found,) = device.call("gpu", f"{JOBS}:reasons")
    exported, wide, small, reference, form = found
    assert "told apart on the host" in exported
    assert "bfloat16 and float16, not float32" in wide
    assert "heads of 32, 64, 96, 128, not of 8" in small
    assert "--ops reference" in reference
    assert form == "paddle"
