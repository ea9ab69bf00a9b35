"""Predicted peak memory against what paddle's allocator counted on every rank of real updates."""

import dataclasses
import os

import pytest

from benchmarks.bench_memory import CASES, SHAPES, compare
from llm.llama.config import LlamaConfig
from llm.planner import Workload

# Small, with the proportions of a Llama: scores of the vocabulary do not drown the rest.
SHAPE = LlamaConfig(2048, 256, 688, 4, 8, 4, 1024)
LIMIT = 0.1
# In one process, whatever is trained on whatever shape.
LIMIT_OF_ONE = 0.03
# Less than the benchmark's 128256; more where the loss has to go by chunks.
VOCABULARY = {"large vocabulary, fused loss in chunks": 2**16 - 256}
# What `make test` measures of them; `make pages` measures all.
QUICK = ("large vocabulary, evaluated", "large vocabulary, LoRA", "prefix with a projection")
MEASURED = SHAPES if os.environ.get("RUN_PAGES") == "all" else QUICK


@pytest.mark.parametrize("name", ["one process", "tensor 2, recompute"])
def test_predicted_memory_is_measured(ranks, name):
    """All cases run in benchmarks/bench_memory.py, on a larger network."""
    found = compare(ranks, name, SHAPE)
    assert abs(found["error"]) <= LIMIT, found


@pytest.mark.parametrize("name", MEASURED)
def test_odd_shapes_and_adapters_take_what_is_predicted(ranks, name, monkeypatch):
    fields, work = SHAPES[name]
    if "vocab_size" in fields:
        fields = fields | {"vocab_size": VOCABULARY.get(name, 2**14)}
    monkeypatch.setitem(SHAPES, name, (fields, work))
    found = compare(ranks, name, SHAPE)
    assert abs(found["error"]) <= LIMIT_OF_ONE, found


def test_the_benchmark_covers_every_kind_of_layout():
    degrees = {key for layout, _ in CASES.values() for key in layout}
    assert degrees >= {"data", "sharding", "tensor", "pipeline", "context", "sequence_parallel"}
    assert {layout.get("sharding_stage") for layout, _ in CASES.values()} >= {1, 2, 3}


def test_the_benchmark_covers_what_the_formulas_know():
    """Every field of a workload is changed by some case, but those of GPUs and of pairs."""
    changed = {name for _, work in [*CASES.values(), *SHAPES.values()] for name in work}
    fields = {field.name for field in dataclasses.fields(Workload)}
    of_gpus = {"precision", "level", "master_grad", "offload", "recompute_offload"}
    of_gpus |= {"chunk_numbers", "fused_swiglu", "overlap"}
    by_the_machine = {"native", "tiled"}
    # Twice the rows; the rows of an evaluation; the first layers only; another width of the same.
    plain = {"pairs", "eval_length", "eval_scored", "recompute_layers", "prefix_hidden"}
    assert fields - changed == of_gpus | by_the_machine | plain
