"""Jobs that run the stages of a pipeline and compare them with the whole network in one process."""

from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from external_ops.backend import select_ops
from llm.llama.adapters.lora import LoRAConfig, add_lora
from llm.llama.adapters.prefix import PrefixConfig, add_prefix
from llm.llama.config import LlamaConfig
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.pipeline import LlamaPieces, mark_stage_shared
from llm.llama.recompute import recompute_layers
from llm.parallel import gloo, topology
from llm.parallel.layout import Layout
from llm.parallel.pipeline import Pipeline
from llm.parallel.rules import parse_options
from llm.train.objectives import next_token_objective
from llm.train.preference import DPOObjective, sequence_log_probs
from llm.train.processes import answer_scorer

VOCABULARY = 48


def config(**fields: Any) -> LlamaConfig:
    """A tiny architecture with shared key/value heads."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaConfig(**{**sizes, "max_position_embeddings": 128, "head_dim": 8, **fields})


def network(case: dict[str, Any], stage: Any = None) -> LlamaForCausalLM:
    """The network of a case, whole or a stage of it."""
    model = LlamaForCausalLM(config(**case.get("config", {})), select_ops(), stage=stage)
    for name, parameter in model.named_parameters():
        parameter.name = name
    if "lora" in case:
        add_lora(model, LoRAConfig(**case["lora"]), seed=0)
    if "prefix" in case:
        add_prefix(model, PrefixConfig(num_virtual_tokens=3, **case["prefix"]), seed=0)
    mark_stage_shared(model)
    return model


def fill(model: LlamaForCausalLM, seed: int) -> dict[str, np.ndarray]:
    """Give every parameter random values, B of LoRA included."""
    rng = np.random.default_rng(seed)
    values = {}
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name else 0.0
        values[name] = (centre + 0.2 * rng.standard_normal(parameter.shape)).astype(np.float32)
        parameter.set_value(values[name])
    return values


def batches(case: dict[str, Any], seed: int, count: int) -> list[dict[str, paddle.Tensor]]:
    """Micro-batches: of one length or of several, packed, or pairs with a reference."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        rows, length = (2, 12) if not case.get("lengths") else (2 + number % 2 * 2, 6 + 3 * number)
        ids = rng.integers(0, VOCABULARY, [rows, length])
        labels = rng.integers(0, VOCABULARY, [rows, length])
        labels[:, : length // 3] = -100
        batch = {"input_ids": ids, "labels": labels}
        if case.get("packed"):
            cut = length // 2
            batch["positions"] = np.tile(np.r_[np.arange(cut), np.arange(length - cut)], (rows, 1))
            batch["segments"] = np.tile(np.arange(length) // cut, (rows, 1))
        if case.get("dpo"):
            batch["reference_logps"] = -20 - rng.random(rows).astype(np.float32)
        made.append({name: paddle.to_tensor(value) for name, value in batch.items()})
    return made


class Scaler:
    """Multiplies losses, as float16 training does."""

    factor = 512.0

    def scale(self, loss: paddle.Tensor) -> paddle.Tensor:
        """Return the loss times the factor."""
        return loss * self.factor


def gradients(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """Gradients by name, cleared after reading."""
    trained = {n: p for n, p in model.named_parameters() if not p.stop_gradient}
    found = {n: None if p.grad is None else p.grad.numpy() for n, p in trained.items()}
    model.clear_gradients()
    return found


def _summed_over_stages(
    model: LlamaForCausalLM, found: dict[str, np.ndarray], run: topology.Topology
) -> dict[str, np.ndarray]:
    """Add up what stages hold in common, as the updater does."""
    shared = {n for n, p in model.named_parameters() if getattr(p, "stage_shared", False)}
    parts: list[dict[str, np.ndarray]] = []
    dist.all_gather_object(
        parts, {n: found[n] for n in shared & set(found)}, group=run.pipeline_group
    )
    return {
        name: sum(part[name] for part in parts if name in part) if name in shared else value
        for name, value in found.items()
    }


def compare(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run cases of one layout after another.

    Returns:
        for each case the largest differences of the losses, the gradients and an evaluation from
        one process, the largest gradient, and the names of the stage's parameters.
    """
    layout = Layout(**cases[0]["layout"])
    run = topology.start(layout)
    results = [_compare(case, layout, run) for case in cases]
    gloo.flush()
    run.barrier()
    return results


def _compare(case: dict[str, Any], layout: Layout, run: topology.Topology) -> dict[str, Any]:
    objective = DPOObjective() if case.get("dpo") else next_token_objective
    whole = network(case)
    values = fill(whole, seed=1)
    stage = layout.stages(whole.config.num_hidden_layers)[run.at.pipeline]
    part = network(case, stage)
    for name, parameter in part.named_parameters():
        parameter.set_value(values[name])
    if "recompute" in case:
        recompute_layers(part, granularity=case["recompute"])
    options, _ = parse_options(case.get("options", ""))
    pipeline = Pipeline(LlamaPieces(part), run, options)

    def loss(model: Any, batch: dict[str, paddle.Tensor]) -> paddle.Tensor:
        return objective(model, batch)[0] / 100

    result = {"loss": 0.0, "gradient": 0.0, "names": [n for n, _ in part.named_parameters()]}
    for step in range(case.get("steps", 1)):
        micro = batches(case, 10 + step, case.get("micro", 2))
        if case.get("evaluates"):
            result["evaluation"] = _evaluate(pipeline, whole, micro[-1:], objective)
        expected = sum(loss(whole, batch) for batch in micro)
        expected.backward()
        scaler = Scaler() if case.get("scaled") else None
        total = pipeline.forward_backward(micro, loss, scaler=scaler)
        result["loss"] = max(result["loss"], abs(total.item() - expected.item()))
        wanted = gradients(whole)
        got = _summed_over_stages(part, gradients(part), run)
        for name, value in got.items():
            scale = Scaler.factor if scaler else 1.0
            error = abs((0.0 if value is None else value / scale) - wanted[name]).max()
            result["gradient"] = max(result["gradient"], float(error))
        result["largest"] = float(max(abs(value).max() for value in wanted.values()))
    whole.eval()
    part.eval()
    result["evaluation"] = _evaluate(pipeline, whole, micro[-1:], objective)
    if case.get("dpo"):
        words = micro[-1]["input_ids"], micro[-1]["labels"]
        wanted = sequence_log_probs(whole, *words)
        error = (answer_scorer(part, run)(*words) - wanted).abs().max()
        result["evaluation"] = max(result["evaluation"], error.item())
    return result


def _evaluate(pipeline: Pipeline, whole: LlamaForCausalLM, micro: list, objective: Any) -> float:
    worst = 0.0
    for batch in micro:
        total, weight, figures = objective(whole, batch)
        got = pipeline.evaluate(batch, objective)
        assert got[1] == weight and set(got[2]) == set(figures)
        worst = max(worst, abs(got[0] - total.item()))
        for name, (value, count) in figures.items():
            assert got[2][name][1] == count
            worst = max(worst, abs(got[2][name][0] - value))
    return worst
