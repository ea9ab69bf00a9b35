"""What finetuning asks of the trainer: uneven samples, passes, frozen weights, the best model."""

import json
import math
import re

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from common.errors import UserError
from data.conversations.instruct_dataset import Passes
from llm.config.finetune import FinetuneArguments
from llm.train.checks import Counts
from llm.train.finetune_plan import FinetunePlan, _epoch_ends
from tests.unit.paddlenlp_ext.harness import VOCAB, run


class Uneven:
    """Samples with one to five labels that count, in rows of six."""

    def __init__(self, size):
        rng = np.random.default_rng(3)
        self.ids = rng.integers(0, VOCAB, [size, 6])
        self.labels = rng.integers(0, VOCAB, [size, 6])
        for row in range(size):
            self.labels[row, 1 + row % 5 :] = -100
        self.label_counts = (self.labels >= 0).sum(-1)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def summed(model, batch):
    """An objective that counts labels."""
    labels = batch["labels"].flatten()
    logits = model(batch["input_ids"]).reshape([-1, VOCAB])
    loss = paddle.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    return loss, float((labels >= 0).sum()), {}


def uneven_run(path, *flags, size=12, samples=24):
    stream = Passes(Uneven(size), samples, seed=5)

    def count(start, stop):
        labels = int(stream.label_counts(range(start, stop)).sum())
        return Counts(labels, labels)

    datasets = {"train": stream, "eval": Uneven(7)}
    flags = ("--max_steps", samples // 6, *flags)
    return run(
        path, *flags, kind=FinetuneArguments, objective=summed, datasets=datasets, count=count
    )


def test_accumulated_batches_weigh_labels_like_one_batch(tmp_path):
    whole = uneven_run(tmp_path / "a", "--per_device_train_batch_size", 6)
    accumulate = ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 6)
    parts = uneven_run(tmp_path / "b", *accumulate)
    np.testing.assert_allclose(whole.weights, parts.weights, atol=2e-7)
    assert whole.series("loss") == pytest.approx(parts.series("loss"), rel=1e-6)


def test_evaluation_weighs_labels(tmp_path):
    flags = ("--do_eval", "--per_device_eval_batch_size", 3, "--per_device_train_batch_size", 6)
    outcome = uneven_run(tmp_path, *flags)
    data = Uneven(7)
    batch = {"input_ids": paddle.to_tensor(data.ids), "labels": paddle.to_tensor(data.labels)}
    loss, weight, _ = summed(outcome.model, batch)
    result = json.loads((tmp_path / "eval_results.json").read_text())
    assert result["eval_loss"] == pytest.approx(loss.item() / weight, rel=1e-6)
    assert result["eval_tokens"] == weight == data.label_counts.sum()


def epochs(samples, batch, passes, **flags):
    arguments = FinetuneArguments(
        per_device_train_batch_size=batch, num_train_epochs=passes, **flags
    )
    plan = FinetunePlan(None, None, None, arguments.total_steps(samples), run=arguments)
    return plan.max_steps, sorted(_epoch_ends(plan, samples))


def test_passes_become_updates():
    assert epochs(12, 4, 2.0) == (6, [3, 6])
    assert epochs(10, 4, 2.0) == (5, [3, 5])  # the third update ends one pass and begins another
    assert epochs(10, 4, 0.5) == (2, [])
    assert epochs(100, 10, 0.3) == (3, [])  # 0.3 * 100 is a little more than 30 in binary
    assert epochs(7, 8, 1.0) == (1, [1])
    assert epochs(12, 4, 9.0, max_steps=4) == (4, [3])


def test_evaluates_and_saves_after_each_pass(tmp_path):
    flags = ("--do_eval", "--evaluation_strategy", "epoch", "--save_strategy", "epoch")
    outcome = run(
        tmp_path, *flags, "--max_steps", 5, kind=FinetuneArguments, epoch_ends=frozenset([2, 4])
    )
    assert outcome.steps_with("eval_loss") == [2, 4, 5]
    assert outcome.checkpoints == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]


def test_evaluates_before_the_first_update(tmp_path):
    flags = ("--do_eval", "--eval_on_start", "--max_steps", 2)
    outcome = run(tmp_path, *flags, kind=FinetuneArguments)
    assert outcome.steps_with("eval_loss") == [0, 2]
    # Two updates, the second of which was measured and not taken over from the first.
    assert len(set(outcome.series("eval_loss"))) == 2


BEST = ("--do_eval", "--evaluation_strategy", "steps", "--eval_steps", 1, "--save_steps", 1)
BEST += ("--save_strategy", "steps", "--load_best_model_at_end", "true")


def scripted(values):
    """An objective whose evaluations give these figures in turn."""
    calls = iter(values)
    value = [math.nan]

    def objective(model, batch):
        loss, weight, _ = summed(model, batch)
        if model.training:
            value[0] = math.nan
            return loss, weight, {}
        if math.isnan(value[0]):
            value[0] = next(calls)
        return loss, weight, {"accuracy": (value[0] * weight, weight)}

    return objective


