"""The trainer against an optimizer written in numpy, and its promises one by one."""

import json
import math

import numpy as np
import paddle
import psutil
import pytest

from common.errors import UserError
from llm.parallel.scaling import LossScale
from llm.train.checks import Counts
from llm.train.figures import DivergedError
from llm.train.logs import read_log
from llm.train.schedules import learning_rate_function
from tests.unit.paddlenlp_ext.harness import LENGTH, Bigram, Samples, mean_loss, run


def numpy_adamw(steps, batch, accumulate, *, decay, clip, betas=(0.9, 0.999), epsilon=1e-8):
    """Train the bigram model with AdamW (Loshchilov & Hutter 2019) written out in numpy."""
    paddle.seed(1)
    model = Bigram()
    data = Samples(steps * batch * accumulate)
    rate = learning_rate_function("linear", peak=0.05, floor=0.0, max_steps=steps, warmup_steps=0)
    moments = {n: (0.0, 0.0) for n, _ in model.named_parameters()}
    for step in range(steps):
        rows = [data[step * batch * accumulate + i] for i in range(batch * accumulate)]
        ids, labels = (
            paddle.to_tensor(np.stack([row[key] for row in rows]))
            for key in ("input_ids", "labels")
        )
        mean_loss(model(ids), labels).backward()
        gradients = {n: p.grad.numpy().astype("float64") for n, p in model.named_parameters()}
        norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
        for name, parameter in model.named_parameters():
            gradient = gradients[name] * min(1.0, clip / norm)
            first, second = moments[name]
            first = betas[0] * first + (1 - betas[0]) * gradient
            second = betas[1] * second + (1 - betas[1]) * gradient**2
            moments[name] = first, second
            value = parameter.numpy().astype("float64")
            value *= 1 - rate(step) * (decay if name in ("embed.weight", "head.weight") else 0)
            corrected = first / (1 - betas[0] ** (step + 1))
            scale = np.sqrt(second / (1 - betas[1] ** (step + 1))) + epsilon
            parameter.set_value((value - rate(step) * corrected / scale).astype("float32"))
        model.clear_gradients()
    return np.concatenate([p.numpy().ravel() for p in model.parameters()])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_matches_adamw_in_numpy_with_decay_on_matrices_only(tmp_path, accumulate):
    ours = run(
        tmp_path,
        *("--gradient_accumulation_steps", accumulate, "--weight_decay", 0.3),
        *("--max_grad_norm", 0.2, "--adam_beta1", 0.8, "--adam_beta2", 0.95),
    )
    expected = numpy_adamw(6, 2, accumulate, decay=0.3, clip=0.2, betas=(0.8, 0.95))
    np.testing.assert_allclose(ours.weights, expected, atol=2e-6)
    everything = numpy_adamw(6, 2, accumulate, decay=0.0, clip=0.2, betas=(0.8, 0.95))
    assert np.abs(ours.weights - everything).max() > 1e-3


def test_logged_figures_are_those_of_the_steps(tmp_path):
    each = run(tmp_path / "each")
    pairs = run(tmp_path / "pairs", "--logging_steps", 2)
    losses = each.series("loss")
    averages = [sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)]
    assert pairs.series("loss") == pytest.approx(averages, rel=1e-12)
    first = Samples(12)
    ids = paddle.to_tensor(np.stack([first[0]["input_ids"], first[1]["input_ids"]]))
    labels = paddle.to_tensor(np.stack([first[0]["labels"], first[1]["labels"]]))
    paddle.seed(1)
    model = Bigram()
    value = mean_loss(model(ids), labels)
    value.backward()
    norm = math.sqrt(sum((p.grad.numpy().astype("f8") ** 2).sum() for p in model.parameters()))
    assert losses[0] == pytest.approx(value.item(), rel=1e-6)
    assert each.series("grad_norm")[0] == pytest.approx(norm, rel=1e-6)
    record = each.records[0]
    assert record["tokens_per_second"] > 0 and 0 <= record["mfu"] < 1
    assert 0.05 < record["peak_memory_gb"] < 100
    assert each.series("consumed_samples") == [2, 4, 6, 8, 10, 12]


