"""Tensors from NumPy's arrays for code that makes some in every step of a server."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from paddle import Tensor


def tensor_from(array: NDArray[np.generic], *, on_host: bool = False) -> "Tensor":
    """Return a copy of an array as a tensor.

    ``paddle.to_tensor`` loses 112 bytes a call (docs/log.md, "A step's memory"), which a server
    that runs for months would miss; filling an empty tensor loses none and takes less time.

    Args:
        array: of any shape and of a type that Paddle has.
        on_host: whether it lies in the host's memory whatever the current device is.
    """
    import paddle

    place = paddle.CPUPlace() if on_host else paddle.framework._current_expected_place()
    tensor = empty_tensor(array, on_host)
    tensor.get_tensor().set(array, place)
    return tensor


def empty_tensor(like: NDArray[np.generic], on_host: bool) -> "Tensor":
    """Return a tensor of an array's shape and type with anything in it."""
    import paddle

    return paddle.empty(like.shape, like.dtype.name, device="cpu" if on_host else None)
