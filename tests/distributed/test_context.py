"""Sequences split over ranks beside whole rows in one process."""

import pytest

LIMIT = 1e-5  # of the largest number
HARD = {"packed": True, "prefix": 3}
ATTENTION = {
    2: [
        {"kind": "ulysses"},
        {"kind": "ring"},
        {"kind": "ulysses", **HARD, "heads": [4, 1]},
        {"kind": "ring", **HARD, "heads": [3, 1]},
        {"kind": "ring", "heads": [2, 2], "length": 4},
    ],
    4: [
        {"kind": "ulysses", "packed": True},
        {"kind": "ring", "packed": True},
        {"kind": "ulysses", **HARD, "heads": [8, 2]},
        {"kind": "ring", **HARD, "heads": [8, 2], "length": 24},
    ],
}
NETWORKS = [
    {"packed": True},
    {"late_labels": True},  # ranks without a label take part in all exchanges
    {"prefix": {}},
    {"lora": {"r": 2}, "packed": True, "recompute": "full"},
    {"recompute": "core_attn"},
]


@pytest.mark.parametrize("size", ATTENTION)
def test_attention_equals_whole_rows(ranks, size):
    """Outputs and the gradients of queries, keys and values; packed, prefixed, grouped heads."""
    for found in ranks(size, "jobs_context:compare_attention", size, ATTENTION[size]):
        for case, errors in zip(ATTENTION[size], found, strict=True):
            assert errors.keys() == {"out", "q", "k", "v"}
            assert max(errors.values()) <= LIMIT, (case, errors)


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_networks_equal_one_process(ranks, kind):
    """Losses, and gradients summed over ranks."""
    for found in ranks(2, "jobs_context:compare_networks", 2, kind, NETWORKS):
        for case, errors in zip(NETWORKS, found, strict=True):
            assert max(errors.values()) <= LIMIT, (case, errors)
