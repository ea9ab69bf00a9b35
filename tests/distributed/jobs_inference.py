"""Jobs for test_inference.py: generation and evaluation, in one process or over tensor ranks."""

from typing import Any

import numpy as np

from common.errors import UserError
from llm.engine.engine import Engine
from llm.engine.processes import Team, share
from llm.engine.request import SamplingParams, requests
from llm.engine.runners import DygraphRunner
from llm.evaluation.scorer import PagedScorer, Row
from llm.llama.adapters.opening import load_adapter
from llm.llama.build import load_model
from llm.llama.fused import pack_where_possible
from llm.llama.modeling import LlamaForCausalLM
from llm.parallel.layout import Layout
from llm.parallel.topology import Topology, start

PROMPTS = ([5, 17, 33], [9], list(range(1, 40)), [70, 2, 2, 8, 14])
Case = tuple[str, str | None, str]  # model directory, adapter directory, type to compute in


def answers(runner: DygraphRunner) -> tuple[list[list[int]], list[int], bool]:
    """Answer all prompts together, greedily and at random, and each of them alone.

    Returns:
        Ids of all answers together; the cache's shape; whether each alone has the same tokens and
        log-probabilities, bit for bit.
    """
    engine = Engine(runner, max_sequences=5, max_tokens=60, max_step_tokens=16, prefix_cache=False)
    greedy = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
    drawn = [SamplingParams(max_new_tokens=6, seed=seed, ignore_eos=True) for seed in range(2)]
    asked = requests([*PROMPTS, *PROMPTS[:2]], [*[greedy] * len(PROMPTS), *drawn])
    found = engine.generate(asked)
    alike = all(engine.generate([one]) == [here] for one, here in zip(asked, found, strict=True))
    return [completion.ids for completion in found], runner._caches[0].shape, alike


def scores(runner: DygraphRunner) -> list[float]:
    """Return log-likelihoods of continuations of several lengths."""
    rng = np.random.default_rng(0)
    rows = []
    for length, wanted in ((5, 5), (20, 3), (33, 1), (33, 30), (7, 2)):
        ids = rng.integers(0, runner.vocab_size, length + 1)
        rows.append(Row(ids[:-1], ids[-wanted:]))
    scorer = PagedScorer(runner, batch_size=3)
    return [score.logprob for score in scorer.score_rows(rows)]


def inferred(runner: DygraphRunner) -> dict[str, Any]:
    """Answer and score with a model, or lead those that share it."""
    ids, cache, alike = answers(runner)
    found = {"answers": ids, "cache": list(cache), "scores": scores(runner)}
    return {**found, "alike": alike, "packed": runner.model.seams.fused is not None}


def opened(case: Case, topology: Topology | None = None) -> LlamaForCausalLM:
    """Load a model, or this process's part of it, packed where that can be."""
    path, adapter, dtype = case
    model = load_model(path, dtype=dtype, topology=topology, to_pack=True)
    if adapter is not None:
        load_adapter(model, adapter)
    pack_where_possible(model)
    return model


def alone(case: Case) -> dict[str, Any]:
    """Answer and score in one process."""
    return inferred(DygraphRunner(opened(case), block_size=4))


def infer(cases: list[Case], ranks: int) -> list[dict[str, Any]] | None:
    """Answer and score with each model over all ranks of the job; the leader's results."""
    topology = start(Layout(tensor=ranks))
    team = Team(topology)
    results = []
    with team.opening():
        for case in cases:
            runner = share(team, opened(case, topology), block_size=4)
            if runner is not None:
                results.append(inferred(runner))
                team.dismiss()
    team.close()
    return results if team.leads else None


def refusal(case: Case, tensor: int, pipeline: int) -> str:
    """Return why a rank does not load a model or an adapter."""
    topology = start(Layout(tensor=tensor, pipeline=pipeline))
    path, adapter, _ = case
    try:
        model = load_model(path, topology=topology)
        if adapter is not None:
            load_adapter(model, adapter)
    except UserError as error:
        return str(error)
    return "loaded"
