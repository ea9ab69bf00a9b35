"""Native RMSNorm, with and without a residual sum, against float64."""

from functools import lru_cache

import numpy as np
import paddle
import pytest

from external_ops import native
from external_ops.rms_norm import add_rms_norm_native, rms_norm_native, rms_norm_ref
from tests.unit.external_ops import oracle
from tests.unit.external_ops.oracle import to_bfloat16

pytestmark = pytest.mark.usefixtures("native_ops")

EPS = 1e-5
SHAPES = [(1, 65), (5, 65), (123, 65), (1, 4096), (2, 3, 41), (0, 64), (2, 0, 7), (9,)]


def draw(shape, scale=1.0, dtype="float32"):
    rng = np.random.default_rng(sum(shape))
    x, residual, grad, grad_sum = (
        rng.standard_normal(shape).astype(np.float32) * np.float32(scale) for _ in range(4)
    )
    weight = rng.standard_normal(shape[-1]).astype(np.float32) + 1
    arrays = x, residual, weight, grad / np.float32(scale), grad_sum / np.float32(scale)
    return [to_bfloat16(a).astype(np.float32) if dtype == "bfloat16" else a for a in arrays]


def tensors(arrays, dtype):
    return [paddle.to_tensor(a).astype(dtype).detach() for a in arrays]


def wide(tensor):
    return tensor.astype("float32").numpy()


def run_native(arrays, dtype):
    """Return output, sum and the gradients of x, residual and weight."""
    x, residual, weight, grad, grad_sum = tensors(arrays, dtype)
    for tensor in (x, residual, weight):
        tensor.stop_gradient = False
    out, total = add_rms_norm_native(x, residual, weight, EPS)
    paddle.autograd.backward([out, total], [grad, grad_sum])
    return [wide(t) for t in (out, total, x.grad, residual.grad, weight.grad)]


def plain(arrays, dtype):
    """The same by plain operators; in bfloat16, with every result of one rounded."""
    x, residual, weight, grad, grad_sum = arrays
    keep = to_bfloat16 if dtype == "bfloat16" else np.float32
    total = keep(x + residual).astype(np.float32)
    rstd = 1 / np.sqrt(np.mean(total * total, -1, keepdims=True, dtype=np.float32) + EPS)
    normed = keep(total * rstd)
    up = keep(grad * weight)
    grad_weight = keep(keep(grad * normed).reshape(-1, x.shape[-1]).astype(np.float32).sum(0))
    along = np.mean(up * total, -1, keepdims=True, dtype=np.float32) * rstd**2
    grad_x = keep(keep(rstd * (up - total * along)) + grad_sum)
    return keep(normed * weight), total, grad_x, grad_x, grad_weight


def truth(arrays):
    x, residual, weight, grad, grad_sum = (a.astype(np.float64) for a in arrays)
    total = x + residual
    grad_x, grad_weight = oracle.rms_norm_gradients(total, weight, EPS, grad)
    grad_x += grad_sum
    return oracle.rms_norm(total, weight, EPS), total, grad_x, grad_x, grad_weight


def sizes(arrays):
    """What the gradient's terms are as large as, where they cancel."""
    x, residual, weight, grad, _ = arrays
    lengths = np.sqrt(np.mean((x + residual).astype(np.float64) ** 2, -1, keepdims=True) + EPS)
    term = np.abs(grad * weight / lengths).max(initial=0)
    return 0, 0, term, term, 0


@lru_cache
def case(shape, dtype):
    """Inputs, and what plain operators and float64 make of them; the same for every level."""
    arrays = draw(shape, dtype=dtype)
    return arrays, plain(arrays, dtype), truth(arrays)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_times_rule(each_level, shape, dtype):
    if shape == (1, 4096) and dtype == "bfloat16":
        shape = (1, 1024)  # the oracle builds a whole Jacobian a row
    arrays, reference, exact = case(shape, dtype)
    names = "output", "sum", "grad x", "grad residual", "grad weight"
    rows = zip(names, run_native(arrays, dtype), reference, exact, sizes(arrays), strict=True)
    for name, ours, theirs, right, size in rows:
        assert oracle.within_twice(ours, theirs, right, size, dtype), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_rows(each_level, dtype):
    """Rows enough for several slabs of the weight's gradient, and for two threads."""
    arrays, theirs, exact = case((2049, 65), dtype)
    ours = run_native(arrays, dtype)
    for index, size in enumerate(sizes(arrays)):
        assert oracle.within_twice(ours[index], theirs[index], exact[index], size, dtype)


