"""Tensors in place, and the task object of work that is over."""

from typing import Any

import paddle
from paddle import Tensor


class Done:
    """The task of a collective that has finished: all of them run in the calling thread."""

    def wait(self, *_: Any) -> bool:
        """Return at once."""
        return True

    def is_completed(self) -> bool:
        """Return True."""
        return True

    def synchronize(self) -> None:
        """Return at once."""


DONE = Done()


@paddle.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Write ``value`` into the memory of ``target``, whatever else shares that memory."""
    paddle.assign(value.reshape(target.shape), target)


def contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where its memory has holes, which gloo would read as it is."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()
