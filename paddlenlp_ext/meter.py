"""Averages between two log lines; its state lies in checkpoints, so a resumed log is the same."""

import time
from dataclasses import dataclass
from typing import Any

from paddlenlp_ext.throughput import PeakRate, peak_memory_bytes


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
        if self.peak is not None:
            rate = tokens_per_second * self.flops_per_token
            figures["mfu"] = round(rate / self.peak.flops_per_second, 4)
        self.steps, self.tokens, self.loss_sum, self.seconds = 0, 0, 0.0, 0.0
        return figures

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to finish the current interval."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "loss_sum": self.loss_sum,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue the interval that a checkpoint cut in two."""
        self.steps, self.tokens = int(state["steps"]), int(state["tokens"])
        self.loss_sum, self.seconds = float(state["loss_sum"]), float(state["seconds"])
