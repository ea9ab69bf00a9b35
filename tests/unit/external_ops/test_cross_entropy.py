"""Losses of labels, whole and by chunks, forward and backward, against float64."""

import itertools
from collections import Counter

import numpy as np
import paddle
import pytest

from external_ops import cross_entropy as module
from external_ops.cross_entropy import (
    VocabularyShard,
    cross_entropy_chunked,
    cross_entropy_ref,
    logit_losses,
)
from external_ops.modes import chunk_numbers
from tests.unit.external_ops import oracle

KERNELS = {"chunked": cross_entropy_chunked, "plain": cross_entropy_ref}
HIDDEN = 24


def whole(size):
    """Return a shard that is the whole vocabulary, so that its arithmetic runs in one process."""
    same = {name: lambda x: x for name in ("enter", "largest", "total", "gather")}
    return VocabularyShard(first=0, size=size, parts=1, **same)


def draw(tokens, vocabulary, scale=1.0, ignored=0.3, seed=0):
    rng = np.random.default_rng([tokens, vocabulary, seed])
    hidden = rng.standard_normal([tokens, HIDDEN]).astype(np.float32) * np.float32(scale)
    weight = rng.standard_normal([HIDDEN, vocabulary]).astype(np.float32)
    labels = rng.integers(0, vocabulary, tokens)
    labels[rng.random(tokens) < ignored] = -100
    return hidden, weight, labels, rng.standard_normal(tokens).astype(np.float32)


def run(kernel, hidden, weight, labels, grad, *, tied=False, shard=None, frozen=()):
    """Return losses, gradients of hidden states and weight ``[E, V]``, and which were right."""
    stored = np.ascontiguousarray(weight.T) if tied else weight
    tensors = [paddle.to_tensor(hidden), paddle.to_tensor(stored)]
    for index, tensor in enumerate(tensors):
        tensor.stop_gradient = index in frozen
    loss, correct = kernel(
        *tensors, paddle.to_tensor(labels), tied=tied, accuracy=True, shard=shard
    )
    assert loss.dtype == paddle.float32 and correct.dtype == paddle.bool
    loss.backward(paddle.to_tensor(grad))
    grads = [None if t.grad is None else t.grad.numpy() for t in tensors]
    if tied and grads[1] is not None:
        grads[1] = grads[1].T
    return loss.numpy(), *grads, correct.numpy()


@pytest.mark.parametrize("vocabulary", [65, 1000])
@pytest.mark.parametrize("tokens", [1, 5, 123])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard", [False, True], ids=["alone", "shard"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_against_float64(kernel, shard, tied, tokens, vocabulary, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 7 * vocabulary + 3)  # 7 tokens: none fits evenly
    hidden, weight, labels, grad = draw(tokens, vocabulary)
    given = whole(vocabulary) if shard else None
    *got, correct = run(KERNELS[kernel], hidden, weight, labels, grad, tied=tied, shard=given)
    *exact, best = oracle.cross_entropy(hidden, weight, labels, grad)
    for name, ours, truth in zip(("loss", "hidden", "weight"), got, exact, strict=True):
        scale = max(1.0, np.abs(truth).max(initial=0))
        np.testing.assert_allclose(ours, truth, atol=2e-6 * scale, err_msg=name)
    np.testing.assert_array_equal(correct, best == labels)
    assert (got[0][labels == -100] == 0).all() and (got[1][labels == -100] == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_without_a_label_that_counts(kernel, tokens):
    hidden, weight, labels, grad = draw(tokens, 65, ignored=1.0)
    losses, of_hidden, of_weight, correct = run(KERNELS[kernel], hidden, weight, labels, grad)
    assert losses.shape == (tokens,) and not losses.any() and not correct.any()
    assert of_hidden.shape == hidden.shape and not of_hidden.any() and not of_weight.any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shard", [False, True], ids=["alone", "shard"])
def test_extreme_logits(kernel, shard):
    """Hundreds apart, where exponentials overflow and vanish, and all equal."""
    for scale in (300.0, 0.0):
        hidden, weight, labels, grad = draw(11, 65, scale=scale)
        given = whole(65) if shard else None
        *got, correct = run(KERNELS[kernel], hidden, weight, labels, grad, shard=given)
        *exact, best = oracle.cross_entropy(hidden, weight, labels, grad)
        for ours, truth in zip(got, exact, strict=True):
            assert np.isfinite(ours).all()
            largest = max(1.0, np.abs(truth).max())
            np.testing.assert_allclose(ours, truth, atol=2e-6 * largest, rtol=1e-5)
        np.testing.assert_array_equal(correct, best == labels)


@pytest.mark.parametrize("frozen", [(0,), (1,)])
def test_what_is_frozen_gets_no_gradient(frozen):
    hidden, weight, labels, grad = draw(9, 65)
    exact = oracle.cross_entropy(hidden, weight, labels, grad)[1:3]
    got = run(cross_entropy_chunked, hidden, weight, labels, grad, frozen=frozen)[1:3]
    for index in range(2):
        if index in frozen:
            assert got[index] is None
        else:
            np.testing.assert_allclose(got[index], exact[index], atol=1e-5)


def test_all_logits_never_exist(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 10 * 1000)
    sizes = Counter()
    inner = module._product

    def watched(*arguments):
        logits = inner(*arguments)
        sizes[tuple(logits.shape)] += 1
        return logits

    monkeypatch.setattr(module, "_product", watched)
    run(cross_entropy_chunked, *draw(123, 1000))
    assert sizes == {(10, 1000): 24, (3, 1000): 2}  # 12 chunks and a rest, there and back


def test_a_weight_wider_than_a_chunk_goes_a_token_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 10)
    hidden, weight, labels, grad = draw(5, 65)
    got = run(cross_entropy_chunked, hidden, weight, labels, grad)[0]
    exact = oracle.cross_entropy(hidden, weight, labels, grad)[0]
    np.testing.assert_allclose(got, exact, atol=1e-5)


@pytest.mark.parametrize("label", [65, 10**6, -1, -101])
def test_a_label_that_is_no_token_does_not_pass_for_one(label):
    hidden, weight, labels, _ = draw(3, 65, ignored=0)
    labels[1] = label
    tensors = [paddle.to_tensor(array) for array in (hidden, weight, labels)]
    for kernel, shard in itertools.product(KERNELS.values(), (None, whole(65))):
        loss, _ = kernel(*tensors, shard=shard)
        np.testing.assert_array_equal(np.isnan(loss.numpy()), [False, True, False])


def test_from_logits_that_exist():
    hidden, weight, labels, grad = draw(9, 65)
    logits, tensor = hidden @ weight, paddle.to_tensor(labels)
    for shard in (None, whole(65)):
        loss, correct = logit_losses(paddle.to_tensor(logits), tensor, accuracy=True, shard=shard)
        exact, _, _, best = oracle.cross_entropy(hidden, weight, labels, grad)
        np.testing.assert_allclose(loss.numpy(), exact, atol=1e-5)
        np.testing.assert_array_equal(correct.numpy(), best == labels)
        assert logit_losses(paddle.to_tensor(logits), tensor, shard=shard)[1] is None


@pytest.mark.parametrize(
    ("gigabytes", "exponent"), [(0, 25), (7, 25), (16, 26), (24, 26), (40, 27), (80, 28), (288, 28)]
)
def test_chunks_take_a_share_of_the_memory(gigabytes, exponent):
    assert chunk_numbers(gigabytes * 2**30) == 2**exponent
