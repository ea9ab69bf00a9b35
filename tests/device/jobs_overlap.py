"""Trains with communication beside computation on the rehearsal device, which shows a lost wait."""

import os
from typing import Any

import numpy as np
import paddle

from llm.parallel import sharding, sums
from llm.parallel import topology as topologies
from llm.parallel.layout import Layout
from llm.parallel.offload import Offload
from tests.distributed.jobs_equality import changed, train

# Copies on streams of guards wait (tests/device/csrc/streams.h).
HOLDS = "REHEARSAL_HOLDS_GUARDED"
# Numbers of some parameters.
SIZES = (50, 400, 300, 10)
# For sums of gradients; for weights of other ranks, as layers compute; and whenever else they are
# asked for.
WAITS = {
    "sums": (sums, "wait"),
    "weights": (sharding, "wait"),
    "settle": (sharding.Sharding, "settle"),
}


def _forget(_: Any) -> None:
    """Stand where a wait was."""


def trained(layout: dict[str, Any], case: dict[str, Any], forgotten: list[str]) -> list[float]:
    """Return how many losses, norms and weights overlap changes in any bit.

    Args:
        layout: fields of :class:`Layout`.
        case: as in tests/distributed/test_equality.py.
        forgotten: of :data:`WAITS`, each left out in a training of its own.

    Returns:
        that number with all waits, and without each of those.
    """
    os.environ[HOLDS] = "1"
    topology = topologies.start(Layout(**layout), "gpu")
    plain = train(topology, case)
    found = [changed(train(topology, case, overlap=True), plain)]
    for where, name in map(WAITS.__getitem__, forgotten):
        real = getattr(where, name)
        setattr(where, name, _forget)
        found.append(changed(train(topology, case, overlap=True), plain))
        setattr(where, name, real)
        paddle.device.synchronize()
    return found


def offloaded(forgets: bool) -> list[float]:
    """Return how many weights and states copies beside the updates change in any bit.

    Args:
        forgets: whether an update does not wait for its state. Copies back cannot be forgotten
            here: Paddle itself waits for those of custom devices.

    Returns:
        that number, and the most bytes of state on the device over the largest parameter's.
    """
    os.environ[HOLDS] = "1"
    optimizers = [_adamw(), _adamw()]
    made = Offload(optimizers[1], ahead=True)
    if forgets:
        paddle.device.Stream.wait_event = lambda stream, event: None
    for step in range(3):
        for optimizer in optimizers:
            for number, parameter in enumerate(optimizer._parameter_list):
                (parameter * (1 + number) + step).square().mean().backward()
            optimizer.step()
            optimizer.clear_grad()
    plain, other = (_numbers(optimizer) for optimizer in optimizers)
    changed = sum(not np.array_equal(a, b) for a, b in zip(plain, other, strict=True))
    return [float(changed), made.device_bytes / (2 * 4 * max(SIZES))]


def _adamw() -> paddle.optimizer.AdamW:
    numbers = np.random.default_rng(3)
    weights = [paddle.to_tensor(numbers.normal(size=[size]).astype("float32")) for size in SIZES]
    parameters = [paddle.create_parameter([size], "float32") for size in SIZES]
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.set_value(weight)
    return paddle.optimizer.AdamW(0.05, parameters=parameters, weight_decay=0.1)


def _numbers(optimizer: paddle.optimizer.AdamW) -> list[np.ndarray]:
    """Return the weights and moments of an optimizer, in the order of its parameters."""
    parameters = optimizer._parameter_list
    kinds = (optimizer._moment1_acc_str, optimizer._moment2_acc_str)
    moments = [optimizer._get_accumulator(kind, p) for kind in kinds for p in parameters]
    return [tensor.numpy() for tensor in [*parameters, *moments]]
