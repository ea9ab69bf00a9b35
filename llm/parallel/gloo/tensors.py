"""Tensors in place and as arrays, and the task object of work that is over."""

from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.base import core


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


def array_type(tensor: Tensor) -> np.dtype:
    """The type of :func:`array_of`: the bits of bfloat16 are in uint16, as paddle does it."""
    if tensor.dtype == paddle.bfloat16:
        return np.dtype(np.uint16)
    return np.dtype(str(tensor.dtype).removeprefix("paddle."))


def array_of(tensor: Tensor) -> np.ndarray:
    """A copy of a tensor's numbers, ``[size]``."""
    return np.ascontiguousarray(tensor.detach().numpy()).reshape(-1)


def put_array(target: Tensor, values: np.ndarray) -> None:
    """Write what :func:`array_of` gave into the memory of ``target``."""
    flat = paddle.empty([target.size], target.dtype)
    flat.get_tensor().set(values.reshape(-1), core.CPUPlace())
    put(target, flat)


@paddle.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Write ``value`` into the memory of ``target``, whatever else shares that memory."""
    paddle.assign(value.reshape(target.shape), target)
