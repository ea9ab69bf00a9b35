"""Float16 training, whose types need a GPU: its loss scale computes on a CPU in float32."""

import json

import numpy as np
import paddle
import pytest

from llm.config import training
from llm.parallel import scaling
from llm.parallel.scaling import LossScale
from tests.unit.paddlenlp_ext.harness import run

FP16 = ("--fp16", "true", "--scale_loss", 1024)
SAVING = ("--save_strategy", "steps", "--save_steps", 2)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """Let the flags be; Paddle ignores float16 on a CPU, and says so."""
    monkeypatch.setattr(training, "check_precision", lambda *_, **__: None)


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def overflowing(*backward_passes):
    """Return what makes a gradient infinite in some passes, as float16 does."""

    def prepare(model):
        passes = []

        def hook(gradient):
            passes.append(1)
            return gradient * float("inf") if len(passes) in backward_passes else None

        model.head.weight.register_hook(hook)

    return prepare


@pytest.mark.parametrize("accumulate", [1, 3])
def test_scaled_losses_give_the_same_updates(tmp_path, accumulate):
    flags = ("--gradient_accumulation_steps", accumulate, "--max_grad_norm")
    plain, scaled = (run(tmp_path / str(len(f)), *flags, 0, *f) for f in ((), FP16))
    # Powers of two, that nothing rounds.
    np.testing.assert_array_equal(scaled.weights, plain.weights)
    assert scaled.series("grad_norm") == plain.series("grad_norm")
    assert scaled.series("loss") == plain.series("loss")
    clipped = [run(tmp_path / f"c{len(f)}", *flags, 0.2, *f).weights for f in ((), FP16)]
    np.testing.assert_allclose(*clipped, rtol=0, atol=1e-6)
    assert np.abs(clipped[0] - plain.weights).max() > 1e-3


def test_an_overflow_skips_the_update_and_halves_the_scale(tmp_path):
    """The update under way is the schedule's next one again."""
    outcome = run(tmp_path, *FP16, prepare=overflowing(3, 4))
    norms = outcome.series("grad_norm")
    assert [norm is None for norm in norms] == [False, False, True, True, False, False]
    assert outcome.trainer.scaler.factor == 256
    rates = outcome.series("learning_rate")
    assert rates[2] == rates[3] == rates[4] > rates[5]


def test_resuming_goes_on_with_the_scale(tmp_path):
    whole = run(tmp_path / "whole", *FP16, *SAVING, prepare=overflowing(2))
    checkpoint = whole.output_dir / "checkpoint-4"
    kept = json.loads((checkpoint / "scaler_state.json").read_text())
    assert kept == {"factor": 512.0, "updates": 2}
    # The harness's own model file aside, nothing is pickled.
    assert [path.name for path in checkpoint.glob("*.pdparams")] == ["model.pdparams"]
    again = run(tmp_path / "again", *FP16, *SAVING, resume=str(checkpoint))
    np.testing.assert_array_equal(again.weights, whole.weights)
    assert again.trainer.scaler.state() == whole.trainer.scaler.state()
    assert again.trainer.scaler.factor == 512


def test_a_checkpoint_before_the_first_update_is_one_too(tmp_path):
    """Every update so far overflowed, so the optimizer has done nothing."""
    whole = run(tmp_path / "whole", *FP16, *SAVING, prepare=overflowing(1, 2, 3))
    assert whole.series("grad_norm")[:4].count(None) == 3
    checkpoint = whole.output_dir / "checkpoint-2"
    again = run(tmp_path / "again", *FP16, *SAVING, resume=str(checkpoint), prepare=overflowing(1))
    np.testing.assert_array_equal(again.weights, whole.weights)


def test_a_checkpoint_of_other_precision_starts_a_scale(tmp_path):
    plain = run(tmp_path / "plain", *SAVING)
    resumed = run(tmp_path / "fp16", *FP16, resume=str(plain.output_dir / "checkpoint-4"))
    assert resumed.trainer.scaler.factor == 1024


def test_the_scale_grows_after_a_while(monkeypatch):
    monkeypatch.setattr(scaling, "_GROWS_AFTER", 3)
    scale, seen = LossScale(8.0), []
    for overflow in (False, False, True, False, False, False, False):
        scale._cache_found_inf = overflow
        scale.update()
        seen.append(scale.factor)
    assert seen == [8, 8, 4, 4, 4, 8, 8]


def test_the_loop_leaves_network_and_updater_alone(tmp_path, monkeypatch):
    """PaddleNLP has Paddle decorate them under float16, which refuses any optimizer but its own."""

    def decorate(models, optimizers=None, **_):  # as on a GPU; on a CPU it does nothing
        assert isinstance(optimizers, paddle.optimizer.Optimizer | None)
        return models if optimizers is None else (models, optimizers)

    monkeypatch.setattr(paddle.amp, "decorate", decorate)
    trainer = run(tmp_path, *FP16).trainer
    updater = trainer.optimizer
    assert trainer._wrap_model(trainer.model) is trainer.model
    assert trainer.optimizer is updater
