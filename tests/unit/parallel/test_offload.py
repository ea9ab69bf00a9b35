"""Optimizer offload: the same numbers, with the state of one parameter at a time on the device."""

from itertools import pairwise

import numpy as np
import paddle
import pytest
from paddle import nn

from common.errors import UserError
from llm.parallel import offload
from llm.parallel.offload import Offload

SIZES = (6, 8, 4)


def network():
    paddle.seed(3)
    layers = [nn.Linear(a, b) for a, b in pairwise(SIZES)]
    return nn.Sequential(*layers)


def adamw(model):
    return paddle.optimizer.AdamW(
        0.05,
        parameters=model.parameters(),
        weight_decay=0.1,
        apply_decay_param_fun=lambda name: "w_" in name,
    )


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = paddle.to_tensor(np.random.default_rng(step).normal(size=[5, 6]).astype("float32"))
        (model(x) ** 2).mean().backward()
        optimizer.step()
        optimizer.clear_grad()
    return [p.numpy() for p in model.parameters()]


def state_size(model):
    return 2 * 4 * sum(p.size for p in model.parameters())


@pytest.fixture
def moves(monkeypatch):
    """Count the bytes that go to host memory, which on a CPU has no place of its own."""
    made = []
    move = offload._move

    def counted(tensor, place):
        before = tensor.data_ptr()
        move(tensor, place)
        assert tensor.data_ptr() != before, "the object still has its old memory"
        made.append(offload._size(tensor))

    monkeypatch.setattr(offload, "_move", counted)
    return made


def test_offloaded_steps_are_bit_equal(moves):
    plain, offloaded = network(), network()
    expected = train(plain, adamw(plain), 4)
    optimizer = adamw(offloaded)
    state = Offload(optimizer)
    found = train(offloaded, optimizer, 4)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)
    total = state_size(offloaded)
    assert state.host_bytes == total
    # To host once when it is created; then to the device and back in every step.
    assert sum(moves) == total * (1 + 2 * 4)


def test_at_most_one_parameters_state_is_on_the_device():
    model = network()
    optimizer = adamw(model)
    state = Offload(optimizer)
    train(model, optimizer, 2)
    assert state.device_bytes == 2 * 4 * max(p.size for p in model.parameters())
    assert state.device_bytes < state.host_bytes


def test_state_that_is_there_already_goes_along(moves):
    plain, offloaded = network(), network()
    expected = train(plain, adamw(plain), 5)
    optimizer = adamw(offloaded)
    train(offloaded, optimizer, 2)
    Offload(optimizer)
    assert sum(moves) == state_size(offloaded)
    found = train(offloaded, optimizer, 3, start=2)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_state_that_checkpoints_read_is_the_live_one():
    model = network()
    optimizer = adamw(model)
    Offload(optimizer)
    train(model, optimizer, 1)
    name = model[0].weight.name
    moment = optimizer._accumulators["moment1"][name]
    moment.set_value(paddle.zeros_like(moment))
    train(model, optimizer, 1, start=1)
    other = network()
    reference = adamw(other)
    train(other, reference, 1)
    zeroed = reference._accumulators["moment1"][other[0].weight.name]
    zeroed.set_value(paddle.zeros_like(zeroed))
    train(other, reference, 1, start=1)
    np.testing.assert_array_equal(model[0].weight.numpy(), other[0].weight.numpy())


@pytest.mark.parametrize(("device", "place"), [("cpu", "CPUPlace"), ("gpu:1", "CUDAPinnedPlace")])
def test_host_memory_is_pinned_where_a_gpu_computes(monkeypatch, device, place):
    """Whatever the build of Paddle could: pinned memory takes a driver."""
    monkeypatch.setattr(paddle.device, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device, "get_device", lambda: device)
    for name in ("CPUPlace", "CUDAPinnedPlace"):
        monkeypatch.setattr(paddle, name, lambda name=name: name)
    assert offload._host() == place


def test_parameter_groups_are_refused():
    model = network()
    groups = [{"params": [model[0].weight]}, {"params": [model[1].weight]}]
    with pytest.raises(UserError, match="parameter groups"):
        Offload(paddle.optimizer.AdamW(0.1, parameters=groups))
