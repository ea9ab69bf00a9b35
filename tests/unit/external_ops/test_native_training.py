"""Training with the native kernels of all ops, beside training with the references of all."""

import numpy as np
import paddle
import pytest

from external_ops.modes import OPS
from llm.llama.build import build_model
from llm.llama.config import LlamaConfig
from llm.parallel.topology import single
from llm.parallel.updater import Updater
from llm.train.objectives import next_token_objective

STEPS, ROWS, LENGTH = 100, 4, 65
CONFIG = LlamaConfig(
    vocab_size=131,
    hidden_size=64,
    intermediate_size=88,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)


def batches(steps=STEPS):
    """Sequences of which three quarters follow a rule; two documents in a row, labels missing."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        strides = rng.choice([3, 3, 3, 11], (ROWS, LENGTH + 1))
        tokens = np.cumsum(strides, 1) % CONFIG.vocab_size
        cut = int(rng.integers(1, LENGTH))
        segments = np.broadcast_to(np.arange(LENGTH) >= cut, (ROWS, LENGTH)).astype("int64")
        positions = np.arange(LENGTH) - segments * cut
        labels = np.where(rng.random((ROWS, LENGTH)) < 0.1, -100, tokens[:, 1:])
        rows = {
            "input_ids": tokens[:, :-1],
            "labels": labels,
            "segments": segments,
            "positions": positions,
        }
        yield {name: paddle.to_tensor(np.ascontiguousarray(a)) for name, a in rows.items()}


def losses(ops, steps=STEPS, recompute=False):
    model = build_model(CONFIG, seed=3, ops=ops, recompute=recompute)
    rate = paddle.optimizer.lr.LinearWarmup(3e-3, 20, 0.0, 3e-3)

    def optimizer(parameters):
        return model.ops.adamw(
            learning_rate=rate,
            beta2=0.95,
            parameters=parameters,
            weight_decay=0.1,
            apply_decay_param_fun=lambda name: "norm" not in name,
        )

    updater = Updater(model.parameters(), optimizer, single(), max_norm=1.0)
    model.train()
    found = []
    for batch in batches(steps):
        total, weight, _ = next_token_objective(model, batch)
        loss = total / weight
        loss.backward()
        updater.step()
        updater.clear_grad()
        rate.step()
        found.append(float(loss))
    return np.array(found)


@pytest.fixture(scope="module")
def plain():
    return losses({"others": "reference"})


def test_a_hundred_steps_on_native_kernels_lose_what_references_lose(native_ops, plain):
    found = losses({"others": "fused"})
    assert plain[-10:].mean() < plain[:10].mean() / 2, "nothing was learned"
    assert np.abs(found - plain).max() < 1e-4
    assert (found != plain).any(), "the same kernels ran"


def test_recomputed_layers_run_native_kernels_to_the_same_end(native_ops, plain):
    found = losses({"others": "fused"}, steps=20, recompute=True)
    assert np.abs(found - plain[:20]).max() < 1e-4


@pytest.mark.parametrize(
    "op", [op for op in OPS if op not in ("paged_attention", "decoder", "sample")]
)
def test_every_op_trains(native_ops, op):
    """Each op by itself runs fused where there is a kernel of it, and its first steps agree."""
    model = build_model(CONFIG, seed=3, ops={"others": "reference", op: "auto"})
    other = build_model(CONFIG, seed=3, ops={"others": "reference"})
    batch = next(batches())
    for one in (model, other):
        total, weight, _ = next_token_objective(one, batch)
        (total / weight).backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        assert float((ours.grad - theirs.grad).abs().max()) <= 1e-5 * scale, ours.name
