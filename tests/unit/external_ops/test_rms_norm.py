"""RMSNorm, fused and plain, forward and backward, against float64."""

import numpy as np
import paddle
import pytest

from external_ops import rms_norm
from external_ops.rms_norm import rms_norm_fused_cpu, rms_norm_fused_gpu, rms_norm_ref
from tests.unit.external_ops import oracle

EPS = 1e-5
SHAPES = [(1, 5, 123), (2, 3, 4, 64), (7,), (1, 1), (5, 1), (0, 64), (2, 0, 64), (3, 4097)]
KERNELS = {"fused": rms_norm_fused_cpu, "plain": rms_norm_ref}


def run(kernel, x, weight, grad=None, *, frozen=()):
    """Return the output and, for an upstream gradient, those of input and weight."""
    tensors = [paddle.to_tensor(x), paddle.to_tensor(weight)]
    for index, tensor in enumerate(tensors):
        tensor.stop_gradient = index in frozen
    out = kernel(*tensors, EPS)
    if grad is None:
        return out.numpy()
    out.backward(paddle.to_tensor(grad))
    return out.numpy(), *(t.grad.numpy() if t.grad is not None else None for t in tensors)


def draw(shape, scale=1.0):
    rng = np.random.default_rng(sum(shape))
    x, grad = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    return x * np.float32(scale), rng.standard_normal(shape[-1]).astype(np.float32) + 1, grad


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_two_times_rule(shape, scale):
    x, weight, grad = draw(shape, scale)
    exact = oracle.rms_norm(x, weight, EPS), *oracle.rms_norm_gradients(x, weight, EPS, grad)
    plain = run(rms_norm_ref, x, weight, grad)
    fused = run(rms_norm_fused_cpu, x, weight, grad)
    # In a short row the gradient's two terms cancel almost wholly.
    lengths = np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + EPS)
    terms = np.abs(grad * weight / lengths).max(initial=0)
    for what, ours, reference, truth, size in zip(
        ("output", "grad x", "grad weight"), fused, plain, exact, (0, terms, 0), strict=True
    ):
        assert ours.shape == truth.shape and ours.dtype == np.float32, what
        close = 1e-6 * max(np.abs(truth).max(initial=0), size)
        np.testing.assert_allclose(reference, truth, rtol=1e-5, atol=close, err_msg=what)
        assert oracle.within_twice(ours, reference, truth, size), what


def test_jacobian_of_the_oracle_is_a_derivative():
    x, weight, grad = (a.astype(np.float64) for a in draw((3, 9)))
    grad_x, grad_weight = oracle.rms_norm_gradients(x, weight, EPS, grad)
    step = 1e-6
    for index in np.ndindex(x.shape):
        moved = [x.copy() for _ in range(2)]
        moved[0][index] += step
        moved[1][index] -= step
        high, low = ((oracle.rms_norm(m, weight, EPS) * grad).sum() for m in moved)
        assert grad_x[index] == pytest.approx((high - low) / (2 * step), abs=1e-7)
    wider = weight.copy()
    wider[4] += step
    change = ((oracle.rms_norm(x, wider, EPS) - oracle.rms_norm(x, weight, EPS)) * grad).sum()
    assert grad_weight[4] == pytest.approx(change / step, abs=1e-6)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_extreme_rows_stay_apart(kernel):
    """Tiny, huge, zero and broken rows: each as if it were alone."""
    rows = [np.full(64, 1e-30), np.zeros(64), np.full(64, 1e18), np.linspace(-3, 3, 64)]
    x = np.stack(rows).astype(np.float32)
    weight = np.linspace(0.5, 2, 64).astype(np.float32)
    np.testing.assert_allclose(
        run(kernel, x, weight), oracle.rms_norm(x, weight, EPS), rtol=1e-5, atol=0
    )
    x[1, 5] = np.nan
    out = run(kernel, x, weight)
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2, 3]]).all()


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("frozen", [(0,), (1,)], ids=["input", "weight"])
def test_frozen_side_leaves_the_other_gradient_alone(kernel, frozen):
    x, weight, grad = draw((4, 33))
    both, one = run(kernel, x, weight, grad), run(kernel, x, weight, grad, frozen=frozen)
    assert one[1 + frozen[0]] is None
    kept = 2 - frozen[0]
    np.testing.assert_array_equal(one[kept], both[kept])


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1)], ids=str)
def test_the_gpu_kernel_is_asked_for_both_gradients_or_none(monkeypatch, frozen):
    """Its gradient writes both without asking, and fails where one has no place."""
    asked = []

    def kernel(x, weight, eps):
        asked.append({x.stop_gradient, weight.stop_gradient})
        return rms_norm_ref(x, weight, eps)

    monkeypatch.setattr(rms_norm, "_kernel", kernel)
    x, weight, grad = draw((4, 33))
    if frozen == (0, 1):
        run(rms_norm_fused_gpu, x, weight, frozen=frozen)
    else:
        ours = run(rms_norm_fused_gpu, x, weight, grad, frozen=frozen)
        plain = run(rms_norm_ref, x, weight, grad, frozen=frozen)
        for found, wanted in zip(ours, plain, strict=True):
            assert (found is None) == (wanted is None)
            assert wanted is None or np.array_equal(found, wanted)
    assert [len(one) for one in asked] == [1]


@pytest.mark.parametrize("frozen", [True, False])
def test_sum_and_norm_on_a_gpu(monkeypatch, frozen):
    """The sum's gradient comes through the norm and beside it."""
    monkeypatch.setattr(rms_norm, "_kernel", rms_norm_ref)
    x, weight, grad = draw((4, 33))
    results = []
    for form in (rms_norm.add_rms_norm_fused_gpu, rms_norm.add_rms_norm_ref):
        tensors = [paddle.to_tensor(a, stop_gradient=False) for a in (x, grad)]
        scale = paddle.to_tensor(weight, stop_gradient=frozen)
        normed, total = form(*tensors, scale, EPS)
        (normed * paddle.to_tensor(grad) + total * 3).sum().backward()
        gradients = [t.grad for t in (*tensors, scale)]
        assert (gradients[2] is None) == frozen
        results.append([normed, total, *(g for g in gradients if g is not None)])
    for ours, wanted in zip(*results, strict=True):
        np.testing.assert_array_equal(ours.numpy(), wanted.numpy())


def test_without_gradients_and_on_strided_input():
    x, weight, _ = draw((6, 10, 32))
    tensor = paddle.to_tensor(x).transpose([1, 0, 2])
    with paddle.no_grad():
        out = rms_norm_fused_cpu(tensor, paddle.to_tensor(weight), EPS)
    assert out.stop_gradient
    exact = oracle.rms_norm(x.transpose(1, 0, 2), weight, EPS)
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-5, atol=1e-6)


def test_bfloat16_rounds_as_llama_was_trained():
    """Statistics are in float32; the normalised value is rounded before the weight is applied."""
    x, weight, _ = draw((5, 48))
    narrow = [paddle.to_tensor(a).astype("bfloat16") for a in (x, weight)]
    out = rms_norm_ref(*narrow, EPS)
    assert out.dtype == paddle.bfloat16
    x, weight = (t.astype("float32").numpy() for t in narrow)
    normed = oracle.rms_norm(x, np.ones(48), EPS).astype(np.float32)
    rounded = paddle.to_tensor(normed).astype("bfloat16").astype("float32").numpy()
    expected = paddle.to_tensor(rounded * weight).astype("bfloat16").astype("float32").numpy()
    np.testing.assert_array_equal(out.astype("float32").numpy(), expected)
