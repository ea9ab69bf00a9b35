"""The optimizer's state in host memory: on the device only while one weight is updated.

The state of AdamW is three times as large as half-precision weights and gradients together, and is
used once in an update (Rajbhandari et al. 2021, ZeRO-Infinity, section 3). Its tensors are created,
kept and saved in host memory; each update takes those of one parameter to the device, updates, and
brings them back. The arithmetic is the device's own, so nothing changes but where numbers wait.

Copies can go on beside the updates, up and down on a stream each, as the links to a host do.

On a CPU build host and device are the same: copies are still made, so that the order of things is
rehearsed, and results are equal bit for bit.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import paddle
from paddle import Tensor

from common.devices import CPU, CUDA_LIKE
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


def _alias(tensor: Tensor) -> Tensor:
    """Return another object with a tensor's memory, which then outlives what the first is given."""
    other = paddle.empty([0], tensor.dtype)
    other.value().get_tensor()._share_data_with(tensor.value().get_tensor())
    return other


class Offload:
    """Keeps the state of one of paddle's optimizers in host memory.

    From then on ``optimizer.step()`` does what it did before, parameter by parameter.

    Args:
        optimizer: AdamW, or another whose state is accumulators and master weights; without state
            so far, or with.
        ahead: copy a parameter's state while the one before is updated, and back while the one
            behind is. A CPU has no streams for that, and goes on one by one.

    Attributes:
        device_bytes: most bytes of the state that were on the device at a time: those of the
            largest parameter, and twice that with ``ahead``.

    Raises:
        UserError: an optimizer with parameter groups.
    """

    def __init__(self, optimizer: paddle.optimizer.Optimizer, ahead: bool = False) -> None:
        self._parameters: list[Tensor] = list(optimizer._parameter_list)
        if any(isinstance(parameter, dict) for parameter in self._parameters):
            raise UserError("an optimizer with parameter groups cannot be offloaded; give one list")
        self.optimizer = optimizer
        self.device_bytes = 0
        self._update: Callable[..., Any] = optimizer._append_optimize_op
        self._create: Callable[..., Any] = optimizer._create_accumulators
        optimizer._append_optimize_op = self._update_one
        optimizer._create_accumulators = self._create_each
        if ahead and devices.current() != CPU:
            self._lanes = _Lanes(self)
            optimizer._append_optimize_op = self._lanes.update
            # Where all steps meet, that over float32 gradients too.
            optimizer._create_optimization_pass = self._lanes.around(
                optimizer._create_optimization_pass
            )
        for parameter in self._parameters:
            self.to_host(parameter)

    @property
    def host_bytes(self) -> int:
        """Bytes of the state in host memory."""
        return sum(_size(tensor) for p in self._parameters for tensor in self.state(p))

    def state(self, parameter: Tensor) -> list[Tensor]:
        """Return the tensors of the state that are as large as the parameter."""
        kinds = [*self.optimizer._accumulators.values(), self.optimizer._master_weights]
        master = self.optimizer._master_weights.get(parameter.name)
        # Moments of a master weight go by its name.
        names = {parameter.name} | ({master.name} if master is not None else set())
        found = [by_name[name] for by_name in kinds for name in names if name in by_name]
        return [tensor for tensor in found if tensor.size > _SMALL]

    def update_on_device(self, block: Any, param_and_grad: tuple[Tensor, Tensor]) -> Any:
        """Update one parameter, whose state is on the device."""
        return self._update(block, param_and_grad)

    def to_host(self, parameter: Tensor) -> None:
        """Take the state of a parameter to host memory, such as after it was loaded."""
        for tensor in self.state(parameter):
            _move(tensor, _host())

    def _create_each(self, block: Any, parameters: list[Tensor]) -> None:
        """Create the state of each parameter and take it to host memory before the next one's."""
        for parameter in parameters:
            known = len(self.state(parameter))
            self._create(block, [parameter])
            if len(self.state(parameter)) > known:
                self.to_host(parameter)

    def _update_one(self, block: Any, param_and_grad: tuple[Tensor, Tensor]) -> Any:
        """Update one parameter with its state on the device for that time."""
        parameter = param_and_grad[0]
        state = self.state(parameter)
        for tensor in state:
            _move(tensor, parameter.place)
        self.device_bytes = max(self.device_bytes, sum(map(_size, state)))
        done = self._update(block, param_and_grad)
        self.to_host(parameter)
        return done


