"""The optimizer of a parallel job: sums gradients, measures and clips them, updates, spreads.

It stands where a training loop expects an optimizer. What it wraps is a plain one over the
parameters that this process owns, without a clip of its own.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import paddle
from paddle import Tensor, nn

from external_ops.adamw import FusedAdamW
from llm.parallel.gradients import (
    ScaledUpdates,
    SharedStages,
    global_norm,
    scale_gradients,
    set_gradient,
    sum_shared,
)
from llm.parallel.overlap import Overlap
from llm.parallel.sharding import Sharding
from llm.parallel.sums import GradientSums
from llm.parallel.topology import Topology

Inspect = Callable[[float], None]


class Updater:
    """Updates the weights of a network whose copies and parts lie on several processes.

    Making one is a collective call.

    Args:
        parameters: all of this process, frozen ones too, in an order that its replicas share.
        make_optimizer: returns paddle's optimizer over a list of parameters.
        topology: the running job.
        max_norm: clip the global norm above this; 0 only measures.
        inspect: is given the norm before the weights change, and may raise.
        units: layers that compute one after another, whose weights sharding brings one by one.
        overlap: sums of gradients and transfers of weights go on beside computation; None waits for
            each.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        make_optimizer: Callable[[list[Tensor]], paddle.optimizer.Optimizer],
        topology: Topology,
        *,
        max_norm: float = 0.0,
        inspect: Inspect | None = None,
        units: Sequence[nn.Layer] = (),
        overlap: Overlap | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.topology = topology
        self.max_norm, self.inspect = max_norm, inspect
        self.last_norm: float | None = None
        trained = [p for p in self.parameters if not p.stop_gradient]
        self._shared = SharedStages(trained, topology)
        self.sharding = Sharding(self.parameters, topology)
        self._sums = GradientSums(trained, self.sharding, topology, overlap)
        self.sharding.divide(units, ahead=overlap is not None)
        self.owned = [p for p in trained if self.sharding.owns(p)]
        self.inner = make_optimizer(self.owned) if self.owned else None
        self._trained = trained
        self._scaled: ScaledUpdates | None = None
        if overlap is not None and self.inner is not None and not self._fused:
            self._scaled = ScaledUpdates(self.inner)

    def step(self, loss_scale: float | None = None) -> bool:
        """Update the weights with the gradients of all backward passes since the last step.

        Args:
            loss_scale: what losses were multiplied by; None is training without, where a norm that
                is no finite number is a mistake.

        Returns:
            whether the weights were updated: not where a scaled gradient overflowed. The norm is
            that of all processes, so all return the same.

        Raises:
            Exception: what ``inspect`` raises; the weights are then unchanged.
        """
        self._sums.finish()
        sum_shared(self.owned, self.topology, self._shared)
        norm = global_norm(self.owned, self.topology, self._shared) / (loss_scale or 1.0)
        overflowed = loss_scale is not None and not math.isfinite(norm)
        self.last_norm = None if overflowed else norm
        if overflowed:
            self.sharding.release()
            return False
        if self.inspect is not None:
            self.inspect(norm)
        clip = self.max_norm / norm if 0 < self.max_norm < norm else 1.0
        self._scale(clip / (loss_scale or 1.0))
        self.sharding.settle()
        if self.inner is not None:
            self.inner.step()
        self.sharding.spread()
        return True

    def _scale(self, factor: float) -> None:
        """Multiply the owned gradients; clip and loss scale at once are one rounding."""
        if self._scaled is not None:
            self._scaled.factor = factor
            return
        if factor == 1.0:
            return
        if self._fused:
            self.inner.gradient_scale = factor
        else:
            scale_gradients(self.owned, factor)

    @property
    def _fused(self) -> bool:
        return isinstance(self.inner, FusedAdamW)

    def clear_grad(self, set_to_zero: bool = True) -> None:
        """Forget all gradients."""
        for parameter in self._trained:
            if hasattr(parameter, "main_grad"):
                set_gradient(parameter, None)
            else:
                parameter.clear_gradient(set_to_zero and self.sharding.stage < 2)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Let the network compute without a step afterwards, such as for evaluation."""
        self.sharding.settle()
        self.begin()
        yield
        self.sharding.release()

    def begin(self) -> None:
        """Make the weights ready for a forward pass; :meth:`step` ends that."""
        self.sharding.begin()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let the network hold all of its tensor parallel part, such as to be loaded."""
        self.sharding.gather(self.parameters)
        yield
        self.sharding.release()

    # --- what checkpoints ask for -----------------------------------------------------------------

    def owns(self, parameter: Tensor) -> bool:
        """Whether this process is the one of its replicas that writes a parameter's state.

        Tensor parallel ranks each own their part; the first of several stages owns what they share.
        """
        at = self.topology.at
        return (
            at.data == 0
            and at.context == 0
            and self.sharding.owns(parameter)
            and self._shared.counts(parameter)
        )

    def needs(self, parameter: Tensor) -> bool:
        """Whether this process updates a parameter, and so holds its moments."""
        return not parameter.stop_gradient and self.sharding.owns(parameter)

    @contextmanager
    def full_parameter(self, parameter: Tensor) -> Iterator[Tensor]:
        """Yield the parameter's whole tensor parallel part. Collective at sharding stage 3."""
        self.sharding.gather([parameter])
        yield parameter
        self.sharding.release_one(parameter)

    def create_state(self) -> None:
        """Give the optimizer the state that it has before its first update, where it has none."""
        if self.inner is not None:
            block = paddle.base.framework.default_main_program().global_block()
            self.inner._create_accumulators(block, self.owned)

    def state_tensors(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the optimizer's state of a parameter that this process updates.

        Keys are paddle's accumulators, such as ``moment1_0``, and ``master_weights`` where training
        keeps float32 copies; tensors have the shape of the tensor parallel part. Empty before the
        first update, unless :meth:`create_state` was called.
        """
        found = {}
        master = self.inner._master_weights.get(parameter.name)
        # Paddle keeps the moments of a half-precision weight under its float32 copy's name.
        key = parameter.name if master is None else master.name
        for kind, by_name in self.inner._accumulators.items():
            tensor = by_name.get(key)
            if tensor is not None:
                found[f"{kind}_0"] = tensor
        if master is not None:
            found["master_weights"] = master
        return found

    def set_moments(self, parameter: Tensor, arrays: dict[str, np.ndarray]) -> None:
        """Set the numbers of :meth:`state_tensors`, on a process that needs them."""
        if not self.state_tensors(parameter):
            self.create_state()
        tensors = self.state_tensors(parameter)
        missing = sorted(tensors.keys() ^ arrays.keys())
        assert not missing, f"{parameter.name}: optimizer state {missing} is on one side only"
        for kind, array in arrays.items():
            tensors[kind].set_value(paddle.to_tensor(array).astype(tensors[kind].dtype))
