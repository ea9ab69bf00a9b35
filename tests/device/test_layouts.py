"""Two ranks that share a model in each way, beside one: what they log is what one logs."""

import numpy as np
import pytest

HALF = {"bf16": 1, "fp16_opt_level": "O2"}
LAYOUTS = {
    "tensor": {"tensor_parallel_degree": 2},
    "sequence": {"tensor_parallel_degree": 2, "sequence_parallel": 1},
    "pipeline": {"pipeline_parallel_degree": 2},
    "ring": {"context_parallel_degree": 2},
    "ulysses": {"sep_parallel_degree": 2},
    "stage1": {"sharding": "stage1", "sharding_parallel_degree": 2},
    "stage2": {"sharding": "stage2", "sharding_parallel_degree": 2},
    "stage3": {"sharding": "stage3", "sharding_parallel_degree": 2},
}


@pytest.fixture(scope="module")
def one(pretrain):
    """What one GPU gives in bfloat16."""
    return pretrain(**HALF)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_in_bfloat16(pretrain, one, layout):
    """Sums of bfloat16 in another order: a rounding of the logits, and of some gradients, which the
    first updates of AdamW turn into whole ones."""
    shares = 2 if layout.startswith("stage") else 1
    flags = HALF | LAYOUTS[layout] | {"gradient_accumulation_steps": 2 // shares}
    two = pretrain(ranks=2, **flags)
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=0, atol=2e-3)
    np.testing.assert_allclose(two["grad_norm"], one["grad_norm"], rtol=1e-2, atol=0)
    np.testing.assert_allclose(two["loss"][0], one["loss"][0], rtol=0, atol=2e-4)
    np.testing.assert_allclose(two["grad_norm"][0], one["grad_norm"][0], rtol=1e-3, atol=0)
