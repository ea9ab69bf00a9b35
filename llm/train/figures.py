"""What a run measures of itself: loss, tokens per second, share of the device's peak, memory.

:class:`Meter` makes the figures of a log line, :class:`Watchdog` ends a run whose figures are not
finite. The share of the peak (MFU) is model FLOPs per second over the peak rate of the device
(Chowdhery et al. 2022, appendix B). Recomputed activations are not counted. For half precision on a
GPU the peak is the vendor's dense tensor-core figure; everywhere else it is the best rate that a
large matrix product reached here. Beside other work that is too low: a step that was faster has it
measured again, and a share above one is left out.
"""

import functools
import math
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common.devices import GPU
from common.errors import UserError
from llm.train.checkpoints import find_checkpoints
from llm.train.logs import logger

# Dense half-precision tensor-core peak in TFLOP/s, from the vendor's data sheets, without sparsity.
# Longer names come first: the first one contained in the device's name is taken.
_GPU_TFLOPS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L20", 119.5),
    ("L4", 121.0),
    ("V100", 125.0),
    ("T4", 65.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)
_MEASURE_SECONDS = 0.3
_MATRIX = 1024


@dataclass(frozen=True)
class PeakRate:
    """The rate that MFU is relative to, and where the figure comes from."""

    flops_per_second: float
    source: str
    measured: bool = False

    def describe(self) -> str:
        """Say the figure and what it rests on."""
        return f"{self.flops_per_second / 1e9:.1f} GFLOP/s ({self.source})"


def table_rate(device_name: str) -> PeakRate | None:
    """Return the data-sheet peak of a GPU by its name, or None when the table lacks it."""
    for name, tflops in _GPU_TFLOPS:
        if name.lower() in device_name.lower():
            return PeakRate(tflops * 1e12, f"data sheet of {name}, half precision")
    return None


def measured_rate() -> PeakRate:
    """Time float32 matrix products for a third of a second; keep the best."""
    import paddle

    left = paddle.full([_MATRIX, _MATRIX], 0.5)  # random values would advance the seeded generator
    best = float("inf")
    deadline = time.perf_counter() + _MEASURE_SECONDS
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        (left @ left).sum().item()
        best = min(best, time.perf_counter() - start)
    source = f"the best float32 {_MATRIX}x{_MATRIX} matmul of {_MEASURE_SECONDS} s here and now"
    return PeakRate(2.0 * _MATRIX**3 / best, source, measured=True)


@functools.cache
def _first_rate() -> PeakRate:
    """Measure once per process; :class:`Meter` measures again where that cannot be the peak."""
    return measured_rate()


def peak_rate(half_precision: bool) -> PeakRate:
    """Return the peak for the current device: from the table, or else measured."""
    import paddle

    from external_ops import devices

    if half_precision and devices.current() == GPU:
        known = table_rate(paddle.device.cuda.get_device_name())
        if known is not None:
            return known
    return _first_rate()


def peak_tensor_bytes() -> int:
    """Return the most memory that tensors took so far, without the process around them."""
    import paddle

    from external_ops import devices

    found = devices.peak_memory()
    return (
        found
        if found is not None
        else int(paddle.base.core.host_memory_stat_peak_value("Allocated", 0))
    )


def peak_memory_bytes() -> int:
    """Return the most memory held so far: on the device where one is used, else resident memory."""
    from external_ops import devices

    if (found := devices.peak_memory()) is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class Meter:
    """Accumulates steps and gives the figures of one log line.

    Args:
        flops_per_token: forward and backward, for MFU.
        peak: the device's rate; None leaves MFU out.
    """

    flops_per_token: float
    peak: PeakRate | None
    steps: int = 0
    tokens: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    _mark: float = 0.0

    def start(self) -> None:
        """Begin timing; also called after anything that is not training (saving, evaluation)."""
        self._mark = time.perf_counter()

    def add(self, loss: float, tokens: int) -> None:
        """Count one finished update and the tokens that it saw."""
        self.steps += 1
        self.tokens += tokens
        self.loss_sum += loss
        self.seconds += time.perf_counter() - self._mark

    def flush(self) -> dict[str, float]:
        """Return the figures since the last flush, and begin anew."""
        tokens_per_second = self.tokens / max(self.seconds, 1e-9)
        figures = {
            "loss": self.loss_sum / max(self.steps, 1),
            "tokens_per_second": round(tokens_per_second, 1),
            "step_seconds": round(self.seconds / max(self.steps, 1), 4),
            "peak_memory_gb": round(peak_memory_bytes() / 1e9, 3),
        }
        share = self._share_of_peak(tokens_per_second * self.flops_per_token)
        if share is not None:
            figures["mfu"] = round(share, 4)
        self.steps, self.tokens, self.loss_sum, self.seconds = 0, 0, 0.0, 0.0
        return figures

    def _share_of_peak(self, rate: float) -> float | None:
        """Return the MFU, unless what it is relative to cannot be the peak."""
        if self.peak is not None and self.peak.measured and rate > self.peak.flops_per_second:
            again = measured_rate()
            if again.flops_per_second > self.peak.flops_per_second:
                self.peak = again
                logger.info("peak for MFU: %s", again.describe())
        if self.peak is None or rate > self.peak.flops_per_second:
            return None
        return rate / self.peak.flops_per_second

    def state(self) -> dict[str, float]:
        """Return what a resumed run needs to finish the current interval."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "loss_sum": self.loss_sum,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, float]) -> None:
        """Continue the interval that a checkpoint cut in two."""
        self.steps, self.tokens = int(state["steps"]), int(state["tokens"])
        self.loss_sum, self.seconds = float(state["loss_sum"]), float(state["seconds"])


class DivergedError(UserError):
    """Training produced nan or inf; weights are still those before the bad update."""


class Watchdog:
    """Names the step and the last good checkpoint when a watched value is nan or inf."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir

    def check(self, step: int, name: str, value: float) -> None:
        """Raise when ``value`` is not finite.

        Raises:
            DivergedError: names the step, the value and the newest complete checkpoint.
        """
        if math.isfinite(value):
            return
        complete, _ = find_checkpoints(self.output_dir)
        kept = (
            f"the last good checkpoint is {complete[-1].path}"
            if complete
            else f"no checkpoint was saved in {self.output_dir} yet"
        )
        raise DivergedError(
            f"step {step}: {name} is {value}; stopped before updating the weights, {kept}. Lower "
            "learning_rate, lengthen the warm-up or lower max_grad_norm, and resume from there"
        )