@pytest.mark.parametrize("shape", [(5, 4096), (123, 65), (7, 3, 64)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_agrees_with_the_plain_form_without_a_residual(each_level, shape, scale):
    x, _, weight, grad, _ = draw(shape, scale)
    results = []
    for kernel in (rms_norm_native, rms_norm_ref):
        leaves = [paddle.to_tensor(a, stop_gradient=False) for a in (x, weight)]
        out = kernel(*leaves, EPS)
        out.backward(paddle.to_tensor(grad))
        results.append([out.numpy(), *(t.grad.numpy() for t in leaves)])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6 * np.abs(theirs).max())


def test_bfloat16_rounds_where_the_reference_does(each_level):
    x, _, weight, *_ = draw((33, 200), dtype="bfloat16")
    x, weight = tensors([x, weight], "bfloat16")
    ours, theirs = (wide(kernel(x, weight, EPS)) for kernel in (rms_norm_native, rms_norm_ref))
    # A mean that is one bit off may send a number the other way.
    assert (ours != theirs).mean() < 0.01
    np.testing.assert_allclose(ours, theirs, rtol=2**-7)


def test_extreme_rows_stay_apart(each_level):
    rows = [np.full(65, 1e-30), np.zeros(65), np.full(65, 1e18), np.linspace(-3, 3, 65)]
    x, weight = np.stack(rows).astype(np.float32), np.linspace(0.5, 2, 65).astype(np.float32)
    out = rms_norm_native(*map(paddle.to_tensor, (x, weight)), EPS).numpy()
    np.testing.assert_allclose(out, oracle.rms_norm(x, weight, EPS), rtol=1e-5, atol=0)
    x[1, 5] = np.nan
    out = rms_norm_native(*map(paddle.to_tensor, (x, weight)), EPS).numpy()
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2, 3]]).all()


def test_threads_do_not_change_a_bit(each_level, set_threads):
    arrays = draw((301, 512))
    results = []
    for count in (1, 2):
        set_threads(count)
        results.append(run_native(arrays, "float32"))
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    "dtype, shape",
    [("float32", (6200, 1024)), ("float32", (6200, 1028)), ("bfloat16", (12400, 1024))],
    ids=["float32", "float32, rows not aligned", "bfloat16"],
)
def test_outputs_too_large_for_the_caches(set_threads, dtype, shape):
    """These are written past the caches where their rows are aligned."""
    rng = np.random.default_rng(0)
    weight = rng.random(shape[1], np.float32) + 1
    rows = [rng.random(shape, np.float32) - np.float32(0.5) for _ in range(4)]

    def run(x, residual, grad, grad_sum):
        return run_native([x, residual, weight, grad, grad_sum], dtype)[:4]

    set_threads(2)
    whole = run(*rows)
    set_threads(1)
    for large, small in zip(whole, oracle.by_parts(run, rows), strict=True):
        np.testing.assert_array_equal(large, small)


@pytest.mark.parametrize("used", ["output", "sum"])
def test_gradient_where_one_result_is_unused(native_ops, used):
    x, residual, weight, grad, _ = draw((4, 33))
    leaves = [paddle.to_tensor(a, stop_gradient=False) for a in (x, residual, weight)]
    pair = add_rms_norm_native(*leaves, EPS)
    pair[0 if used == "output" else 1].backward(paddle.to_tensor(grad))
    exact = oracle.rms_norm_gradients(x + residual, weight, EPS, grad)
    for leaf in leaves[:2]:
        expected = exact[0] if used == "output" else grad
        np.testing.assert_allclose(leaf.grad.numpy(), expected, rtol=1e-4, atol=1e-5)
    expected = exact[1] if used == "output" else np.zeros(33)
    np.testing.assert_allclose(leaves[2].grad.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_x_and_residual_do_not_share_memory(native_ops):
    """Paddle adds to gradients in place: what x gets elsewhere must not reach the residual."""
    x, residual, weight, grad, _ = draw((4, 33))
    leaves = [paddle.to_tensor(a, stop_gradient=False) for a in (x, residual, weight)]
    add_rms_norm_native(*leaves, EPS)[0].backward(paddle.to_tensor(grad))
    before = leaves[1].grad.numpy().copy()
    (leaves[0] * 3.0).sum().backward()
    np.testing.assert_array_equal(leaves[1].grad.numpy(), before)
    np.testing.assert_array_equal(leaves[0].grad.numpy(), before + np.float32(3))


def test_refused_inputs_are_named(native_ops):
    x, weight = paddle.zeros([4, 8]), paddle.ones([8])
    with pytest.raises(ValueError, match=r"weight \[4\].*x \[4, 8\]"):
        rms_norm_native(x, paddle.ones([4]), EPS)
    with pytest.raises(ValueError, match="differ in their types"):
        rms_norm_native(x, weight.astype("bfloat16"), EPS)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        native.run("rms_norm", x.astype("float64"), weight.astype("float64"), EPS)
    with pytest.raises(ValueError, match=r"residual \[3, 8\]"):
        add_rms_norm_native(x, paddle.zeros([3, 8]), weight, EPS)
