"""Native flash attention against float64."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from external_ops.flash_attention import causal_attention_native, causal_attention_ref
from external_ops.tiled_attention import causal_attention_tiled
from tests.unit.external_ops import oracle
from tests.unit.external_ops.oracle import to_bfloat16

REPO = Path(__file__).resolve().parents[3]
# B, S, P, H, G, D: one row, partial and whole tiles, sizes that fill vectors and that do not,
# groups of 1, 4 and 8, a prefix that fills tiles of keys.
SHAPES = [
    (1, 1, 0, 1, 1, 64),
    (2, 17, 0, 8, 1, 128),
    (1, 17, 5, 4, 1, 80),
    (2, 97, 30, 3, 3, 33),
    (1, 400, 7, 4, 1, 64),
    (1, 30, 400, 4, 2, 16),
    (1, 1000, 0, 2, 2, 64),
]


def draw(shape, dtype="float32"):
    batch, length, prefix, heads, groups, size = shape
    rng = np.random.default_rng(length)
    shapes = [[batch, length, heads, size]] + [[batch, prefix + length, groups, size]] * 2
    arrays = [rng.standard_normal(s).astype(np.float32) for s in [*shapes, shapes[0]]]
    return [to_bfloat16(a) for a in arrays] if dtype == "bfloat16" else arrays


def documents(shape):
    """Documents side by side in the first row, in no order in others; padding at the end."""
    rng = np.random.default_rng(1)
    segments = rng.integers(0, 3, shape[:2])
    segments[0].sort()
    segments[:, shape[1] - shape[1] // 5 :] = -1
    return segments


def textbook(q, k, v, grad, segments, keep):
    """Output and gradients with all scores at once; ``keep`` stores each operator's result."""
    batch, length, heads, size = q.shape
    keys, groups = k.shape[1:3]
    shared, scale = heads // groups, q.dtype.type(size**-0.5)
    wide_k, wide_v = (np.repeat(x, shared, 2).transpose(0, 2, 1, 3) for x in (k, v))
    q, grad = (keep(x * s).transpose(0, 2, 1, 3) for x, s in ((q, scale), (grad, 1)))
    seen = np.tri(length, keys, keys - length, dtype=bool)[None]
    if segments is not None:
        same = segments[:, :, None] == segments[:, None]
        same = np.concatenate([np.ones([batch, length, keys - length], bool), same], 2)
        seen = seen & same & (segments >= 0)[:, :, None]
    scores = np.where(seen[:, None], keep(q @ wide_k.swapaxes(2, 3)), -np.inf)
    weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e30))
    weights = keep(weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30))
    of_weights = keep(grad @ wide_v.swapaxes(2, 3))
    total = (of_weights * weights).sum(-1, keepdims=True)
    of_scores = keep(weights * (of_weights - total))
    of_k, of_v = (x.swapaxes(2, 3) @ rows for x, rows in ((of_scores, q), (weights, grad)))
    by_group = [batch, groups, shared, keys, size]
    results = [weights @ wide_v, keep(of_scores @ wide_k) * scale]
    results += [x.reshape(by_group).sum(2) for x in (of_k, of_v)]
    return [keep(x.transpose(0, 2, 1, 3)) for x in results]


