"""Jobs that split sequences over ranks and compare them with whole rows in one process."""

from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from external_ops import block_attention as blocks
from external_ops.flash_attention import causal_attention_ref
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.recompute import recompute_layers
from llm.parallel import gloo, topology
from llm.parallel.context import context_attention, cut, part
from llm.parallel.layout import Layout
from llm.train.objectives import next_token_objective
from tests.distributed.jobs_pipeline import fill, network


def compare_attention(ranks: int, cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Largest differences of output and gradients of attention, for cases of both kinds."""
    blocks._TILE = 3  # several tiles in these short rows, the last one shorter
    runs = {}
    for kind in ("ulysses", "ring"):
        layout = Layout(context=ranks, context_kind=kind)
        runs[kind] = replace(topology.start(layout), layout=layout)
    results = [_compare_attention(case, runs[case["kind"]]) for case in cases]
    gloo.flush()
    topology.start(Layout(context=ranks)).barrier()
    return results


def _inputs(case: dict[str, Any]) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    rng = np.random.default_rng(7)
    batch, length, prefix = 2, case.get("length", 16), case.get("prefix", 0)
    heads, groups = case.get("heads", [8, 4])
    shapes = {"q": [length, heads], "k": [prefix + length, groups], "v": [prefix + length, groups]}
    values = {n: rng.standard_normal([batch, *s, 6]).astype(np.float32) for n, s in shapes.items()}
    values["grad"] = rng.standard_normal(values["q"].shape).astype(np.float32)
    if not case.get("packed"):
        return values, None
    return values, np.sort(rng.integers(0, 4, [batch, length]), axis=1)


def _attended(
    attention: Any, values: dict[str, np.ndarray], segments: Any
) -> dict[str, np.ndarray]:
    tensors = {n: paddle.to_tensor(v, stop_gradient=n == "grad") for n, v in values.items()}
    where = None if segments is None else paddle.to_tensor(segments)
    out = attention(tensors["q"], tensors["k"], tensors["v"], where)
    out.backward(tensors["grad"])
    return {"out": out.numpy(), **{n: tensors[n].grad.numpy() for n in "qkv"}}


def _compare_attention(case: dict[str, Any], run: topology.Topology) -> dict[str, float]:
    values, segments = _inputs(case)
    prefix, length = case.get("prefix", 0), values["q"].shape[1]
    wanted = _attended(causal_attention_ref, values, segments)
    held = part(length, run.at.context, run.layout.context, run.layout.context_kind)
    rows = {n: np.r_[np.arange(prefix), held + prefix] if n in "kv" else held for n in values}
    own = {n: v[:, rows[n]] for n, v in values.items()}
    attention = context_attention(causal_attention_ref, run)
    got = _attended(attention, own, None if segments is None else segments[:, held])
    worst = {}
    for name, value in got.items():
        expected = wanted[name][:, rows.get(name, held)]
        if name in "kv" and prefix:  # every rank has a part of the prefix's gradient
            total = paddle.to_tensor(value[:, :prefix])
            dist.all_reduce(total, group=run.context_group)
            value[:, :prefix] = total.numpy()
        worst[name] = float(np.abs(value - expected).max() / np.abs(expected).max())
    return worst


def compare_networks(ranks: int, kind: str, cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Largest differences of losses and summed gradients of whole networks."""
    run = topology.start(Layout(context=ranks, context_kind=kind))
    results = [_compare_networks(case, run) for case in cases]
    gloo.flush()
    run.barrier()
    return results


def _batch(case: dict[str, Any]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    ids = rng.integers(0, 48, [2, 16])
    labels = rng.integers(0, 48, [2, 16])
    if case.get("late_labels"):  # ranks without any label that counts
        labels[:, :12] = -100
    batch = {"input_ids": ids, "labels": labels}
    if case.get("packed"):
        batch["positions"] = np.tile(np.r_[np.arange(7), np.arange(9)], (2, 1))
        batch["segments"] = np.tile((np.arange(16) >= 7).astype(np.int64), (2, 1))
    return batch


def _step(model: LlamaForCausalLM, batch: dict[str, np.ndarray]) -> tuple[paddle.Tensor, Any]:
    tensors = {name: paddle.to_tensor(value) for name, value in batch.items()}
    loss = next_token_objective(model, tensors)[0]
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if not p.stop_gradient}
    return loss.detach(), {n: p.grad.numpy() for n, p in trained.items()}


def _compare_networks(case: dict[str, Any], run: topology.Topology) -> dict[str, float]:
    whole, model = network(case), network(case)
    values = fill(whole, seed=1)
    for name, parameter in model.named_parameters():
        parameter.set_value(values[name])
    model.seams.attention = context_attention(model.seams.attention, run)
    if "recompute" in case:
        recompute_layers(model, granularity=case["recompute"])
    batch = _batch(case)
    wanted_loss, wanted = _step(whole, batch)
    loss, got = _step(model, cut(batch, run))
    dist.all_reduce(loss, group=run.context_group)
    worst = 0.0
    for name, value in got.items():
        total = paddle.to_tensor(value)
        dist.all_reduce(total, group=run.context_group)
        worst = max(worst, float(np.abs(total.numpy() - wanted[name]).max()))
    scale = max(np.abs(value).max() for value in wanted.values())
    error = abs(loss.item() - wanted_loss.item()) / wanted_loss.item()
    return {"loss": error, "gradient": worst / float(scale)}
