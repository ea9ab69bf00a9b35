"""What a run will take, and which layouts fit: the formulas put together for an update."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace

from common.errors import UserError
from llm.llama.config import LlamaConfig
from llm.parallel.layout import Layout, divisors
from llm.parallel.rules import check_shape, resolve
from llm.planner.memory import Memory, stage_memory
from llm.planner.step import Seconds, communication, stage_flops, step_seconds
from llm.planner.workload import Hardware, Workload

# What a GPU holds beside paddle's allocator: the CUDA context, NCCL's buffers, cuBLAS's workspaces,
# and gaps between blocks. PaddleNLP's own measurements put it at 2 to 3 GB (docs/parallel.md).
OUTSIDE = 3e9
# What the search tries.
_MICRO_BATCHES = (1, 2, 4, 8)
_CHUNKS = (1, 2, 4)
_STAGES = ("stage1", "stage2", "stage3")


@dataclass(frozen=True)
class Prediction:
    """What a run will take.

    Args:
        shape: the network.
        layout: degrees of parallelism.
        work: what a rank computes.
        stages: peak memory of one rank of each pipeline stage.
        seconds: of an update; None without hardware.
    """

    shape: LlamaConfig
    layout: Layout
    work: Workload
    stages: tuple[Memory, ...]
    seconds: Seconds | None = None

    @property
    def worst(self) -> Memory:
        """Peak of the stage that holds most."""
        return max(self.stages, key=lambda memory: memory.total)

    @property
    def bytes_per_rank(self) -> int:
        """Bytes that paddle's allocator holds at most on any rank."""
        return round(self.worst.total)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an update, over all ranks."""
        return self.work.accumulation * self.work.tokens * self.layout.data_ranks

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second and rank; 0 without hardware."""
        if self.seconds is None:
            return 0.0
        return self.tokens_per_step / self.seconds.total / self.layout.world_size

    @property
    def bubble(self) -> float:
        """Share of an update in which a stage waits for others."""
        return self.layout.bubble(self.work.accumulation)

    def communication(self) -> dict[str, float]:
        """Return the bytes that a rank sends in an update, by axis."""
        return communication(self.shape, self.layout, self.work)

    def fits(self, device_bytes: float) -> bool:
        """Whether it fits a GPU, with what lies beside the allocator's memory."""
        return self.bytes_per_rank + OUTSIDE <= device_bytes

    def describe(self) -> str:
        """Return one line: memory of a rank and of what."""
        index = self.stages.index(self.worst)
        where = f" on stage {index}" if self.layout.pipeline > 1 else ""
        size, unit = (1e9, "GB") if self.bytes_per_rank >= 1e9 else (1e6, "MB")
        parts = ", ".join(
            f"{name} {amount / size:.3g}"
            for name, amount in self.worst.parts().items()
            if amount >= self.bytes_per_rank / 100
        )
        # Of samples of different lengths, the largest are taken to meet in one batch.
        most = "at most " if self.work.scored is not None else ""
        return (
            f"predicted memory: {most}{self.bytes_per_rank / size:.3g} {unit} a rank{where} "
            f"({self.worst.moment}: {parts})"
        )

    def flops_per_rank(self) -> float:
        """Return the FLOPs of an update on the busiest rank, recomputing included."""
        return stage_flops(self.shape, self.layout, self.work) * self.work.accumulation


def predict(
    shape: LlamaConfig,
    layout: Layout,
    work: Workload,
    hardware: Hardware | None = None,
    per_machine: int = 8,
) -> Prediction:
    """Predict what a run takes.

    Args:
        shape: the network.
        layout: degrees of parallelism.
        work: what a rank computes; see :meth:`Workload.of`.
        hardware: the device, for the time of an update; None predicts no time.
        per_machine: devices of a machine.
    """
    stages = layout.stages(shape.num_hidden_layers)
    memories = tuple(
        stage_memory(shape, layout, work, index, stage) for index, stage in enumerate(stages)
    )
    seconds = None
    if hardware is not None:
        seconds = step_seconds(shape, layout, work, hardware, per_machine)
    return Prediction(shape, layout, work, memories, seconds)


def needs_offload(mode: str, found: Prediction, device_bytes: float) -> bool:
    """Return whether the optimizer's state goes to host memory.

    Args:
        mode: ``off``, ``static`` (always) or ``auto`` (when the prediction does not fit).
        found: the prediction without offload.
        device_bytes: memory of a device.
    """
    return mode == "static" or (mode == "auto" and not found.fits(device_bytes))


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
