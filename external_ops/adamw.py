"""AdamW over all parameters in one kernel that clips too (Loshchilov and Hutter 2019).

Paddle's own optimizer launches an operator a parameter, each on one thread, after others have read
and written all gradients to clip them. State, its names and its shapes are Paddle's here too, so a
checkpoint of one form resumes in the other.
"""

from collections.abc import Sequence

import paddle
from paddle import Tensor

from external_ops import native

# The square sums of half-precision gradients overflow, and float32 loses digits over billions.
_WIDE = "float64"


def squares_ref(arrays: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of all numbers in some tensors, float64 ``[]``.

    Args:
        arrays: in any floating type.
    """
    if not arrays:
        return paddle.zeros([], _WIDE)
    sums = [paddle.square(array.astype("float32")).sum() for array in arrays]
    return paddle.stack(sums).astype(_WIDE).sum()


def squares_native(arrays: Sequence[Tensor]) -> Tensor:
    """Compute :func:`squares_ref` in one kernel, in float64 throughout, whatever the threads."""
    if not arrays:
        return paddle.zeros([], _WIDE)
    return native.run("squares", list(arrays))[0]


def squares_fused(arrays: Sequence[Tensor]) -> Tensor:
    """Compute :func:`squares_ref` with Paddle's kernel that reads an array once and writes nothing.

    It returns the type that it reads, which half precision is too narrow for: that goes by float32.
    """
    if not arrays:
        return paddle.zeros([], _WIDE)
    sums = [paddle._C_ops.squared_l2_norm(array.astype("float32")) for array in arrays]
    return paddle.concat(sums).astype(_WIDE).sum()


def squares(arrays: Sequence[Tensor]) -> Tensor:
    """Compute :func:`squares_ref` in the kernel where there is one for these tensors."""
    kinds = (paddle.float32, paddle.bfloat16)
    on_cpu = [one.place.is_cpu_place() for one in arrays]
    if not any(on_cpu):
        return squares_fused(arrays)
    covered = all(on_cpu) and all(one.dtype in kinds for one in arrays)
    return (squares_native if covered and native.available() else squares_ref)(arrays)


def adamw_native(
    weights: list[Tensor],
    gradients: list[Tensor],
    moments1: list[Tensor],
    moments2: list[Tensor],
    powers1: list[Tensor],
    powers2: list[Tensor],
    *,
    decays: list[float],
    rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    scale: float = 1.0,
) -> None:
    """Update weights and their state in place.

    Args:
        weights: float32, any shapes.
        gradients: float32 or bfloat16, of the weights' shapes.
        moments1, moments2: float32, of the weights' shapes.
        powers1, powers2: float32 ``[1]``: beta1 and beta2 to the number of this update, from 1.
        decays: weight decay of each weight; ``rate * decay`` of it is taken off.
        rate: learning rate.
        beta1, beta2, epsilon: of the paper.
        scale: what gradients are multiplied by, such as to clip them; they stay as they are.

    Raises:
        ValueError: tensors of other types or sizes.
    """
    state = (moments1, moments2, powers1, powers2)
    settings = (decays, rate, beta1, beta2, epsilon, scale)
    # Operators that write into a parameter itself are refused, recorded or not.
    own = [weight.detach() for weight in weights]
    native.run("adamw", own, gradients, *state, *settings)


class FusedAdamW(paddle.optimizer.AdamW):
    """Paddle's AdamW, with :func:`adamw_native` for float32 parameters on a CPU.

    As with Paddle's, a parameter's ``optimize_attr["learning_rate"]`` multiplies the rate for it.

    Attributes:
        gradient_scale: what the next step multiplies gradients by; then it is 1 again.
    """

    gradient_scale = 1.0

    def _covers(self, parameter: Tensor, gradient: Tensor) -> bool:
        return (
            parameter.dtype == paddle.float32
            and gradient.dtype in (paddle.float32, paddle.bfloat16)
            and parameter.place.is_cpu_place()
            and parameter.regularizer is None
        )

    def _plain(self) -> bool:
        """Whether a setting asks for what the kernel does not do."""
        grouped = isinstance(self._parameter_list[0], dict)
        options = (self._grad_clip, self._lr_ratio, self.regularization)
        return grouped or self._amsgrad or any(option is not None for option in options)

    @paddle.no_grad()
    def step(self) -> None:
        """Update all parameters that have a gradient."""
        scale, self.gradient_scale = self.gradient_scale, 1.0
        if self._plain():
            assert scale == 1.0, "only an optimizer without groups and clip scales gradients"
            super().step()
            return
        held = [p for p in self._parameter_list if not p.stop_gradient and p.grad is not None]
        if not all(self._covers(p, p.grad) for p in held):
            for parameter in held:
                if scale != 1.0:
                    parameter.grad.scale_(scale)
            super().step()
            return
        if held:
            self._update(held, scale)

    def _update(self, held: list[Tensor], scale: float) -> None:
        block = paddle.base.framework.default_main_program().global_block()
        self._create_accumulators(block, held)
        kinds = (self._moment1_acc_str, self._moment2_acc_str)
        kinds += (self._beta1_pow_acc_str, self._beta2_pow_acc_str)
        decayed = self._apply_decay_param_fun or (lambda _: True)
        by_rate: dict[float, list[Tensor]] = {}
        for parameter in held:
            by_rate.setdefault(parameter.optimize_attr["learning_rate"], []).append(parameter)
        for factor, group in by_rate.items():
            adamw_native(
                group,
                [p.grad for p in group],
                *([self._get_accumulator(kind, p) for p in group] for kind in kinds),
                decays=[self._weight_decay if decayed(p.name) else 0.0 for p in group],
                rate=self.get_lr() * factor,
                beta1=self._beta1,
                beta2=self._beta2,
                epsilon=self._epsilon,
                scale=scale,
            )
