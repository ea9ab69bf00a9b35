"""The loss scale of float16 training (Micikevicius et al. 2018, Mixed Precision Training).

Losses are multiplied before the backward pass, so that small gradients do not vanish in float16,
and gradients are divided in the updater, after they were summed. Paddle's ``GradScaler`` divides
and looks for overflows in each process by itself, before the sum: a process that skips an update
leaves the others waiting in a collective, and gradients that are kept elsewhere than in ``grad``
(``main_grad``, the sums of sharding stages 2 and 3) are never divided at all.
"""

from typing import Any

import paddle
from paddle import Tensor

from llm.parallel.updater import Updater

# Paddle's numbers: double after so many updates without an overflow, halve at each overflow.
_GROWS_AFTER = 2000
_GROWTH, _BACKOFF = 2.0, 0.5


class LossScale:
    """Stands where PaddleNLP's loop and fleet's pipelines expect a ``GradScaler``.

    All processes of a job have the same one: the norm by which the updater judges is shared.

    Args:
        factor: to start from.

    Attributes:
        factor: what losses are multiplied by.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._updates = 0  # without an overflow, since the factor last changed
        self._cache_found_inf = False  # the loop asks for it

    @property
    def _scale(self) -> Tensor:
        return paddle.to_tensor([self.factor])  # the loop prints it

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss times the factor."""
        return loss * self.factor

    def step(self, updater: Updater) -> None:
        """Update the weights, or none in any process where a gradient overflowed in one."""
        self._cache_found_inf = not updater.step(self.factor)

    def update(self) -> None:
        """Choose the factor of the next update."""
        self._updates = 0 if self._cache_found_inf else self._updates + 1
        if self._cache_found_inf:
            self.factor *= _BACKOFF
        elif self._updates == _GROWS_AFTER:
            self.factor, self._updates = self.factor * _GROWTH, 0

    def state(self) -> dict[str, Any]:
        """Return what :meth:`restore` takes, as JSON values."""
        return {"factor": self.factor, "updates": self._updates}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.factor, self._updates = float(state["factor"]), int(state["updates"])