def run(kernel, arrays, segments, dtype="float32"):
    *inputs, grad = (paddle.to_tensor(a).astype(dtype).detach() for a in arrays)
    for x in inputs:
        x.stop_gradient = False
    out = kernel(*inputs, None if segments is None else paddle.to_tensor(segments))
    out.backward(grad)
    return [x.astype("float32").numpy() for x in (out, *(x.grad for x in inputs))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_times_rule(each_level, shape, packed, dtype):
    if shape[1] == 1000 and each_level == "portable" and packed:
        pytest.skip("long, and covered by the others")
    arrays, segments = draw(shape, dtype), documents(shape) if packed else None
    exact = textbook(*(a.astype(np.float64) for a in arrays), segments, lambda x: x)
    plain = textbook(*arrays, segments, to_bfloat16 if dtype == "bfloat16" else np.float32)
    ours = run(causal_attention_native, arrays, segments, dtype)
    # With one key the gradients of scores are differences of equal sums.
    terms = np.abs(arrays[3]).sum() if shape[1] + shape[2] == 1 else 0.0
    for value, rough, truth in zip(ours, plain, exact, strict=True):
        assert oracle.within_twice(value, rough, truth, terms, dtype)
    if packed:
        assert all((x[segments < 0] == 0).all() for x in ours[:2])


def test_the_textbook_is_right():
    q, k, v, grad = (a.astype(np.float64) for a in draw((1, 17, 5, 4, 1, 8)))
    segments = np.sort(np.random.default_rng(0).integers(0, 3, [1, 17]))
    ours = textbook(q, k, v, grad, segments, lambda x: x)
    one = oracle.attention(q[0], k[0], v[0], segments[0])
    np.testing.assert_allclose(ours[0][0], one, atol=1e-12)
    for number, array in enumerate((q, k, v)):
        step = np.zeros_like(array)
        step.flat[7] = 1e-6
        ends = [[q, k, v] for _ in range(2)]
        ends[0][number], ends[1][number] = array + step, array - step
        high, low = (textbook(*e, grad, segments, lambda x: x)[0] for e in ends)
        derivative = ((high - low) * grad).sum() / 2e-6
        assert ours[number + 1].flat[7] == pytest.approx(derivative, abs=1e-7)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_padding_in_the_plain_forms(shape):
    arrays, segments = draw(shape), documents(shape)
    exact = textbook(*(a.astype(np.float64) for a in arrays), segments, lambda x: x)
    for kernel in (causal_attention_ref, causal_attention_tiled):
        for value, truth in zip(run(kernel, arrays, segments), exact, strict=True):
            np.testing.assert_allclose(value, truth, atol=2e-5)


@pytest.mark.parametrize("size", [40, 150], ids=lambda size: f"scores of {3 * size}")
def test_large_scores(each_level, size):
    """Rounding the logarithm that the backward pass takes weights from would spoil whole rows."""
    arrays = draw((1, 130, 3, 2, 1, 16))
    arrays[0] *= size
    exact = textbook(*(a.astype(np.float64) for a in arrays), None, lambda x: x)
    plain = textbook(*arrays, None, np.float32)
    ours = run(causal_attention_native, arrays, None)
    for value, rough, truth in zip(ours, plain, exact, strict=True):
        assert oracle.within_twice(value, rough, truth)


@pytest.mark.parametrize("shape", [(0, 5, 0, 2, 1, 64), (2, 0, 0, 2, 1, 64), (1, 0, 3, 2, 1, 64)])
def test_nothing_to_do(native_ops, shape):
    out, *grads = run(causal_attention_native, draw(shape), None)
    assert out.size == 0
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("shape", [(1, 300, 9, 2, 1, 64), (1, 250, 0, 4, 2, 80)], ids=str)
def test_threads_do_not_change_a_bit(each_level, shape, set_threads):
    """With one item and more threads the gradients take the form that splits it."""
    arrays, segments = draw(shape), documents(shape)
    results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        results.append(run(causal_attention_native, arrays, segments))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("frozen", [(0,), (1, 2)], ids=str)
def test_frozen_inputs_leave_other_gradients_alone(native_ops, frozen):
    arrays = draw((1, 20, 0, 4, 2, 16))
    grads = []
    for still in ((), frozen):
        inputs = [paddle.to_tensor(a, stop_gradient=i in still) for i, a in enumerate(arrays[:3])]
        causal_attention_native(*inputs).backward(paddle.to_tensor(arrays[3]))
        grads.append([x.grad for x in inputs])
    for number, (free, held) in enumerate(zip(*grads, strict=True)):
        assert held is None if number in frozen else bool((held == free).all())


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ([1, 4, 3, 8], [1, 4, 2, 8], [1, 4, 2, 8], "3 query heads are no multiple of 2 key heads"),
        ([1, 4, 2, 8], [1, 3, 2, 8], [1, 3, 2, 8], "4 queries look back at only 3 keys"),
        ([1, 4, 2, 8], [1, 4, 2, 8], [1, 5, 2, 8], r"v \[1, 5, 2, 8\]"),
    ],
)
def test_wrong_shapes_are_named(native_ops, q, k, v, message):
    with pytest.raises(ValueError, match=message):
        causal_attention_native(*(paddle.ones(shape) for shape in (q, k, v)))


def test_other_types_are_named(native_ops):
    with pytest.raises(ValueError, match="float32 or bfloat16; cast them"):
        causal_attention_native(*(paddle.ones([1, 4, 2, 8], "float64") for _ in range(3)))


MEMORY = """
import resource
import sys
import paddle
from external_ops import native
from external_ops.flash_attention import causal_attention_native
native.library()
length = int(sys.argv[1])
q, k, v = (paddle.ones([1, length, 1, 16]) for _ in range(3))
for x in (q, k, v):
    x.stop_gradient = False
causal_attention_native(*(x[:, :64] for x in (q, k, v))).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
causal_attention_native(q, k, v).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_square(native_ops):
    command = [sys.executable, "-c", MEMORY, "8192"]
    done = subprocess.run(command, capture_output=True, check=True, cwd=REPO)
    grown = int(done.stdout)  # KiB
    assert grown < 8192 * 8192 * 4 / 1024 / 16
