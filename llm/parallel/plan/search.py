"""Layouts that fit, ranked by predicted time: every combination of degrees, tried."""

from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace

from llm.errors import UserError
from llm.llama.config import LlamaConfig
from llm.parallel.layout import Layout, divisors
from llm.parallel.plan.hardware import Hardware
from llm.parallel.plan.prediction import Prediction, predict
from llm.parallel.plan.workload import Workload
from llm.parallel.rules import check_shape, resolve

_MICRO_BATCHES = (1, 2, 4, 8)
_CHUNKS = (1, 2, 4)
_STAGES = ("stage1", "stage2", "stage3")


def _layouts(world: int, start: Layout, per_machine: int) -> Iterator[Layout]:
    """Yield the layouts of a number of ranks that the rules allow; tensor ranks share a machine."""
    for tensor in divisors(world):
        for context in {1, start.context}:
            if tensor > per_machine or world % (tensor * context):
                continue
            for pipeline in divisors(world // (tensor * context)):
                replicas = world // (tensor * context * pipeline)
                for chunks, (stage, sharding) in product(
                    _CHUNKS, _shardings(replicas, per_machine // tensor)
                ):
                    flags = SimpleNamespace(
                        tensor_parallel_degree=tensor,
                        pipeline_parallel_degree=pipeline,
                        virtual_pp_degree=chunks,
                        context_parallel_degree=context,
                        context_parallel_kind=start.context_kind,
                        sep_parallel_degree=1,
                        sharding=stage,
                        sharding_parallel_degree=sharding if stage else -1,
                        data_parallel_degree=replicas // sharding,
                        sequence_parallel=tensor > 1,
                    )
                    try:
                        yield resolve(flags, world)
                    except UserError:
                        continue  # such as interleaving without stages


def _shardings(replicas: int, beside: int) -> list[tuple[str, int]]:
    """Return ways to share out the replicas: none, or a stage over all or those of a machine."""
    ways = [("", 1)]
    if replicas > 1:
        inside = max(d for d in divisors(replicas) if d <= max(beside, 1))
        degrees = {replicas, inside} - {1}
        ways += [(stage, degree) for stage in _STAGES for degree in sorted(degrees)]
    return ways


def _workloads(work: Workload, rows: int, replicas: int) -> Iterator[Workload]:
    """Yield ways to cut an update's rows into micro-batches, with less and less kept in memory."""
    if rows % replicas:
        return
    share = rows // replicas
    modes = ("none", "full") if work.flash else ("none", "core_attn", "full")
    for micro, mode in product(_MICRO_BATCHES, modes):
        if share % micro == 0:
            yield work.replace(
                micro_batch=micro,
                accumulation=share // micro,
                recompute=mode,
                recompute_layers=None,
                recompute_offload=False,
                offload=False,
            )


def _time(found: Prediction) -> float:
    assert found.seconds is not None  # propose() predicts with hardware
    return found.seconds.total


def propose(
    shape: LlamaConfig,
    layout: Layout,
    work: Workload,
    hardware: Hardware,
    *,
    device_bytes: float,
    per_machine: int = 8,
) -> list[Prediction]:
    """Return the layouts that fit the same ranks and rows of an update, the fastest first.

    Args:
        shape: the network.
        layout: the one that was asked for: its number of ranks, and how it cuts sequences.
        work: what was asked for; micro-batch and recompute mode may change.
        hardware: the device.
        device_bytes: memory of a device.
        per_machine: devices of a machine.

    Returns:
        of each layout, its fastest workload that fits.
    """
    rows = work.rows * layout.data_ranks
    best: dict[Layout, Prediction] = {}
    for candidate in _layouts(layout.world_size, layout, per_machine):
        for variant in _workloads(work, rows, candidate.data_ranks):
            try:
                check_shape(
                    candidate,
                    shape,
                    seq_length=work.seq_length,
                    micro_batches=variant.accumulation,
                )
            except UserError:
                continue
            found = predict(shape, candidate, variant, hardware, per_machine)
            known = best.get(candidate)
            if found.fits(device_bytes) and (known is None or _time(found) < _time(known)):
                best[candidate] = found
    return sorted(best.values(), key=_time)
