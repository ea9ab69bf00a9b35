"""Stops a run at the first step whose loss or gradient norm is not a finite number."""

import math
from pathlib import Path

import paddle

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


class WatchedClip(paddle.nn.ClipGradByGlobalNorm):
    """Clips by the global norm, and keeps that norm for the log and the watchdog.

    Paddle's own class computes the same number and drops it; computing it a second time costs a
    pass over all gradients. ``_dygraph_clip`` is the method that its optimizers dispatch to.

    Args:
        max_norm: clip above this; 0 only measures.
        watchdog: is asked about every norm before the weights change.
    """

    def __init__(self, max_norm: float, watchdog: Watchdog) -> None:
        super().__init__(clip_norm=max_norm)
        self.max_norm = max_norm
        self.watchdog = watchdog
        self.step = 0
        self.last_norm: float | None = None

    @paddle.no_grad()
    def _dygraph_clip(
        self, params_grads: list[tuple[paddle.Tensor, paddle.Tensor | None]]
    ) -> list[tuple[paddle.Tensor, paddle.Tensor | None]]:
        gradients = [gradient for _, gradient in params_grads if gradient is not None]
        squares = [paddle.square(gradient.astype("float32")).sum() for gradient in gradients]
        norm = math.sqrt(paddle.stack(squares).astype("float64").sum().item())
        self.last_norm = norm
        self.watchdog.check(self.step, "the gradient norm", norm)
        if 0 < self.max_norm < norm:
            for gradient in gradients:
                gradient.scale_(self.max_norm / norm)
        return params_grads
