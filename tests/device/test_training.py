"""Training scripts with ``--device gpu`` on the rehearsal device."""

import numpy as np
import pytest

# bfloat16 weights with float32 master weights beside float32: rounding to 8 bits moves a mean over
# hundreds of tokens by some 1e-4, and a forgotten document border by 3e-3 and 2 %.
LOSS = {"rtol": 0, "atol": 1.5e-3}
NORM = {"rtol": 5e-3, "atol": 0}


def assert_follows(half, full):
    """Assert that a run in half precision gives what one in float32 gives, and is not that one."""
    np.testing.assert_allclose(half["loss"], full["loss"], **LOSS)
    np.testing.assert_allclose(half["grad_norm"], full["grad_norm"], **NORM)
    assert half["loss"] != full["loss"]
    assert np.ptp(full["loss"]) > LOSS["atol"], "the band holds nothing"


@pytest.fixture(scope="module")
def packed(finetune):
    """What packed documents give in float32."""
    return finetune(packing=1, max_seq_length=128)


def test_bfloat16_follows_float32(pretrain, float32):
    half = pretrain(bf16=1, fp16_opt_level="O2")
    assert_follows(half, float32)


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_packed_documents_in_bfloat16_follow_float32(finetune, packed, level):
    half = finetune(packing=1, max_seq_length=128, bf16=1, fp16_opt_level=level)
    assert_follows(half, packed)


def test_two_ranks_of_data_parallel_equal_one(pretrain, float32):
    two = pretrain(ranks=2)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(two[name], float32[name], rtol=0, atol=1e-5)


def test_training_that_forgets_the_waits_is_noticed(pretrain, float32):
    """What the test above is good for: sums that nobody waits for are not there in time."""
    two = pretrain(ranks=2, before="tests.device.jobs_device:forget_waits")
    assert not np.allclose(two["grad_norm"], float32["grad_norm"], rtol=0, atol=1e-5)
