"""Learning-rate schedules: pure functions of the step, and the paddle scheduler around one.

Every schedule warms up linearly and never starts at zero, so that no step is wasted: with ``w``
warm-up steps, step ``t`` (from 0) runs at ``(t + 1) / (w + 1)`` of the peak and step ``w`` is the
first at the peak.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from common.errors import UserError
from llm.config.training import TrainArguments

if TYPE_CHECKING:
    from paddle.optimizer.lr import LRScheduler


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _constant(progress: float) -> float:
    return 1.0


_SHAPES = {"linear": _linear, "cosine": _cosine, "constant": _constant, "wsd": _linear}


def _rate(
    step: int,
    *,
    shape: Callable[[float], float],
    peak: float,
    floor: float,
    warmup: int,
    start: int,
    end: int,
) -> float:
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(max((step - start) / max(end - start, 1), 0.0), 1.0)
    return floor + (peak - floor) * shape(progress)


def _decay(kind: str, max_steps: int, warmup_steps: int, steps: int | None) -> tuple[int, int]:
    """Return the steps at which the decay begins and ends."""
    if kind == "wsd":
        length = steps if steps is not None else max(1, max_steps // 10)
        if warmup_steps + length > max_steps:
            raise UserError(
                f"warmup_steps={warmup_steps} and decay_steps={length} together exceed "
                f"max_steps={max_steps}"
            )
        return max_steps - length, max_steps
    end = steps if steps is not None else max_steps
    if end <= warmup_steps and kind != "constant":
        raise UserError(
            f"decay_steps={end} has to exceed warmup_steps={warmup_steps}: it is the step at "
            f"which {kind} reaches min_learning_rate"
        )
    return warmup_steps, end


def learning_rate_function(
    kind: str,
    *,
    peak: float,
    floor: float,
    max_steps: int,
    warmup_steps: int,
    decay_steps: int | None = None,
) -> Callable[[int], float]:
    """Return the learning rate as a function of the step (the first update is step 0).

    Args:
        kind: ``linear`` or ``cosine`` fall from the end of the warm-up; ``constant`` stays at the
            peak; ``wsd`` (warmup-stable-decay, Hu et al. 2024, MiniCPM) stays at the peak and falls
            linearly over the last ``decay_steps``.
        peak: highest rate.
        floor: rate at the end of the decay, held afterwards.
        max_steps: length of the run in updates.
        warmup_steps: updates below the peak at the start.
        decay_steps: for ``linear`` and ``cosine`` the step at which the floor is reached (default:
            ``max_steps``); for ``wsd`` the length of the decay (default: a tenth of the run).

    Raises:
        UserError: warm-up and decay do not fit into the run.
    """
    if warmup_steps >= max_steps:
        raise UserError(
            f"warmup_steps={warmup_steps} has to be below max_steps={max_steps}: the peak learning "
            "rate would never be reached"
        )
    start, end = _decay(kind, max_steps, warmup_steps, decay_steps)
    return partial(
        _rate,
        shape=_SHAPES[kind],
        peak=peak,
        floor=floor,
        warmup=warmup_steps,
        start=start,
        end=end,
    )


def rate_of(run: TrainArguments, max_steps: int) -> Callable[[int], float]:
    """Return the learning rate that a run's flags ask for; see :func:`learning_rate_function`.

    Args:
        run: the flags; budgets in tokens have been counted.
        max_steps: updates in the whole run.
    """
    return learning_rate_function(
        run.lr_scheduler_type,
        peak=run.learning_rate,
        floor=run.min_learning_rate,
        max_steps=max_steps,
        warmup_steps=run.total_warmup_steps(max_steps),
        decay_steps=run.total_decay_steps,
    )


def make_scheduler(function: Callable[[int], float]) -> "LRScheduler":
    """Wrap a rate function in a paddle scheduler, whose state is the step alone."""
    from paddle.optimizer.lr import LRScheduler

    class FunctionSchedule(LRScheduler):
        def get_lr(self) -> float:
            return function(self.last_epoch)

    return FunctionSchedule(learning_rate=function(0))
