"""One prediction: memory of every stage, work, communication and time of an update."""

from dataclasses import dataclass

from llm.llama.config import LlamaConfig
from llm.parallel.layout import Layout
from llm.parallel.plan.hardware import Hardware
from llm.parallel.plan.memory import Memory, stage_memory
from llm.parallel.plan.step import Seconds, communication, stage_flops, step_seconds
from llm.parallel.plan.workload import Workload

# What a GPU holds beside paddle's allocator: the CUDA context, NCCL's buffers, cuBLAS's workspaces,
# and gaps between blocks. PaddleNLP's own measurements put it at 2 to 3 GB (docs/parallel.md).
OUTSIDE = 3e9


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
        return self.work.rows * self.work.seq_length * self.layout.data_ranks

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
        return (
            f"predicted memory: {self.bytes_per_rank / size:.3g} {unit} a rank{where} "
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