@dataclass
class _Load:
    """The state of one parameter on its way, or on the device.

    Args:
        state: the optimizer's own objects.
        host: the same memory of the host.
        device: copies.
        event: when the last copy that was asked for has been made.
    """

    state: list[Tensor]
    host: list[Tensor]
    device: list[Tensor]
    event: Any

    @property
    def size(self) -> int:
        """Bytes on the device."""
        return sum(map(_size, self.device))


class _Lanes:
    """Copies to and from the device beside the updates."""

    def __init__(self, offload: Offload) -> None:
        self._offload = offload
        self._up, self._down = paddle.device.Stream(), paddle.device.Stream()
        self._coming: dict[str, _Load] = {}
        self._going: deque[_Load] = deque()
        self._following: dict[str, Tensor] = {}
        self._held = self._room = 0  # bytes of state on the device, and how many may be

    def around(self, update_all: Callable[..., Any]) -> Callable[..., Any]:
        """Return the optimizer's pass over its parameters, after which the host has all state."""

        def complete(pairs: list[tuple[Tensor, Tensor | None]], **more: Any) -> Any:
            found = [p for p, grad in pairs if grad is not None and not p.stop_gradient]
            self._following = {a.name: b for a, b in pairwise(found)}
            sizes = (sum(map(_size, self._offload.state(parameter))) for parameter in found)
            self._room = 2 * max(sizes, default=0)
            done = update_all(pairs, **more)
            while self._going:
                self._land()
            return done

        return complete

    def update(self, block: Any, param_and_grad: tuple[Tensor, Tensor]) -> Any:
        """Update one parameter while the state of its neighbours is copied."""
        parameter = param_and_grad[0]
        load = self._coming.pop(parameter.name, None) or self._fetch(parameter)
        following = self._following.get(parameter.name)
        if following is not None:
            self._coming[following.name] = self._fetch(following)
        compute = paddle.device.current_stream()
        compute.wait_event(load.event)
        for tensor, copy in zip(load.state, load.device, strict=True):
            tensor.value().get_tensor()._share_data_with(copy.value().get_tensor())
        done = self._offload.update_on_device(block, param_and_grad)
        # Where a device leaves the update to the CPU, its result lies in other memory.
        load.device = [_alias(tensor) for tensor in load.state]
        self._down.wait_event(compute.record_event())
        with paddle.device.stream_guard(self._down):
            for place, copy in zip(load.host, load.device, strict=True):
                place.copy_(copy, False)
            load.event = self._down.record_event()
        self._going.append(load)
        return done

    def _fetch(self, parameter: Tensor) -> _Load:
        """Start to copy a parameter's state to the device, once there is room for it."""
        state = self._offload.state(parameter)
        needed = sum(map(_size, state))
        while self._going and self._held + needed > self._room:
            self._land()
        with paddle.device.stream_guard(self._up):
            device = [tensor._copy_to(parameter.place, False) for tensor in state]
            event = self._up.record_event()
        self._held += needed
        self._offload.device_bytes = max(self._offload.device_bytes, self._held)
        return _Load(state, [_alias(tensor) for tensor in state], device, event)

    def _land(self) -> None:
        """Wait until the state that was updated first is in host memory; forget its copies."""
        load = self._going.popleft()
        load.event.synchronize()
        for tensor, place in zip(load.state, load.host, strict=True):
            tensor.value().get_tensor()._share_data_with(place.value().get_tensor())
        self._held -= load.size


def _size(tensor: Tensor) -> int:
    return int(tensor.size) * tensor.element_size()
