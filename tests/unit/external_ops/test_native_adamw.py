"""AdamW in one kernel: each instruction set against float64, Paddle's optimizer, and a resume."""

import numpy as np
import paddle
import pytest

from external_ops import native
from external_ops.adamw import (
    FusedAdamW,
    adamw_native,
    squares_fused,
    squares_native,
    squares_ref,
)
from tests.unit.external_ops import oracle

SHAPES = [(1,), (65,), (5, 123), (2049, 17)]
BETA1, BETA2, EPSILON, RATE, DECAY = 0.9, 0.95, 1e-8, 1e-2, 0.1


def arrays(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(shape) * scale).astype(np.float32) for shape in SHAPES]


def exact_step(weight, grad, state, step, decay):
    """Update in float64, with the paper's corrected moments; state is changed in place."""
    state[0] = BETA1 * state[0] + (1 - BETA1) * grad
    state[1] = BETA2 * state[1] + (1 - BETA2) * grad**2
    mean, square = state[0] / (1 - BETA1**step), state[1] / (1 - BETA2**step)
    return weight - RATE * (mean / (np.sqrt(square) + EPSILON) + decay * weight)


def optimizer(cls, weights, **options):
    """Return parameters with fixed names, and an optimizer in which the second does not decay."""
    parameters = []
    for index, array in enumerate(weights):
        initial = paddle.nn.initializer.Assign(array)
        made = paddle.create_parameter(list(array.shape), "float32", default_initializer=initial)
        made.name = f"weight_{index}"
        parameters.append(made)
    made = cls(
        options.pop("learning_rate", RATE),
        beta1=BETA1,
        beta2=BETA2,
        epsilon=EPSILON,
        weight_decay=DECAY,
        parameters=parameters,
        apply_decay_param_fun=lambda name: name != "weight_1",
        **options,
    )
    return parameters, made


def give(parameters, grads):
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = paddle.to_tensor(grad)


def states(made, parameters):
    """Return all state as arrays, by Paddle's name of its kind and the parameter's place."""
    return {
        (kind, index): by_name[parameter.name].numpy()
        for kind, by_name in made._accumulators.items()
        for index, parameter in enumerate(parameters)
        if parameter.name in by_name
    }


@pytest.mark.parametrize("powers", [range(-1, -6, -1), range(-9, -4)], ids=["falling", "tiny"])
def test_against_float64(each_level, powers):
    """Five updates, not further from float64 than twice Paddle's own operator.

    Epsilon counts beside gradients as small as it is, and beside those that were always 0.
    """
    fused, ours = optimizer(FusedAdamW, arrays(0))
    plain, paddles = optimizer(paddle.optimizer.AdamW, arrays(0))
    exact = [array.astype(np.float64) for array in arrays(0)]
    moments = [[np.zeros_like(array), np.zeros_like(array)] for array in exact]
    for step, power in enumerate(powers, 1):
        grads = arrays(step, 10.0**power)
        grads[2][0] = 0.0
        give(fused, grads)
        give(plain, grads)
        ours.step()
        paddles.step()
        for i, grad in enumerate(grads):
            decay = 0.0 if i == 1 else DECAY
            exact[i] = exact_step(exact[i], grad.astype(np.float64), moments[i], step, decay)
    for i, truth in enumerate(exact):
        assert oracle.within_twice(fused[i].numpy(), plain[i].numpy(), truth)
    found, reference = states(ours, fused), states(paddles, plain)
    assert found.keys() == reference.keys()
    for key, array in found.items():
        assert array.shape == reference[key].shape
        rounding = 4 * oracle.FLOAT32_EPS * np.abs(reference[key]).max()  # moments cancel
        np.testing.assert_allclose(
            array, reference[key], rtol=1e-6, atol=rounding, err_msg=str(key)
        )


