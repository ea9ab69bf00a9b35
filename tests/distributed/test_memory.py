"""Predicted peak memory against what paddle's allocator counted on every rank of real updates."""

import pytest

from benchmarks.bench_memory import CASES, compare
from llm.llama.config import LlamaConfig

# Small, with the proportions of a Llama: scores of the vocabulary do not drown the rest.
SHAPE = LlamaConfig(2048, 256, 688, 4, 8, 4, 1024)
LIMIT = 0.1


@pytest.mark.parametrize("name", ["one process", "tensor 2, recompute"])
def test_predicted_memory_is_measured(ranks, name):
    """All cases run in benchmarks/bench_memory.py, on a larger network."""
    found = compare(ranks, name, SHAPE)
    assert abs(found["error"]) <= LIMIT, found


def test_the_benchmark_covers_every_kind_of_layout():
    degrees = {key for layout, _ in CASES.values() for key in layout}
    assert degrees >= {"data", "sharding", "tensor", "pipeline", "context", "sequence_parallel"}
    assert {layout.get("sharding_stage") for layout, _ in CASES.values()} >= {1, 2, 3}
