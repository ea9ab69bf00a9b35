"""Predicted against measured peak memory of every rank: layouts and odd shapes, on CPU.

Layouts are those of a 32 M-parameter model, in one process shapes and ways to train differ: a
vocabulary that is large beside the hidden size, long rows, adapters, labels on answers only.

Each rank trains real updates and reads what paddle's own allocator counted: the same figure that
``max_memory_allocated`` is on a GPU. It is taken from the moment before the network exists, after a
tiny network has trained under the same layout, so that what the runtime and the communication hold
by themselves is not in it. The rise of the process's resident memory is reported beside it; it is
larger by what the C library keeps of freed blocks.
"""

import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llm.llama.config import LlamaConfig
from llm.parallel.layout import Layout
from llm.planner import Workload, predict

SHAPE = LlamaConfig(8192, 512, 1376, 8, 8, 4, 1024)
WARM = LlamaConfig(64, 32, 64, 4, 4, 4, 1024)
BASE = {"micro_batch": 2, "accumulation": 2, "seq_length": 256, "flash": True, "fused_norm": True}
NATIVE = importlib.util.find_spec("llama_paddle_ops") is not None
KERNELS = {"native": NATIVE, "tiled": not NATIVE}
SHARDED = {"sharding": 2}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one process": ({}, {"accumulation": 1}),
    "one process, recompute": ({}, {"recompute": "full"}),
    "data 2": ({"data": 2}, {}),
    "sharding 2, stage 1": (SHARDED | {"sharding_stage": 1}, {}),
    "sharding 2, stage 2": (SHARDED | {"sharding_stage": 2}, {}),
    "sharding 2, stage 3": (SHARDED | {"sharding_stage": 3}, {}),
    "tensor 2": ({"tensor": 2}, {}),
    "tensor 2, sequence parallel": ({"tensor": 2, "sequence_parallel": True}, {}),
    "tensor 2, recompute": ({"tensor": 2}, {"recompute": "full"}),
    "pipeline 2": ({"pipeline": 2}, {"accumulation": 4}),
    "tensor 2 x pipeline 2, recompute": (
        {"tensor": 2, "pipeline": 2},
        {"accumulation": 4, "recompute": "full"},
    ),
    "context 2 (ring)": ({"context": 2}, {}),
}
# In one process: what of the shape and of the workload differs.
LARGE = {"vocab_size": 128256, "hidden_size": 64, "intermediate_size": 176, "head_dim": 8}
ONE = {"accumulation": 1}
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "large vocabulary": (LARGE, ONE | {"micro_batch": 1}),
    "large vocabulary, accumulated": (LARGE, {"micro_batch": 1}),
    "large vocabulary, fused loss": (LARGE, ONE | {"fused_head": True}),
    "large vocabulary, fused loss in chunks": (
        LARGE,
        ONE | {"fused_head": True, "seq_length": 1024},
    ),
    "large vocabulary, tied": (LARGE | {"tie_word_embeddings": True}, ONE | {"micro_batch": 1}),
    "large vocabulary, evaluated": (LARGE, ONE | {"micro_batch": 1, "eval_batch": 3}),
    "large vocabulary, answers only": (LARGE, ONE | {"scored": 32}),
    "large vocabulary, LoRA": (LARGE, ONE | {"scored": 32, "lora_rank": 8}),
    "long rows": ({}, ONE | {"micro_batch": 1, "seq_length": 1024}),
    "long rows, references": (
        {},
        ONE | {"micro_batch": 1, "seq_length": 1024, "flash": False, "fused_norm": False},
    ),
    "tied": ({"tie_word_embeddings": True}, {}),
    "LoRA": ({}, ONE | {"lora_rank": 8}),
    "LoRA on q_proj": ({}, ONE | {"lora_rank": 8, "lora_targets": ["self_attn.q_proj"]}),
    "LoRA, dropout": ({}, ONE | {"lora_rank": 8, "lora_dropout": True}),
    "LoRA, recompute": ({}, ONE | {"lora_rank": 8, "recompute": "full"}),
    "prefix": ({}, ONE | {"prefix": 64}),
    "prefix with a projection": ({}, ONE | {"prefix": 64, "prefix_projection": True}),
}
UPDATES = 2  # the first makes the optimizer's state, the second has it all along


@dataclasses.dataclass
class Flags:
    """What ``llm.train.processes.arrange`` reads of a run's flags."""

    pipeline_parallel_config: str = ""
    overlap_communication: bool = False


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}")


def _batches(shape: LlamaConfig, layout: Layout, work: Workload) -> list[dict[str, Any]]:
    import numpy as np
    import paddle

    random = np.random.default_rng(0)
    size = [work.micro_batch, work.seq_length]
    batches = []
    for _ in range(work.accumulation):
        ids, labels = (random.integers(0, shape.vocab_size, size) for _ in range(2))
        if work.scored is not None:
            labels.reshape(-1)[work.scored :] = -100
        batches.append({"input_ids": paddle.to_tensor(ids), "labels": paddle.to_tensor(labels)})
    return batches


def _adapt(model: Any, work: Workload) -> None:
    """Freeze the network and add what the workload trains beside it."""
    from llm.llama.adapters.lora import LoRAConfig, add_lora
    from llm.llama.adapters.prefix import PrefixConfig, add_prefix

    if work.lora_rank:
        targets = {"target_modules": tuple(work.lora_targets)} if work.lora_targets else {}
        dropout = 0.1 if work.lora_dropout else 0.0
        add_lora(model, LoRAConfig(r=work.lora_rank, lora_dropout=dropout, **targets), seed=0)
    if work.prefix:
        config = PrefixConfig(
            num_virtual_tokens=work.prefix, prefix_projection=work.prefix_projection
        )
        add_prefix(model, config, seed=0)


