"""Causal attention against one query at a time in float64, and its gradient."""

import numpy as np
import paddle
import pytest

from external_ops import flash_attention as ours
from external_ops import tiled_attention
from external_ops.flash_attention import causal_attention_gpu, causal_attention_ref
from external_ops.tiled_attention import causal_attention_tiled
from tests.unit.external_ops import oracle

# B, S, H, G, D
SHAPES = [
    (1, 5, 3, 1, 8),
    (2, 17, 4, 2, 6),
    (1, 1, 2, 2, 4),
    (3, 33, 8, 8, 5),
    (2, 9, 6, 3, 40),
    (1, 16, 2, 1, 8),
    (1, 48, 2, 2, 4),
]
KERNELS = {"plain": causal_attention_ref, "tiled": causal_attention_tiled}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Let short rows have one tile, several, and a partial last one."""
    monkeypatch.setattr(tiled_attention, "_TILE", 16)


@pytest.fixture(params=KERNELS.values(), ids=KERNELS)
def kernel(request):
    return request.param


PREFIXES = [0, 1, 7, 16, 40]


def draw(shape, prefix=0):
    batch, length, heads, groups, size = shape
    rng = np.random.default_rng(length)
    q = rng.standard_normal([batch, length, heads, size]).astype(np.float32)
    keys = [batch, prefix + length, groups, size]
    k, v = (rng.standard_normal(keys).astype(np.float32) for _ in "kv")
    segments = np.sort(rng.integers(0, 4, [batch, length]), axis=1)
    return q, k, v, segments


def plain(q, k, v, segments=None):
    """The textbook form in float32: repeated heads, masked scores, softmax."""
    length, shared, prefix = q.shape[1], q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    k, v = (np.repeat(a, shared, axis=2) for a in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * np.float32(q.shape[-1] ** -0.5)
    hidden = ~np.tri(length, dtype=bool)[None]
    if segments is not None:
        hidden = hidden | (segments[:, :, None] != segments[:, None])
    hidden = np.concatenate([np.zeros([*hidden.shape[:2], prefix], bool), hidden], axis=-1)
    scores = np.where(hidden[:, None], np.float32(-np.inf), scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("scale", "prefix"), [(1.0, 0), (20.0, 0), (1.0, 1), (1.0, 16), (20.0, 23)]
)
def test_two_times_rule(kernel, shape, packed, scale, prefix):
    q, k, v, segments = draw(shape, prefix)
    q = q * np.float32(scale)
    chosen = segments if packed else None
    arguments = [q, k, v] + ([segments] if packed else [])
    out = kernel(*map(paddle.to_tensor, arguments)).numpy()
    rows = range(shape[0])
    exact = np.stack(
        [oracle.attention(q[b], k[b], v[b], segments[b] if packed else None) for b in rows]
    )
    assert oracle.within_twice(out, plain(q, k, v, chosen), exact)
    np.testing.assert_allclose(out, exact, atol=1e-5 * scale)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("prefix", [0, 5])
def test_gradients_are_numeric_derivatives(kernel, packed, prefix):
    q, k, v, segments = draw((1, 21, 4, 2, 4), prefix)
    rng = np.random.default_rng(1)
    weights = rng.standard_normal(q.shape)
    tensors = [paddle.to_tensor(a, stop_gradient=False) for a in (q, k, v)]
    chosen = segments if packed else None
    extra = [paddle.to_tensor(segments)] if packed else []
    (kernel(*tensors, *extra) * paddle.to_tensor(weights, "float32")).sum().backward()
    for number, tensor in enumerate(tensors):
        for _ in range(12):
            index = tuple(rng.integers(0, size) for size in tensor.shape)
            ends = []
            for step in (1e-5, -1e-5):
                moved = [a.astype(np.float64) for a in (q, k, v)]
                moved[number][index] += step
                one = oracle.attention(
                    *(a[0] for a in moved), chosen[0] if chosen is not None else None
                )
                ends.append((one * weights[0]).sum())
            derivative = (ends[0] - ends[1]) / 2e-5
            assert tensor.grad.numpy()[index] == pytest.approx(derivative, abs=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_gradients_of_both_forms_agree(shape, packed, prefix):
    q, k, v, segments = draw(shape, prefix)
    grad = np.random.default_rng(2).standard_normal(q.shape).astype(np.float32)
    extra = [paddle.to_tensor(segments)] if packed else []
    results = []
    for one in KERNELS.values():
        tensors = [paddle.to_tensor(a, stop_gradient=False) for a in (q, k, v)]
        one(*tensors, *extra).backward(paddle.to_tensor(grad))
        results.append([tensor.grad.numpy() for tensor in tensors])
    for plain_grad, tiled_grad in zip(*results, strict=True):
        np.testing.assert_allclose(tiled_grad, plain_grad, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_frozen_inputs_leave_other_gradients_alone(kernel, frozen):
    arrays = draw((1, 20, 4, 2, 4))[:3]
    grads = []
    for still in ((), frozen):
        tensors = [paddle.to_tensor(a, stop_gradient=i in still) for i, a in enumerate(arrays)]
        (kernel(*tensors) ** 2).sum().backward()
        grads.append([t.grad for t in tensors])
    for number, (free, held) in enumerate(zip(*grads, strict=True)):
        if number in frozen:
            assert held is None
        else:
            np.testing.assert_array_equal(held.numpy(), free.numpy())


def test_no_token_sees_the_future_or_another_document(kernel):
    q, k, v, _ = draw((1, 24, 2, 1, 8))
    segments = np.array([[7] * 5 + [2] * 9 + [9] * 10])

    def run(*arrays):
        return kernel(*map(paddle.to_tensor, arrays)).numpy()

    before = run(q, k, v, segments)
    for position in range(24):
        changed_k, changed_v = k.copy(), v.copy()
        changed_k[0, position] += 5
        changed_v[0, position] += 5
        moved = np.abs(run(q, changed_k, changed_v, segments) - before).max(axis=(0, 2, 3)) > 0
        sees = (np.arange(24) >= position) & (segments[0] == segments[0, position])
        np.testing.assert_array_equal(moved, sees)


def test_every_query_sees_the_whole_prefix(kernel):
    q, k, v, _ = draw((1, 18, 2, 1, 8), prefix=6)
    segments = np.array([[3] * 5 + [1] * 13])

    def run(*arrays):
        return kernel(*map(paddle.to_tensor, arrays)).numpy()

    before = run(q, k, v, segments)
    for position in range(6):
        changed = v.copy()
        changed[0, position] += 5
        moved = np.abs(run(q, k, changed, segments) - before).max(axis=(0, 2, 3))
        assert (moved > 0).all()


def square_attention(q, k, v, hidden):
    """Attention as the GPU's libraries document it, for as many queries as keys."""
    assert q.shape[1] == k.shape[1]
    shared = q.shape[2] // k.shape[2]
    k, v = (np.repeat(a.numpy(), shared, axis=2) for a in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q.numpy(), k) * q.shape[-1] ** -0.5
    scores = np.where(hidden[:, None] | ~np.tri(q.shape[1], dtype=bool), -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return paddle.to_tensor(np.einsum("bhqk,bkhd->bqhd", weights, v).astype(np.float32))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("packed", [False, True])
def test_what_the_gpu_kernels_are_asked_for(monkeypatch, packed, prefix):
    """Their inputs, with NumPy in their place: no GPU is needed to get a mask wrong."""
    from paddle.nn.functional import flash_attention as flash

    def flash_attention(q, k, v, causal):
        assert causal
        return (square_attention(q, k, v, np.zeros([1, q.shape[1], k.shape[1]], bool)),)

    def flashmask_attention(q, k, v, startend_row_indices, causal):
        assert causal and startend_row_indices.dtype == paddle.int32
        first_hidden = startend_row_indices.numpy()[:, 0, :, 0]
        rows = np.arange(q.shape[1])[None, :, None]
        return square_attention(q, k, v, rows >= first_hidden[:, None, :])

    monkeypatch.setattr(flash, "flash_attention", flash_attention)
    monkeypatch.setattr(flash, "flashmask_attention", flashmask_attention)
    monkeypatch.setattr(ours, "_FLASH_TYPES", (paddle.float32,))
    *arrays, segments = draw((2, 17, 4, 2, 6), prefix)
    arguments = list(map(paddle.to_tensor, [*arrays, segments] if packed else arrays))
    got, wanted = causal_attention_gpu(*arguments), causal_attention_ref(*arguments)
    np.testing.assert_allclose(got.numpy(), wanted.numpy(), atol=2e-6)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("length", [1, 2, 33])
def test_bounds_of_documents(length, prefix):
    """A row past a document's end sees none of its keys, whatever the documents' numbers are."""
    rng = np.random.default_rng(length)
    numbers = np.array([rng.permutation(50) - 10 for _ in range(40)])  # negative ones are padding
    documents = np.sort(rng.integers(0, min(length, 5) + 1, [40, length]), axis=1)
    segments = np.take_along_axis(numbers, documents, axis=1)
    rows = ours.first_hidden_rows(paddle.to_tensor(segments), prefix)
    assert rows.dtype == paddle.int32 and rows.shape == [40, 1, prefix + length, 1]
    found = rows.numpy()[:, 0, :, 0]
    assert (found[:, :prefix] == prefix + length).all()
    same = segments[:, :, None] == segments[:, None, :]
    last = prefix + length - np.argmax(same[:, :, ::-1], axis=2)
    np.testing.assert_array_equal(found[:, prefix:], last)


def test_layers_of_a_batch_share_its_bounds(monkeypatch):
    computed = []

    def counted(segments, prefix):
        computed.append(prefix)
        return first_hidden_rows(segments, prefix)

    first_hidden_rows = ours.first_hidden_rows
    monkeypatch.setattr(ours, "first_hidden_rows", counted)
    batches = [paddle.to_tensor(draw((2, 17, 1, 1, 1))[3]) for _ in range(2)]
    for segments in batches:
        for prefix in (0, 0, 3, 3):
            found = ours._bounds_of_batch(segments, prefix).numpy()
            np.testing.assert_array_equal(found, first_hidden_rows(segments, prefix).numpy())
    assert computed == [0, 3, 0, 3]


def test_bounds_take_memory_that_grows_with_the_row():
    """Of a row of 131,072 tokens all pairs would be 17 GB, as booleans."""
    length = 131_072
    segments = paddle.to_tensor(np.arange(length)[None] // 1000)
    rows = ours.first_hidden_rows(segments).flatten().numpy()
    ends = np.minimum((np.arange(length) // 1000 + 1) * 1000, length)
    np.testing.assert_array_equal(rows, ends)


@pytest.mark.parametrize("packed", [False, True])
def test_what_the_gpu_kernels_do_not_take(monkeypatch, packed):
    """They are given half precision only: of float32 nothing, of mixed types all in one."""
    from paddle.nn.functional import flash_attention as flash

    given = []

    def kernel(q, k, v, *_, **__):
        given.append((q.dtype, k.dtype, v.dtype))
        return q if packed else (q,)

    monkeypatch.setattr(flash, "flash_attention", kernel)
    monkeypatch.setattr(flash, "flashmask_attention", kernel)
    *arrays, segments = draw((2, 17, 4, 2, 6))
    q, k, v, *documents = map(paddle.to_tensor, [*arrays, segments] if packed else arrays)
    got, wanted = (f(q, k, v, *documents) for f in (causal_attention_gpu, causal_attention_ref))
    np.testing.assert_array_equal(got.numpy(), wanted.numpy())
    assert not given
    causal_attention_gpu(q, k, v.astype("bfloat16"), *documents)
    assert given == [(paddle.bfloat16,) * 3]
