"""DPO, IPO and hinge against formulas in float64, and against their derivatives by differences."""

import dataclasses

import numpy as np
import paddle
import pytest

from common.errors import UserError
from external_ops.cross_entropy import cross_entropy_ref
from llm.llama.build import build_model
from llm.llama.config import PRESETS
from llm.train.preference import (
    LOSS_TYPES,
    DPOObjective,
    ReferencedPairs,
    dpo_loss,
    reference_log_probs,
    sequence_log_probs,
    token_counts,
)

TINY = PRESETS["tiny-random-llama"].replace(
    vocab_size=50, hidden_size=32, intermediate_size=40, initializer_range=0.3
)


@pytest.fixture(scope="module")
def model():
    network = build_model(TINY, seed=3)
    network.eval()
    return network


def pairs(count=3, length=9, seed=0):
    """Return ids and labels ``[2B, S]``, each row with a prompt and padding of its own length."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, TINY.vocab_size, [2 * count, length])
    labels = rng.integers(0, TINY.vocab_size, [2 * count, length])
    for row in range(2 * count):
        labels[row, : rng.integers(0, length - 3)] = -100
        labels[row, length - int(rng.integers(0, 2)) :] = -100
    return {"input_ids": paddle.to_tensor(ids), "labels": paddle.to_tensor(labels)}


def exact_log_probs(model, batch):
    """Return ``[2B]`` in float64 from the logits of every position."""
    with paddle.no_grad():
        logits = model(batch["input_ids"]).numpy().astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    labels = batch["labels"].numpy()
    chosen = np.take_along_axis(scores, np.maximum(labels, 0)[..., None], -1)[..., 0]
    return (chosen * (labels != -100)).sum(-1)


def exact_loss(policy, reference, beta, smoothing, kind, counts):
    """Return the summed loss in float64."""
    ratios = policy - reference
    if kind == "ipo":
        ratios = ratios / counts
    half = len(ratios) // 2
    margin = ratios[:half] - ratios[half:]
    if kind == "ipo":
        return ((margin - 1 / (2 * beta)) ** 2).sum()
    if kind == "hinge":
        return np.maximum(0, 1 - beta * margin).sum()
    right, wrong = np.logaddexp(0, -beta * margin), np.logaddexp(0, beta * margin)
    return ((1 - smoothing) * right + smoothing * wrong).sum()


def differences(function, at, step=1e-4):
    gradient = np.zeros_like(at)
    for place in range(at.size):
        offset = np.zeros_like(at)
        offset[place] = step
        gradient[place] = (function(at + offset) - function(at - offset)) / (2 * step)
    return gradient


def test_log_probs_equal_those_from_all_logits(model):
    batch = pairs()
    got = sequence_log_probs(model, batch["input_ids"], batch["labels"]).numpy()
    np.testing.assert_allclose(got, exact_log_probs(model, batch), rtol=1e-5)


def test_chosen_rows_equal_those_of_all_logits(model):
    ids = pairs()["input_ids"]
    rows = paddle.to_tensor([0, 7, 8, 9, 53])
    with paddle.no_grad():
        whole, some = model(ids).reshape([-1, TINY.vocab_size]), model(ids, rows_n=rows)
    np.testing.assert_allclose(some.numpy(), whole.numpy()[rows.numpy()], atol=1e-5)


def test_logits_of_prompts_are_never_computed(model, monkeypatch):
    seen = []

    def watched(hidden_nE, *others, **options):
        seen.append(hidden_nE.shape[0])
        return cross_entropy_ref(hidden_nE, *others, **options)

    monkeypatch.setattr(model, "ops", dataclasses.replace(model.ops, cross_entropy=watched))
    batch = pairs()
    sequence_log_probs(model, batch["input_ids"], batch["labels"])
    assert seen == [int((batch["labels"] != -100).sum())]


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize(
    ("kind", "smoothing"),
    [("ipo", 0.0), ("hinge", 0.0), ("sigmoid", 0.0), ("sigmoid", 0.1), ("sigmoid", 0.45)],
)
def test_loss_and_gradient(kind, beta, smoothing):
    rng = np.random.default_rng(1)
    policy, reference = rng.normal(-40, 6, 8), rng.normal(-40, 6, 8)
    counts = rng.integers(1, 30, 8).astype(np.float64)
    tensor = paddle.to_tensor(policy.astype("float32"), stop_gradient=False)
    loss = dpo_loss(
        tensor,
        paddle.to_tensor(reference.astype("float32")),
        beta=beta,
        label_smoothing=smoothing,
        loss_type=kind,
        counts=paddle.to_tensor(counts.astype("float32")),
    )
    assert loss.shape == [4]
    loss.sum().backward()

    def exact(at):
        return exact_loss(at, reference, beta, smoothing, kind, counts)

    assert float(loss.sum()) == pytest.approx(exact(policy), rel=1e-4)
    np.testing.assert_allclose(
        tensor.grad.numpy(), differences(exact, policy), rtol=2e-3, atol=1e-5
    )


@pytest.mark.parametrize("beta", [0.1, 1.0, 1000.0])
@pytest.mark.parametrize("margin", [-1e4, -50.0, 0.0, 50.0, 1e4])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_extremes_stay_finite_and_exact(beta, margin, smoothing):
    policy = paddle.to_tensor([-1e4 + margin, -1e4], stop_gradient=False)
    reference = paddle.to_tensor([-1e4, -1e4])
    loss = dpo_loss(policy, reference, beta=beta, label_smoothing=smoothing)
    loss.sum().backward()
    x = beta * float(margin)
    right, wrong = np.logaddexp(0, -x), np.logaddexp(0, x)
    wanted = (1 - smoothing) * right + smoothing * wrong
    assert float(loss) == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    # The slope is sigmoid(-x) as labelled and -sigmoid(x) exchanged; at 0 it is half, not nothing.
    slope = beta * (smoothing * np.exp(-right) - (1 - smoothing) * np.exp(-wrong))
    np.testing.assert_allclose(policy.grad.numpy(), [slope, -slope], rtol=1e-4, atol=1e-6)


def test_first_step_pushes_both_answers(model):
    """Policy and reference are equal then: loss log 2, accuracy 0, gradient not 0."""
    batch = pairs()
    with paddle.no_grad():
        batch["reference_logps"] = sequence_log_probs(model, batch["input_ids"], batch["labels"])
    total, weight, figures = DPOObjective(0.1)(model, batch)
    assert weight == 3.0
    assert float(total) == pytest.approx(3 * np.log(2), abs=1e-5)
    total.backward()
    norm = sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None)
    model.clear_gradients()
    assert norm > 1e-3
    assert figures["rewards_margin"] == pytest.approx((0.0, 3.0), abs=1e-5)
    even = DPOObjective()._figures(np.ones(4), np.ones(4), 2)
    assert even["rewards_accuracy"] == (0.0, 2.0)


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_objective_sums_over_any_split_of_the_batch(model, kind):
    batch = pairs(4)
    logps = exact_log_probs(model, batch)
    noise = np.random.default_rng(5).normal(0, 4, 8)
    batch["reference_logps"] = paddle.to_tensor((logps + noise).astype("float32"))
    objective = DPOObjective(0.3, loss_type=kind)
    whole, weight, figures = objective(model, batch)
    counts = token_counts(batch["labels"]).numpy()
    wanted = exact_loss(logps, logps + noise, 0.3, 0.0, kind, counts)
    assert float(whole) == pytest.approx(wanted, rel=1e-4)
    parts = [
        objective(model, {k: paddle.concat([v[a:b], v[4 + a : 4 + b]]) for k, v in batch.items()})
        for a, b in ((0, 1), (1, 4))
    ]
    assert sum(float(p[0]) for p in parts) == pytest.approx(float(whole), rel=1e-5)
    assert sum(p[1] for p in parts) == weight == 4.0
    rewards = -0.3 * noise
    wanted = {
        "rewards_chosen": rewards[:4].sum(),
        "rewards_rejected": rewards[4:].sum(),
        "rewards_margin": (rewards[:4] - rewards[4:]).sum(),
        "rewards_accuracy": (rewards[:4] > rewards[4:]).sum(),
        "logps_chosen": logps[:4].sum(),
        "logps_rejected": logps[4:].sum(),
    }
    assert figures.keys() == wanted.keys()
    for name, value in wanted.items():
        assert figures[name] == pytest.approx((value, 4.0), rel=1e-4, abs=1e-3), name
        assert sum(p[2][name][0] for p in parts) == pytest.approx(value, rel=1e-4, abs=1e-3)


def collate(samples):
    rows = [s[f"{kind}_ids"] for kind in ("chosen", "rejected") for s in samples]
    labels = [s[f"{kind}_labels"] for kind in ("chosen", "rejected") for s in samples]
    length = max(map(len, rows))

    def padded(values, fill):
        return np.stack([np.pad(v, (0, length - len(v)), constant_values=fill) for v in values])

    return {"input_ids": padded(rows, 0), "labels": padded(labels, -100)}


def dataset(count, seed=0):
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(count):
        item = {}
        for kind in ("chosen", "rejected"):
            length = int(rng.integers(4, 20))
            item[f"{kind}_ids"] = rng.integers(0, TINY.vocab_size, length)
            item[f"{kind}_labels"] = rng.integers(0, TINY.vocab_size, length)
            item[f"{kind}_labels"][:2] = -100
        items.append(item)
    return items


def test_reference_does_not_depend_on_batches_and_keeps_the_mode(model):
    items = dataset(19)
    model.train()
    scores = reference_log_probs(model, items, collate, batch_size=1)
    assert model.training
    model.eval()
    one = [
        exact_log_probs(model, {k: paddle.to_tensor(v) for k, v in collate([i]).items()})
        for i in items
    ]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, np.stack(one), rtol=1e-5)
    # More batches than one window, so that pairs of different lengths change places.
    np.testing.assert_allclose(reference_log_probs(model, items, collate, 3), scores, rtol=1e-5)
    assert not model.training


def test_pairs_carry_their_reference(model):
    items = dataset(5)
    scores = reference_log_probs(model, items, collate, 2)
    referenced = ReferencedPairs(items, scores, collate)
    batch = referenced.collate([referenced[4], referenced[1]])
    np.testing.assert_array_equal(batch["reference_logps"], scores[[4, 1]].T.reshape(-1))
    total, *_ = DPOObjective()(model, {k: paddle.to_tensor(v) for k, v in batch.items()})
    assert float(total) == pytest.approx(2 * np.log(2), abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta=0.0 has to be a positive number"),
        ({"beta": float("nan")}, "beta=nan has to be a positive number"),
        ({"beta": float("inf")}, "beta=inf has to be a positive number"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5 has to be at least 0 and below 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "only exists for loss_type=sigmoid"),
        ({"loss_type": "kto"}, "loss_type='kto' is not one of sigmoid, ipo, hinge"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        DPOObjective(**settings)


def _batch(**changes):
    return pairs() | {"reference_logps": paddle.zeros([6])} | changes


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (pairs(), "the batch has no reference_logps"),
        (_batch(reference_logps=paddle.zeros([3])), r"shape \[3\] do not fit 6 rows"),
        (
            _batch(reference_logps=paddle.to_tensor([0.0, 0, float("nan"), 0, 0, 0])),
            r"log-probability at \[2\] is nan",
        ),
        (_batch(labels=paddle.full([6, 9], -100, "int64")), "the chosen answer of pair 0"),
    ],
)
def test_bad_batches(model, batch, message):
    with pytest.raises(UserError, match=message):
        DPOObjective()(model, batch)


def test_bad_pairs(model):
    labels = pairs()["labels"]
    labels[4] = -100
    with pytest.raises(UserError, match="the rejected answer of pair 1 in the batch has no label"):
        token_counts(labels)
    with pytest.raises(UserError, match=r"shape \[5, 9\] are not pairs"):
        token_counts(labels[:5])
    with pytest.raises(UserError, match="are not two equal vectors of pairs"):
        dpo_loss(paddle.zeros([3]), paddle.zeros([3]), beta=0.1)
    with pytest.raises(UserError, match="ipo needs the number of labels"):
        dpo_loss(paddle.zeros([4]), paddle.zeros([4]), beta=0.1, loss_type="ipo")
    with pytest.raises(UserError, match="no preference pair"):
        reference_log_probs(model, [], collate, 2)
    with pytest.raises(UserError, match="batch_size=0"):
        reference_log_probs(model, dataset(1), collate, 0)
    with pytest.raises(UserError, match=r"shape \[2, 2\] do not fit 3 pairs"):
        ReferencedPairs(dataset(3), np.zeros([2, 2]), collate)
    with pytest.raises(UserError, match=r"at \[1, 0\] is -inf"):
        ReferencedPairs(dataset(2), np.array([[-1.0, -2], [-np.inf, -1]]), collate)


def test_a_broken_initial_model_is_said(model):
    broken = build_model(TINY, seed=3)
    broken.lm_head.weight.set_value(paddle.full(broken.lm_head.weight.shape, float("nan")))
    with pytest.raises(UserError, match="the initial model cannot score that pair"):
        reference_log_probs(broken, dataset(2), collate, 2)