def test_evaluation_weighs_tokens_and_gives_perplexity(tmp_path):
    outcome = run(tmp_path, "--do_eval", "--per_device_eval_batch_size", 2)
    rows = [Samples(5, seed=1)[i] for i in range(5)]
    ids, labels = (np.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
    expected = mean_loss(outcome.model(paddle.to_tensor(ids)), paddle.to_tensor(labels)).item()
    result = json.loads((tmp_path / "eval_results.json").read_text())
    assert result["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert result["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert result["eval_tokens"] == 30


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_in_the_middle_of_a_log_interval(tmp_path, workers):
    flags = ("--save_strategy", "steps", "--save_steps", 2, "--logging_steps", 3)
    flags += ("--dataloader_num_workers", workers, "--lr_scheduler_type", "cosine")
    whole = run(tmp_path, *flags)
    checkpoint = tmp_path / "checkpoint-4"
    again = run(tmp_path, *flags, resume=str(checkpoint))
    assert np.array_equal(whole.weights, again.weights)
    for name in ("loss", "learning_rate", "grad_norm", "consumed_samples"):
        assert whole.series(name) == again.series(name)
    assert again.trainer.state.consumed_samples == 12


def test_workers_end_with_what_they_load_for(tmp_path):
    """Runs and evaluations that leave data over would leave Paddle's behind."""
    before = psutil.Process().children()
    flags = ("--do_eval", "--eval_steps", 2, "--max_evaluate_steps", 1)
    run(tmp_path, *flags, "--per_device_eval_batch_size", 1, "--dataloader_num_workers", 2)
    assert psutil.Process().children() == before


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_resuming_with_another_batch_takes_the_next_samples(tmp_path, batch):
    """No sample twice, none left out, and each counted once in the loss of its update."""
    run(tmp_path, "--save_strategy", "steps", "--save_steps", 3)
    counted, trace = [], tmp_path / "trace"

    def count(start, stop):
        counted.append((start, stop))
        return Counts(*2 * [(stop - start) * LENGTH])

    again = run(
        tmp_path / "again",
        *("--per_device_train_batch_size", batch, "--max_steps", 5),
        resume=str(tmp_path / "checkpoint-3"),
        trace=trace,
        count=count,
    )
    taken = [int(line.split()[1]) for line in trace.read_text().splitlines()]
    assert taken == list(range(6, 6 + 2 * batch))
    assert set(counted) == {(6, 6 + batch), (6 + batch, 6 + 2 * batch)}
    assert again.series("consumed_samples") == [6 + batch, 6 + 2 * batch]


def test_resuming_a_finished_run_takes_no_further_step(tmp_path):
    flags = ("--save_strategy", "steps", "--save_steps", 3, "--do_eval")
    whole = run(tmp_path, *flags)
    again = run(tmp_path, *flags, resume=str(tmp_path / "checkpoint-6"))
    assert np.array_equal(whole.weights, again.weights)
    assert again.trainer.state.global_step == 6
    assert again.series("loss") == whole.series("loss")
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_tokens"] == 30


def test_two_runs_with_one_seed_are_bit_equal(tmp_path):
    first, second = run(tmp_path / "a"), run(tmp_path / "b")
    assert np.array_equal(first.weights, second.weights)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_watchdog_stops_at_poisoned_weights(tmp_path, value):
    def poison(model):
        model.head.weight.set_value(np.full([8, 16], value, dtype="float32"))

    # Paddle's cross-entropy of nan logits is a finite number; the gradient norm gives it away.
    with pytest.raises(DivergedError, match=r"step 1: the .* is (nan|inf); .*no checkpoint was"):
        run(tmp_path, prepare=poison)
    assert read_log(tmp_path / "train_log.jsonl") == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_watchdog_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path, value):
    calls = []

    def break_fifth(logits, labels):
        calls.append(1)
        return mean_loss(logits, labels) * (value if len(calls) == 5 else 1.0)

    with pytest.raises(DivergedError, match=rf"step 5: the loss is {value}; .*checkpoint-4"):
        run(tmp_path, "--save_strategy", "steps", "--save_steps", 2, criterion=break_fifth)
    saved = paddle.load(str(tmp_path / "checkpoint-4" / "model.pdparams"))
    assert all(np.isfinite(tensor.numpy()).all() for tensor in saved.values())


def test_watchdog_stops_at_a_bad_gradient_before_the_weights_change(tmp_path):
    held = []

    def overflow(model):
        held.append(model)
        # The loss stays finite; its gradient does not.
        model.norm.register_hook(lambda gradient: gradient * 1e30 * 1e30)

    with pytest.raises(DivergedError, match="step 1: the gradient norm is inf"):
        run(tmp_path, prepare=overflow)
    paddle.seed(1)
    for ours, fresh in zip(held[0].parameters(), Bigram().parameters(), strict=True):
        assert np.array_equal(ours.numpy(), fresh.numpy())


def test_too_high_a_learning_rate_ends_in_the_watchdog_not_in_nan_weights(tmp_path):
    with pytest.raises(DivergedError, match=r"step \d+: the (loss|gradient norm) is"):
        run(tmp_path, "--learning_rate", "1e20", "--max_grad_norm", 0)


def test_watchdog_stops_float16_that_overflows_at_scale_one(tmp_path):
    """Float16 needs a GPU; the rule that ends its endless overflow does not."""
    trainer = run(tmp_path).trainer
    trainer.do_grad_scaling = True
    trainer.scaler = LossScale(1.0)
    trainer._check_loss_valid(paddle.to_tensor(2.0))
    trainer.scaler = LossScale(0.5)
    with pytest.raises(DivergedError, match="step 7: the float16 gradient at loss scale 1 is inf"):
        trainer._check_loss_valid(paddle.to_tensor(2.0))


def test_optimizer_of_another_model_is_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    run(tmp_path, "--save_strategy", "steps", "--save_steps", 3)
    path = tmp_path / "checkpoint-3" / "optimizer.safetensors"
    moments = {name.replace("head", "other"): value for name, value in load_file(path).items()}
    save_file(moments, path)
    with pytest.raises(UserError, match="belongs to another model: 4 parameters"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-3"))


def test_damaged_optimizer_file_is_one_message(tmp_path):
    run(tmp_path, "--save_strategy", "steps", "--save_steps", 3)
    path = tmp_path / "checkpoint-3" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=r"optimizer.safetensors has no header: it is cut off"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-3"))


def test_large_optimizer_states_are_saved_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("llm.train.state._FILE_BYTES", 600)
    flags = ("--save_strategy", "steps", "--save_steps", 3)
    whole = run(tmp_path, *flags)
    assert len(list((tmp_path / "checkpoint-3").glob("optimizer-*-of-*.safetensors"))) > 2
    again = run(tmp_path, *flags, resume=str(tmp_path / "checkpoint-3"))
    assert np.array_equal(whole.weights, again.weights)


def test_random_state_round_trips_through_json():
    import random

    from llm.train.state import random_state, restore_random_state

    def draw():
        return random.random(), np.random.rand(), paddle.rand([3]).tolist()

    saved = json.loads(json.dumps(random_state()))
    first = draw()
    draw()
    restore_random_state(saved)
    assert draw() == first


def test_loss_curve_is_a_png_of_the_log(tmp_path):
    from matplotlib.image import imread

    run(tmp_path, "--do_eval")
    pixels = imread(tmp_path / "loss_curve.png")
    assert (
        pixels.shape[0] > 300 and len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 9
    )


def test_table_of_peaks_finds_the_longest_name():
    from llm.train.figures import table_rate

    assert table_rate("NVIDIA H100 PCIe").flops_per_second == 756e12
    assert table_rate("NVIDIA H100 80GB HBM3").flops_per_second == 989e12
    assert table_rate("NVIDIA A100-SXM4-80GB").flops_per_second == 312e12
    assert table_rate("NVIDIA L4").flops_per_second == 121e12
    assert table_rate("Some Other Card") is None
