"""Tensor and sequence parallel networks beside the same network in one process."""

import pytest

LIMIT = 1e-5  # of the largest number of each tensor; jobs_tensor says how it is measured


def largest(found):
    """Return the largest of all differences that a job reports."""
    if isinstance(found, dict):
        return max(largest(value) for value in found.values())
    return found


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize("size", [2, 4])
def test_losses_gradients_logits_and_weights_equal_one_process(ranks, size, sequence):
    """Grouped heads, biases, packed rows, ignored labels; tied and not; both kernels of the loss;
    recomputed and not.

    The job also asserts that no rank holds more than its share, and the lengths that norms see.
    """
    for found in ranks(size, "jobs_tensor:networks", size, sequence):
        assert len(found) == (4 if size == 2 else 2)
        assert largest(found) < LIMIT, found


METHODS = {
    "lora": {},
    "dora on pissa, whole layers": {
        "use_dora": True,
        "init_lora_weights": "pissa_niter_8",
        "modules_to_save": ["embed_tokens", "norm"],
    },
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
def test_lora_equals_one_process(ranks, sequence, method, tmp_path):
    """Fresh, from files, with dropout, and merged."""
    options = (2, sequence, str(tmp_path), METHODS[method])
    for found in ranks(2, "jobs_tensor:adapters", *options):
        assert found.keys() == {"fresh", "loaded", "dropout", "merged"}
        assert largest(found) < LIMIT, found


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
def test_prefixes_equal_one_process(ranks, sequence):
    for found in ranks(2, "jobs_tensor:prefixes", 2, sequence):
        assert largest(found) < LIMIT, found


def test_answers_equal_one_process(ranks):
    answers = ranks(2, "jobs_tensor:generation", 2)
    assert answers[0] == answers[1] and [len(ids) for ids in answers[0]] == [6, 6]