@pytest.mark.parametrize(
    ("flags", "best"), [((), 3), (("--greater_is_better", "false"), 1)], ids=["most", "least"]
)
def test_the_best_model_is_the_final_one(tmp_path, flags, best, caplog):
    metric = ("--metric_for_best_model", "eval_accuracy", "--save_total_limit", 1)
    outcome = run(
        tmp_path,
        *(*BEST, *metric, *flags),
        kind=FinetuneArguments,
        objective=scripted([0.1, 0.2, 0.6, 0.6, 0.5, 0.4]),
    )
    # The newest and the best stay, whatever the limit.
    assert outcome.checkpoints == [f"checkpoint-{best}", "checkpoint-6"]
    saved = paddle.load(str(tmp_path / f"checkpoint-{best}" / "model.pdparams"))
    final = paddle.load(str(tmp_path / "model.pdparams"))
    last = paddle.load(str(tmp_path / "checkpoint-6" / "model.pdparams"))
    for name, tensor in final.items():
        assert np.array_equal(tensor.numpy(), saved[name].numpy())
    assert any(not np.array_equal(t.numpy(), last[n].numpy()) for n, t in final.items())
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{best}")
    assert state["best_metric"] == pytest.approx({3: 0.6, 1: 0.1}[best])


def test_the_least_loss_is_the_best_and_resuming_remembers_it(tmp_path):
    whole = run(tmp_path, *BEST, kind=FinetuneArguments)
    again = run(tmp_path, *BEST, kind=FinetuneArguments, resume=str(tmp_path / "checkpoint-3"))
    losses = whole.series("eval_loss")
    best = again.trainer.state
    assert best.best_metric == min(losses[:6])
    assert best.best_model_checkpoint.endswith(f"checkpoint-{1 + losses.index(min(losses))}")
    assert np.array_equal(whole.weights, again.weights)


def test_the_best_checkpoint_may_lie_where_the_run_began(tmp_path):
    """Its best update comes before the one from which it goes on in another directory."""
    flags = (*BEST, "--metric_for_best_model", "eval_accuracy")
    options = {"kind": FinetuneArguments, "objective": scripted([0.1, 0.6, 0.5, 0.4, 0.3, 0.2])}
    run(tmp_path / "began", *flags, **options)
    middle = tmp_path / "began" / "checkpoint-3"
    options["objective"] = scripted([0.4, 0.3, 0.2])
    run(tmp_path / "went_on", *flags, **options, resume=str(middle))
    final = paddle.load(str(tmp_path / "went_on" / "model.pdparams"))
    best = paddle.load(str(tmp_path / "began" / "checkpoint-2" / "model.pdparams"))
    assert all(np.array_equal(final[name].numpy(), best[name].numpy()) for name in best)


def test_a_best_checkpoint_that_was_deleted_is_one_message(tmp_path):
    import shutil

    def lose(model, directory):
        raise AssertionError("nothing to load")

    outcome = run(tmp_path, *BEST, kind=FinetuneArguments)
    path = outcome.trainer.best.checkpoint(outcome.trainer.state)
    shutil.rmtree(path)
    with pytest.raises(UserError, match=re.escape(f"the best checkpoint {path} cannot be used")):
        outcome.trainer.load_best()


def test_frozen_weights_have_no_gradients_and_no_optimizer_state(tmp_path):
    before = {}

    def freeze(model):
        for name, parameter in model.named_parameters():
            parameter.stop_gradient = name != "norm"
            before[name] = parameter.numpy()

    outcome = run(tmp_path, "--save_strategy", "steps", prepare=freeze)
    moments = load_file(tmp_path / "checkpoint-6" / "optimizer.safetensors")
    assert {name.partition("/")[0] for name in moments} == {"norm"}
    for name, parameter in outcome.model.named_parameters():
        assert (parameter.grad is None) or name == "norm"
        assert np.array_equal(parameter.numpy(), before[name]) == (name != "norm")
    checkpoint = str(tmp_path / "checkpoint-6")
    assert np.array_equal(run(tmp_path, prepare=freeze, resume=checkpoint).weights, outcome.weights)


def test_answers_are_scored_like_paddlenlp_and_squad():
    from paddlenlp_ext.answer_scores import answer_scores

    pairs = [("the cat sat on a mat", ("x", "The cat sat on the mat.")), ("no cat", ("cat",))]
    scores = answer_scores(pairs)
    assert scores["exact_match"] == 50  # articles and punctuation do not count
    assert scores["f1"] == pytest.approx((100 + 100 * 2 / 3) / 2)
    assert scores["rouge1"] == 0.5 and scores["bleu4"] < 0.1  # the first answer of each, in words
    same = answer_scores([("你好 world of many words", ("你好 world of many words",))])
    expected = dict.fromkeys(("rouge1", "rouge2", "rougel", "bleu4"), 1.0)
    assert same == pytest.approx({"exact_match": 100.0, "f1": 100.0} | expected)
    assert answer_scores([("", ("a",))])["bleu4"] == 0.0
