"""The optimizer's state in host memory: on the device only while one weight is updated.

The state of AdamW is three times as large as half-precision weights and gradients together, and is
used once in an update (Rajbhandari et al. 2021, ZeRO-Infinity, section 3). Its tensors are created,
kept and saved in host memory; each update takes those of one parameter to the device, updates, and
brings them back. The arithmetic is the device's own, so nothing changes but where numbers wait.

On a CPU build host and device are the same: copies are still made, so that the order of things is
rehearsed, and results are equal bit for bit.
"""

from collections.abc import Callable
from typing import Any

import paddle
from paddle import Tensor

from common.devices import CUDA_LIKE
from common.errors import UserError
from external_ops import devices

# One number each, which the optimizer reads on the host anyway.
_SMALL = 1


def _host() -> Any:
    if devices.current() in CUDA_LIKE:  # a CUDA build may compute on a CPU
        return paddle.CUDAPinnedPlace()  # page-locked, which is what the copy engine reads
    return paddle.CPUPlace()


def _move(tensor: Tensor, place: Any) -> None:
    """Give a tensor's object a copy of its numbers at another place."""
    copy = tensor._copy_to(place, True)
    tensor.value().get_tensor()._share_data_with(copy.value().get_tensor())


class Offload:
    """Keeps the state of one of paddle's optimizers in host memory.

    From then on ``optimizer.step()`` does what it did before, parameter by parameter.

    Args:
        optimizer: AdamW, or another whose state is accumulators and master weights; without state
            so far, or with.

    Attributes:
        device_bytes: most bytes of the state that were on the device at a time.

    Raises:
        UserError: an optimizer with parameter groups.
    """

    def __init__(self, optimizer: paddle.optimizer.Optimizer) -> None:
        self._parameters: list[Tensor] = list(optimizer._parameter_list)
        if any(isinstance(parameter, dict) for parameter in self._parameters):
            raise UserError("an optimizer with parameter groups cannot be offloaded; give one list")
        self.optimizer = optimizer
        self.device_bytes = 0
        self._update: Callable[..., Any] = optimizer._append_optimize_op
        self._create: Callable[..., Any] = optimizer._create_accumulators
        optimizer._append_optimize_op = self._update_one
        optimizer._create_accumulators = self._create_each
        for parameter in self._parameters:
            self.to_host(parameter)

    @property
    def host_bytes(self) -> int:
        """Bytes of the state in host memory."""
        return sum(_size(tensor) for p in self._parameters for tensor in self._state(p))

    def _state(self, parameter: Tensor) -> list[Tensor]:
        """Return the tensors of the state that are as large as the parameter."""
        kinds = [*self.optimizer._accumulators.values(), self.optimizer._master_weights]
        master = self.optimizer._master_weights.get(parameter.name)
        # Moments of a master weight go by its name.
        names = {parameter.name} | ({master.name} if master is not None else set())
        found = [by_name[name] for by_name in kinds for name in names if name in by_name]
        return [tensor for tensor in found if tensor.size > _SMALL]

    def to_host(self, parameter: Tensor) -> None:
        """Take the state of a parameter to host memory, such as after it was loaded."""
        for tensor in self._state(parameter):
            _move(tensor, _host())

    def _create_each(self, block: Any, parameters: list[Tensor]) -> None:
        """Create the state of each parameter and take it to host memory before the next one's."""
        for parameter in parameters:
            known = len(self._state(parameter))
            self._create(block, [parameter])
            if len(self._state(parameter)) > known:
                self.to_host(parameter)

    def _update_one(self, block: Any, param_and_grad: tuple[Tensor, Tensor]) -> Any:
        """Update one parameter with its state on the device for that time."""
        parameter = param_and_grad[0]
        state = self._state(parameter)
        for tensor in state:
            _move(tensor, parameter.place)
        self.device_bytes = max(self.device_bytes, sum(map(_size, state)))
        done = self._update(block, param_and_grad)
        self.to_host(parameter)
        return done


def _size(tensor: Tensor) -> int:
    return int(tensor.size) * tensor.element_size()
