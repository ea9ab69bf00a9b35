"""The loss through native kernels: each instruction set against float64, by the 2x rule."""

import numpy as np
import paddle
import pytest

from external_ops import cross_entropy as module
from external_ops import native
from external_ops.cross_entropy import cross_entropy_native, cross_entropy_ref
from tests.unit.external_ops import oracle
from tests.unit.external_ops.test_cross_entropy import draw, run, whole

NAMES = ("loss", "gradient of hidden states", "gradient of weight")


def check(case, *, tied=False, shard=None, largest=1.0):
    """Hold losses and gradients to the 2x rule, and likeliest tokens to be equal."""
    *got, correct = run(cross_entropy_native, *case, tied=tied, shard=shard)
    *plain, _ = run(cross_entropy_ref, *case, tied=tied, shard=shard)
    *exact, best = oracle.cross_entropy(*case)
    for name, ours, reference, truth in zip(NAMES, got, plain, exact, strict=True):
        assert np.isfinite(ours).all()
        assert oracle.within_twice(ours, reference, truth, terms=largest), name
    np.testing.assert_array_equal(correct, best == case[2])
    ignored = case[2] == -100
    assert (got[0][ignored] == 0).all() and (got[1][ignored] == 0).all()


@pytest.mark.parametrize("tokens, vocabulary", [(1, 65), (5, 1000), (123, 65), (123, 1003)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kept", [False, True], ids=["again", "kept"])
def test_against_float64(each_level, tokens, vocabulary, tied, kept, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 7 * vocabulary + 3)  # 7 tokens: none fits evenly
    if not kept:
        monkeypatch.setattr(module, "KEPT_NUMBERS", 0)
    shard = whole(vocabulary) if tokens == 5 else None
    check(draw(tokens, vocabulary), tied=tied, shard=shard)


def test_many_tokens(each_level):
    check(draw(2049, 65))


def test_a_wide_vocabulary(each_level):
    check(draw(9, 32003))


@pytest.mark.parametrize("scale", [1e4, 0.0])
def test_extreme_logits(each_level, scale):
    """Tens of thousands apart, where exponentials overflow and vanish, and all equal."""
    check(draw(11, 65, scale=scale), largest=max(1.0, scale))


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_without_a_label_that_counts(each_level, tokens):
    hidden, weight, labels, grad = draw(tokens, 65, ignored=1.0)
    losses, of_hidden, of_weight, _ = run(cross_entropy_native, hidden, weight, labels, grad)
    assert losses.shape == (tokens,) and not losses.any()
    assert of_hidden.shape == hidden.shape and not of_hidden.any() and not of_weight.any()


def test_parts_of_a_vocabulary(each_level):
    """Statistics of columns, put together, are those of all columns."""
    rng = np.random.default_rng(0)
    # Whole numbers, so that several are the largest: the first of them counts.
    logits = np.round(rng.standard_normal([123, 130])).astype(np.float32) * 30
    labels = paddle.to_tensor(rng.integers(0, 130, 123))
    parts = [
        [x.numpy().astype(np.float64) for x in native.run(
            "cross_entropy_statistics", paddle.to_tensor(logits[:, at].copy()), labels, first, True
        )]
        for first, at in ((0, slice(0, 65)), (65, slice(65, 130)))
    ]  # fmt: skip
    tops = np.stack([part[0] for part in parts])
    sums = sum(part[1] * np.exp(part[0] - tops.max(0)) for part in parts)
    exact = logits.astype(np.float64)
    np.testing.assert_array_equal(tops.max(0), exact.max(1))
    np.testing.assert_allclose(sums, np.exp(exact - exact.max(1, keepdims=True)).sum(1), rtol=1e-6)
    target = parts[0][2] + parts[1][2]
    np.testing.assert_array_equal(target, exact[np.arange(123), labels.numpy()])
    first_best = np.where(tops[0] == tops.max(0), parts[0][3], parts[1][3] + 65)
    np.testing.assert_array_equal(first_best, exact.argmax(1))


def test_half_precision(native_ops):
    """Close to float32 on rounded inputs, where Paddle has no product at all on a CPU."""
    hidden, weight, labels, grad = draw(123, 65)
    half = [paddle.to_tensor(array).astype("bfloat16") for array in (hidden, weight)]
    exact = oracle.cross_entropy(*(t.astype("float32").numpy() for t in half), labels, grad)
    for tensor in half:
        tensor.stop_gradient = False
    loss, _ = cross_entropy_native(*half, paddle.to_tensor(labels))
    loss.backward(paddle.to_tensor(grad))
    np.testing.assert_allclose(loss.numpy(), exact[0], rtol=1e-6, atol=1e-6)
    for tensor, truth in zip(half, exact[1:3], strict=True):
        assert tensor.grad.dtype == paddle.bfloat16
        rounded = tensor.grad.astype("float32").numpy()
        np.testing.assert_allclose(rounded, truth, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("frozen", [(0,), (1,)])
def test_what_is_frozen_gets_no_gradient(native_ops, frozen):
    case = draw(9, 65)
    exact = oracle.cross_entropy(*case)[1:3]
    got = run(cross_entropy_native, *case, frozen=frozen)[1:3]
    for index in range(2):
        if index in frozen:
            assert got[index] is None
        else:
            np.testing.assert_allclose(got[index], exact[index], atol=1e-5)


@pytest.mark.parametrize("label", [65, 10**6, -1, -101])
def test_a_label_that_is_no_token_does_not_pass_for_one(each_level, label):
    hidden, weight, labels, _ = draw(3, 65, ignored=0)
    labels[1] = label
    tensors = [paddle.to_tensor(array) for array in (hidden, weight, labels)]
    for shard in (None, whole(65)):
        loss, _ = cross_entropy_native(*tensors, shard=shard)
        np.testing.assert_array_equal(np.isnan(loss.numpy()), [False, True, False])


def test_what_does_not_fit_is_refused(native_ops):
    logits, labels = paddle.zeros([3, 65]), paddle.zeros([3], "int64")
    with pytest.raises(ValueError, match=r"labels \[2\] have to be int64, one a row"):
        native.run("cross_entropy_statistics", logits, labels[:2], 0, False)
    with pytest.raises(ValueError, match="float32"):
        native.run("cross_entropy_statistics", logits.astype("float64"), labels, 0, False)
    with pytest.raises(ValueError, match="denominator and scale"):
        native.run(
            "cross_entropy_residual", logits, labels, paddle.zeros([2]), paddle.zeros([3]), 0
        )
