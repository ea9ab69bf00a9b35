"""The optimizer's state of half-precision weights, as checkpoints take it and give it back."""

import numpy as np
import paddle
import pytest

from common.files import Work
from external_ops.adamw import FusedAdamW
from llm.parallel.topology import single
from llm.parallel.updater import Updater
from llm.train.state import load_optimizer, save_optimizer

SHAPES = {"norm.weight": [4], "proj.weight": [4, 6]}


def parameter(name, dtype):
    with paddle.utils.unique_name.guard():
        zeros = paddle.nn.initializer.Constant(0.0)
        made = paddle.create_parameter(SHAPES[name], dtype, default_initializer=zeros)
    made.name = name
    return made


def updater(dtype, kind=FusedAdamW):
    """Return AdamW over two weights with float32 copies, as O2 training makes it."""
    parameters = [parameter(name, dtype) for name in SHAPES]
    return Updater(
        parameters, lambda owned: kind(0.1, parameters=owned, multi_precision=True), single()
    )


def filled(made, seed):
    """Create the state as Paddle does before the first update, and fill it with random numbers."""
    random = np.random.default_rng(seed)
    block = paddle.base.framework.default_main_program().global_block()
    made.inner._create_accumulators(block, made.owned)
    kept = [*made.inner._accumulators.values(), made.inner._master_weights]
    for tensor in [tensor for by_name in kept for tensor in by_name.values()]:
        tensor.set_value(paddle.to_tensor(random.random(tensor.shape).astype(np.float32)))
    return made


KINDS = ["moment1_0", "moment2_0", "beta1_pow_acc_0", "beta2_pow_acc_0"]


@pytest.mark.parametrize("kind", [FusedAdamW, paddle.optimizer.AdamW])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_state_of_a_weight(dtype, kind):
    """Paddle keys the moments of a half-precision weight by the name of its float32 copy."""
    made = filled(updater(dtype, kind), 0)
    for one in made.parameters:
        found = made.state_tensors(one)
        assert sorted(found) == sorted(KINDS + (["master_weights"] if dtype != "float32" else []))
        assert found["moment1_0"].shape == one.shape


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_state_comes_back_bit_for_bit(tmp_path, dtype):
    written = filled(updater(dtype), 1)
    work = Work()
    save_optimizer(written, tmp_path, work)
    work.conclude()
    assert work.error is None
    read = updater(dtype)
    load_optimizer(read, tmp_path)
    for ours, theirs in zip(written.parameters, read.parameters, strict=True):
        before, after = written.state_tensors(ours), read.state_tensors(theirs)
        assert before.keys() == after.keys() and len(after) == 5
        for name, tensor in before.items():
            np.testing.assert_array_equal(after[name].numpy(), tensor.numpy(), err_msg=name)
