"""Jobs for test_inference.py: generation and evaluation, in one process or over tensor ranks."""

from typing import Any

import numpy as np

from common.errors import UserError
from llm.engine.engine import Engine
from llm.engine.request import SamplingParams, requests
from llm.engine.runners import DygraphRunner
from llm.evaluation.scorer import NetworkScorer, Row
from llm.llama.adapters.opening import load_adapter
from llm.llama.build import load_model
from llm.llama.modeling import LlamaForCausalLM
from llm.parallel.layout import Layout
from llm.parallel.topology import Topology, start

PROMPTS = ([5, 17, 33], [9], list(range(1, 40)), [70, 2, 2, 8, 14])
Case = tuple[str, str | None]  # model directory, adapter directory


def answers(model: LlamaForCausalLM) -> tuple[list[list[int]], list[int]]:
    """Return greedy and sampled ids of all prompts, answered together; and the cache's shape."""
    runner = DygraphRunner(model, block_size=4)
    engine = Engine(runner, max_sequences=5, max_tokens=60, max_step_tokens=16)
    greedy = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
    drawn = [SamplingParams(max_new_tokens=6, seed=seed, ignore_eos=True) for seed in range(2)]
    found = engine.generate(requests([*PROMPTS, *PROMPTS[:2]], [*[greedy] * len(PROMPTS), *drawn]))
    return [completion.ids for completion in found], runner._caches[0].shape


def scores(model: LlamaForCausalLM) -> list[float]:
    """Return log-likelihoods of continuations of several lengths."""
    rng = np.random.default_rng(0)
    rows = []
    for length, wanted in ((5, 5), (20, 3), (33, 1), (33, 30), (7, 2)):
        ids = rng.integers(0, model.config.vocab_size, length + 1)
        rows.append(Row(ids[:-1], ids[-wanted:]))
    scorer = NetworkScorer(model, batch_size=3)
    return [score.logprob for score in scorer.score_rows(rows)]


def inferred(case: Case, topology: Topology | None = None) -> dict[str, Any]:
    """Answer and score with a model, or with this process's part of it."""
    path, adapter = case
    model = load_model(path, topology=topology)
    if adapter is not None:
        load_adapter(model, adapter)
    ids, cache = answers(model)
    return {"answers": ids, "cache": list(cache), "scores": scores(model)}


def infer(cases: list[Case], ranks: int) -> list[dict[str, Any]]:
    """Answer and score with each model over all ranks of the job."""
    topology = start(Layout(tensor=ranks))
    return [inferred(case, topology) for case in cases]


def refusal(case: Case, tensor: int, pipeline: int) -> str:
    """Return why a rank does not load a model or an adapter."""
    topology = start(Layout(tensor=tensor, pipeline=pipeline))
    path, adapter = case
    try:
        model = load_model(path, topology=topology)
        if adapter is not None:
            load_adapter(model, adapter)
    except UserError as error:
        return str(error)
    return "loaded"
