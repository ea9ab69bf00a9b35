"""Differentiable exchanges between processes: one function for values, one for their gradients."""

from collections.abc import Callable
from typing import Any

from paddle import Tensor
from paddle.autograd import PyLayer

Exchange = Callable[[Tensor], Tensor]


class _Exchanged(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Exchange, back: Exchange) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.back(grad)


def exchanged(x: Tensor, there: Exchange, back: Exchange) -> Tensor:
    """Return ``there(x)``, whose gradient is ``back`` of the result's gradient.

    Neither is recorded by autograd. What ``there`` returns has to be another tensor than ``x``.
    """
    return _Exchanged.apply(x, there, back)