def test_scaled_gradients_are_clipped_ones(each_level):
    """Powers of two are exact in both, so nothing may differ."""
    results = []
    for scale, factor in ((1.0, 1.0), (4.0, 0.25)):
        parameters, made = optimizer(FusedAdamW, arrays(0))
        for step in range(1, 4):
            give(parameters, [array * np.float32(scale) for array in arrays(step)])
            made.gradient_scale = factor
            made.step()
            assert made.gradient_scale == 1.0
        results.append([parameter.numpy() for parameter in parameters])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_half_precision_gradients(each_level):
    rounded = [paddle.to_tensor(array).astype("bfloat16") for array in arrays(1)]
    outcomes = []
    for grads in (rounded, [grad.astype("float32") for grad in rounded]):
        weights = [paddle.to_tensor(array) for array in arrays(0)]
        moments = [[paddle.zeros_like(weight) for weight in weights] for _ in range(2)]
        powers = [[paddle.full([1], beta) for _ in weights] for beta in (BETA1, BETA2)]
        adamw_native(
            *(weights, grads, *moments, *powers),
            decays=[DECAY] * len(weights),
            rate=RATE,
            beta1=BETA1,
            beta2=BETA2,
            epsilon=EPSILON,
        )
        outcomes.append([weight.numpy() for weight in weights])
    for one, other in zip(*outcomes, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("first", [FusedAdamW, paddle.optimizer.AdamW])
def test_state_goes_from_one_form_to_the_other(native_ops, first):
    """Two updates of one form and one of the other are three of Paddle's, but for rounding."""
    other = paddle.optimizer.AdamW if first is FusedAdamW else FusedAdamW
    parameters, made = optimizer(first, arrays(0))
    for step in range(1, 3):
        give(parameters, arrays(step))
        made.step()
    kept = states(made, parameters)
    resumed, following = optimizer(other, [parameter.numpy() for parameter in parameters])
    block = paddle.base.framework.default_main_program().global_block()
    following._create_accumulators(block, resumed)
    for (kind, index), array in kept.items():
        following._accumulators[kind][resumed[index].name].set_value(array)
    give(resumed, arrays(3))
    following.step()
    plain, paddles = optimizer(paddle.optimizer.AdamW, arrays(0))
    for step in range(1, 4):
        give(plain, arrays(step))
        paddles.step()
    for one, reference in zip(resumed, plain, strict=True):
        np.testing.assert_allclose(one.numpy(), reference.numpy(), rtol=1e-5, atol=1e-6)


def stepped(prepare):
    """Return the parameters that both forms give after two steps with a schedule."""
    schedule = paddle.optimizer.lr.StepDecay(RATE, step_size=1, gamma=0.5)
    pairs = [optimizer(cls, arrays(0)) for cls in (FusedAdamW, paddle.optimizer.AdamW)]
    for parameters, made in pairs:
        made.set_lr_scheduler(schedule)
        parameters[0].stop_gradient = True
        prepare(parameters)
    for step in range(1, 3):
        for parameters, made in pairs:
            give(parameters[1:], arrays(step)[1:])
            made.step()
        schedule.step()
    return zip(*(parameters for parameters, _ in pairs), strict=True)


def test_what_the_kernel_does_not_cover_runs_in_paddles_form(native_ops):
    """A schedule and frozen weights are covered; a parameter's own regularizer is not."""

    def prepare(parameters):
        parameters[2].regularizer = paddle.regularizer.L2Decay(0.1)

    for one, other in stepped(prepare):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_rates_of_single_parameters(native_ops):
    """As LoRA+ sets them; decay goes by a parameter's rate too."""

    def prepare(parameters):
        parameters[1].optimize_attr["learning_rate"] = 16.0
        parameters[2].optimize_attr["learning_rate"] = 0.5

    for one, other in stepped(prepare):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-5, atol=1e-6)


def test_squares(each_level):
    """In float64 whatever the sizes, and in an order that no thread count changes."""
    for scale in (1e-15, 1.0, 1e15):
        given = arrays(3, scale)
        exact = sum(float((array.astype(np.float64) ** 2).sum()) for array in given)
        found = squares_native([paddle.to_tensor(array) for array in given])
        assert found.dtype == paddle.float64 and found.shape == []
        assert abs(found.item() / exact - 1) < 1e-14
    mixed = [paddle.to_tensor(arrays(3)[0]), paddle.to_tensor(arrays(3)[3]).astype("bfloat16")]
    exact = sum((one.astype("float64").numpy() ** 2).sum() for one in mixed)
    assert abs(squares_native(mixed).item() / exact - 1) < 1e-14
    assert abs(squares_ref(mixed).item() / exact - 1) < 1e-5
    assert abs(squares_fused(mixed).item() / exact - 1) < 1e-5
    large = paddle.full([3], 6e4, "float16")
    assert squares_fused([large]).item() == 3 * float(large[0]) ** 2, "more than float16 can hold"
    assert squares_fused([]).item() == 0.0
    assert squares_native([]).item() == 0.0


def test_what_does_not_fit_is_refused(native_ops):
    one, two = [paddle.zeros([3])], [paddle.zeros([2])]
    powers = [paddle.full([1], 0.9)]
    numbers = (RATE, BETA1, BETA2, EPSILON, 1.0)
    for given, message in (
        ((one, two, one, one, powers, powers, [0.0]), r"a gradient \[2\] is not of .* \[3\]"),
        ((one, one, two, one, powers, powers, [0.0]), r"moment1 has to be float32 with 3 numbers"),
        ((one, one, one, one, one, powers, [0.0]), "beta1_pow has to be float32 with 1 numbers"),
        ((one, one, one, one, powers, powers, []), "0 tensors or decays of a kind for 1 weights"),
    ):
        with pytest.raises(ValueError, match=message):
            native.run("adamw", *given, *numbers)
