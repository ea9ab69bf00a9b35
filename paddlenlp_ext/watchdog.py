"""Stops a run at the first step whose loss or gradient norm is not a finite number."""

import math
from pathlib import Path

from llm.errors import UserError
from paddlenlp_ext.checkpoints import find_checkpoints


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