def _train(shape: LlamaConfig, work: Workload, topology: Any) -> None:
    """Run updates as the trainer does: micro-batches, then one step of the optimizer."""
    import paddle

    from llm.llama.build import build_model
    from llm.parallel.updater import Updater
    from llm.train.objectives import next_token_objective
    from llm.train.processes import arrange

    model = build_model(
        shape,
        seed=0,
        use_flash_attention=work.flash,
        use_fused_rms_norm=work.fused_norm,
        use_fused_head_and_loss_fn=work.fused_head,
        recompute=work.recompute != "none",
        topology=topology,
    )
    fields = arrange(model, topology, Flags())
    _adapt(model, work)
    updater = Updater(
        model.parameters(),
        lambda owned: paddle.optimizer.AdamW(1e-4, parameters=owned),
        topology,
        max_norm=1.0,
        units=fields.get("units", ()),
    )
    pipeline, cut = fields.get("pipeline"), fields.get("cut", lambda batch: batch)
    model.train()

    def loss(view: Any, part: dict[str, Any]) -> Any:
        total, weight, _ = next_token_objective(view, part)
        return total / (weight * work.accumulation)

    for _ in range(UPDATES):
        updater.begin()
        parts = [cut(part) for part in _batches(shape, topology.layout, work)]
        if pipeline is not None:
            pipeline.forward_backward(parts, loss)
        else:
            for part in parts:
                loss(model, part).backward()
        updater.step()
        updater.clear_grad()
        if work.eval_batch:
            model.eval()
            with paddle.no_grad():
                for part in _batches(shape, topology.layout, work.evaluating()):
                    next_token_objective(model, part)
            model.train()


def measure(shape: dict[str, Any], layout: dict[str, Any], work: dict[str, Any]) -> dict[str, int]:
    """Return the rise of this rank's peak memory over the state before the network was built."""
    from paddle.base import core

    from llm.parallel import topology as topologies

    topology = topologies.start(Layout(**layout))
    workload = Workload(**work)
    if work.get("lora_targets"):
        workload = workload.replace(lora_targets=tuple(work["lora_targets"]))
    _train(WARM, workload, topology)
    before = core.host_memory_stat_current_value("Allocated", 0)
    resident = _status("VmRSS")
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # starts VmHWM anew
    _train(LlamaConfig(**shape), workload, topology)
    peak = core.host_memory_stat_peak_value("Allocated", 0)
    return {"allocated": peak - before, "resident": _status("VmHWM") - resident}


def compare(ranks: Any, name: str, shape: LlamaConfig = SHAPE) -> dict[str, Any]:
    """Run a case and return the ranks' peaks beside the stages' predictions.

    Args:
        ranks: runs a function on every rank: ``tests.distributed.rank_server.RankServer``.
        name: of :data:`CASES`, or of :data:`SHAPES`.
        shape: of the network.
    """
    degrees, changes = CASES.get(name) or ({}, SHAPES[name][1])
    if name in SHAPES:
        shape = dataclasses.replace(shape, **SHAPES[name][0])
    layout = Layout(**degrees)
    work = BASE | changes
    found = predict(shape, layout, Workload(**work, **KERNELS))
    shape_fields = dataclasses.asdict(shape) | {"rope_scaling": shape.rope_scaling}
    shape_fields.pop("rope_scaling")
    measured = ranks(
        layout.world_size,
        "benchmarks.bench_memory:measure",
        shape_fields,
        degrees,
        work | KERNELS,
        timeout=300,
    )
    rows = []
    for rank, peak in enumerate(measured):
        predicted = found.stages[layout.coordinates(rank).pipeline].total
        rows.append({"rank": rank, "predicted": round(predicted), **peak})
    worst = max(rows, key=lambda row: abs(row["predicted"] / row["allocated"] - 1))
    error = worst["predicted"] / worst["allocated"] - 1
    return {"case": name, "ranks": rows, "error": round(error, 4)}


def main() -> None:
    """Run all cases, print a table and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", choices=[*CASES, *SHAPES], default=[*CASES])
    parser.add_argument("--shapes", action="store_true", help="the odd shapes, in one process")
    parser.add_argument("--keep", action="store_true", help="append to benchmarks/results")
    args = parser.parse_args()
    import record
    from tqdm import tqdm

    from tests.distributed.rank_server import RankServer

    names = [*SHAPES] if args.shapes else args.cases
    server = RankServer()
    try:
        results = [compare(server, name) for name in tqdm(names, disable=None)]
    finally:
        server.close()
    print(f"{'case':40} predicted  allocated  resident (MB, the worst rank)  error")
    for result in results:
        worst = max(result["ranks"], key=lambda row: row["allocated"])
        figures = [worst[name] / 1e6 for name in ("predicted", "allocated", "resident")]
        print(
            f"{result['case']:40} {figures[0]:9.1f}  {figures[1]:9.1f}  {figures[2]:8.1f}"
            f"{'':23} {result['error']:+.1%}"
        )
    if args.keep:
        row = {"results": results, "shape": dataclasses.asdict(SHAPE), **record.environment()}
        print(f"written to {record.write_row('memory', row)}")


if __name__ == "__main__":
    main()
