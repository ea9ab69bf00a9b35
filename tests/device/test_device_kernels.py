"""Kernels of the rehearsal device beside NumPy in float64, and what they refuse."""

import numpy as np
import pytest

JOBS = "tests.device.jobs_kernels"
RANDOM = np.random.default_rng(16)
# One rounding of results near 1, and of gradients that are made of a rounded result.
CLOSE = {"bfloat16": {"rtol": 2**-8, "atol": 2e-2}, "float16": {"rtol": 2**-11, "atol": 2e-3}}
half = pytest.mark.parametrize("dtype", CLOSE)


def draw(*shape):
    """Return numbers that bfloat16 and float16 can hold, so that inputs are not rounded."""
    return RANDOM.integers(-32, 33, shape) / 16


def masked_attention(q, k, v, hidden):
    """Return attention in float64 and a function from the result's gradient to all gradients.

    Shapes are [B, S, H, D] and [B, K, G, D]; ``hidden`` is [B, H, S, K].
    """
    groups = q.shape[2] // k.shape[2]
    keys, values = (np.repeat(each, groups, axis=2) for each in (k, v))
    scale = q.shape[-1] ** -0.5
    scores = np.where(hidden, -np.inf, np.einsum("bshd,bkhd->bhsk", q, keys) * scale)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)

    def gradients(grad):
        to_weights = np.einsum("bshd,bkhd->bhsk", grad, values)
        to_scores = weights * (to_weights - (weights * to_weights).sum(-1, keepdims=True)) * scale
        to_k = np.einsum("bhsk,bshd->bkhd", to_scores, q)
        to_v = np.einsum("bhsk,bshd->bkhd", weights, grad)
        shape = (*k.shape[:2], k.shape[2], groups, k.shape[3])
        to_q = np.einsum("bhsk,bkhd->bshd", to_scores, keys)
        return [to_q, to_k.reshape(shape).sum(3), to_v.reshape(shape).sum(3)]

    return np.einsum("bhsk,bkhd->bshd", weights, values), gradients


def check(numbers, expected, dtype):
    assert len(numbers) == len(expected)
    for one, other in zip(numbers, expected, strict=True):
        np.testing.assert_allclose(one, other, **CLOSE[dtype])


@half
@pytest.mark.parametrize("documents", [False, True])
def test_attention(device, dtype, documents):
    B, S, K, H, G, D = 2, 5, 5 if documents else 7, 4, 2, 8
    q, k, v, grad = draw(B, S, H, D), draw(B, K, G, D), draw(B, K, G, D), draw(B, S, H, D)
    hidden = np.arange(K) > np.arange(S)[:, None] + K - S
    hidden, bounds = np.broadcast_to(hidden, (B, H, S, K)), None
    if documents:  # of 2 and 3 tokens, and of 4 and 1
        ends = np.array([[2, 2, 5, 5, 5], [4, 4, 4, 4, 5]])
        hidden = hidden | (np.arange(S)[:, None] >= ends[:, None, None, :])
        bounds = ends.reshape(B, 1, K, 1).tolist()
    out, gradients = masked_attention(q, k, v, hidden)
    sent = [each.tolist() for each in (q, k, v, grad)]
    (numbers,) = device.call("gpu", f"{JOBS}:attention", *sent, bounds, dtype)
    check(numbers, [out, *gradients(grad)], dtype)


@half
def test_rms_norm(device, dtype):
    x, weight, grad = draw(3, 8), draw(8), draw(3, 8)
    rstd = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    normed, scaled = x * rstd, grad * weight
    to_x = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdims=True))
    expected = [normed * weight, to_x, (grad * normed).sum(0)]
    sent = [each.tolist() for each in (x, weight, grad)]
    (numbers,) = device.call("gpu", f"{JOBS}:rms_norm", *sent, dtype)
    check(numbers, expected, dtype)


def turned(x, cos, sin):
    left, right = np.split(x, 2, axis=-1)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


@half
def test_rotary(device, dtype):
    """Tables for all rows of a batch, for each row, and for packed tokens."""
    rows = {1: (1, 3, 1, 4), 2: (2, 3, 1, 4), 0: (6, 1, 4)}
    calls, expected = [], []
    for table in rows.values():
        shape = (2, 3, 4, 8) if len(table) == 4 else (6, 4, 8)
        x, cos, sin, grad = draw(*shape), draw(*table), draw(*table), draw(*shape)
        calls.append([*(each.tolist() for each in (x, cos, sin, grad)), "gpu", dtype])
        expected.append([turned(x, cos, sin), turned(grad, cos, -sin)])
    calls += [[*call[:4], "reference", dtype] for call in calls]
    (found,) = device.call("gpu", f"{JOBS}:several", "rotary", calls)
    for numbers, wanted in zip(found[:3], expected, strict=True):
        check(numbers, wanted, dtype)
    for numbers, wanted in zip(found[3:], expected, strict=True):  # three roundings instead of one
        for one, other in zip(numbers, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=4 * CLOSE[dtype]["atol"])


@half
def test_swiglu(device, dtype):
    gate, up, grad = draw(3, 8), draw(3, 8), draw(3, 8)
    gated = 1 / (1 + np.exp(-gate))
    slope = gated * (1 + gate * (1 - gated))
    sent = [each.tolist() for each in (gate, up, grad)]
    (numbers,) = device.call("gpu", f"{JOBS}:swiglu", *sent, dtype)
    check(numbers, [gate * gated * up, grad * up * slope, grad * gate * gated], dtype)


@half
def test_norm_of_a_sum(device, dtype):
    x, residual, weight = draw(3, 8), draw(3, 8), draw(8)
    total = x + residual  # which half precision holds
    normed = total / np.sqrt((total * total).mean(-1, keepdims=True) + 1e-5) * weight
    sent = [each.tolist() for each in (x, residual, weight)]
    (numbers,) = device.call("gpu", f"{JOBS}:norm_of_sum", *sent, dtype)
    check(numbers, [normed, total], dtype)


@half
def test_integer_products(device, dtype):
    calls, expected = [], []
    for bits, groups in ((8, 1), (8, 2), (4, 1), (4, 2)):
        limit = 2 ** (bits - 1) - 1
        integers, x = RANDOM.integers(-limit, limit + 1, (64, 128)), draw(3, 128)
        scale = RANDOM.integers(1, 9, (64, groups)) / 256
        calls.append([*(each.tolist() for each in (x, integers, scale)), bits, dtype])
        expected.append([x @ (integers * np.repeat(scale, 128 // groups, axis=1)).T])
    (found,) = device.call("gpu", f"{JOBS}:several", "integer_product", calls)
    for numbers, wanted in zip(found, expected, strict=True):
        check(numbers, wanted, dtype)


@half
@pytest.mark.parametrize("role", ["gpu", "itself"])
def test_adamw_keeps_a_master_weight(device, role, dtype):
    weight, grads = draw(3, 4), [draw(3, 4), draw(3, 4)]
    (found,) = device.call(
        role, f"{JOBS}:adamw", weight.tolist(), [grad.tolist() for grad in grads], dtype
    )
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for step, grad in enumerate(grads, start=1):
        first = 0.9 * first + 0.1 * grad
        second = 0.999 * second + 0.001 * grad**2
        update = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * update
    half_weight, master = found
    np.testing.assert_allclose(master, weight, rtol=1e-4, atol=1e-6)
    check([half_weight], [weight], dtype)
    assert half_weight != master


@half
def test_embedding(device, dtype):
    table, rows, grad = draw(6, 4), [1, 3, 1, 5], draw(4, 4)
    expected = np.zeros_like(table)
    np.add.at(expected, rows, grad)
    sent = table.tolist(), rows, grad.tolist()
    (numbers,) = device.call("itself", f"{JOBS}:embedding", *sent, dtype)
    check(numbers, [table[rows], expected], dtype)


@half
def test_product(device, dtype):
    x, y, grad = draw(3, 8), draw(8, 5), draw(3, 5)
    sent = [each.tolist() for each in (x, y, grad)]
    (numbers,) = device.call("itself", f"{JOBS}:product", *sent, dtype)
    check(numbers, [x @ y, grad @ y.T, x.T @ grad], dtype)


@pytest.mark.parametrize("role", ["gpu", "itself"])
def test_an_update_that_overflows_is_left_out(device, role):
    (seen,) = device.call(role, f"{JOBS}:overflow")
    losses, scales, weights = zip(*seen, strict=True)
    assert np.isinf(losses).tolist() == [False, True, False]
    assert scales == (1024, 512, 512)
    assert weights[0] == weights[1] != weights[2]
    assert losses[2] < losses[0]


SAID = {
    "attention in float32": "flash_attn",
    "keys of another type": "q is bfloat16, k is float16",
    "heads of 12": "a multiple of 8, at most 256, not 12",
    "heads of 264": "a multiple of 8, at most 256, not 264",
    "3 heads for 2": "3 query heads, 2 key heads",
    "bounds in int64": "must be int32, but received int64",
    "three bounds": "must in [1,2,4], not 3",
    "a weight of another type": "a weight in float32, x is bfloat16",
    "a frozen weight": "of the weight not wanted",
    "no master weight": "no master weight in float32",
    "tables of half a head": "received sin's shape is {1, 4, 1, 4}",
    "tables of each row": "The batch_size and num_heads of sin and cos must be 1",
    "tables in float32": "q is bfloat16, sin float32",
    "scales in float32": "x is bfloat16, its scales are float32",
    "groups of 32": "group_size must be -1, 64 or 128",
    "an unknown GPU": "arch only support 70, 75, 80, 86, 89, 90, 100",
    "80 outputs": "64 inputs, 80 outputs; tiles have 64",
    "blocks of 16": "block_size = 16 is unsupported!",
    "single tokens with heads of 8": "Dim_head = 8 is unsupported!",
    "lengths in int64": "is int64, not int32",
    "caches of another type": "in float16, qkv in bfloat16",
    "angles of half a head": "rope_emb is float32 [2, 1, 16, 1, 16]",
    "a length past the longest": "5 positions, max_dec_len_this_time 4",
    "more scores than shared memory": "bytes of shared memory",
    "float8 of 100 columns": "src_cols must be divisible by 128, not 100",
    "float8 of 100 rows, transposed": "input_transpose should be False",
    "float8 of 100 rows in blocks": "using_1x128_vec_quant should be True",
    "float8 blocks on both sides": "2Dx2D scaling is not supported",
    "float8 scales without padding": "its scales are [1, 2] instead of [1, 4]",
    "float8 of other lengths": "A inner dim: 384, B inner dim: 256",
}


def test_what_cuda_kernels_refuse_is_refused(device):
    (said,) = device.call("gpu", f"{JOBS}:refusals")
    assert said.keys() == SAID.keys()
    assert {case: text for case, text in said.items() if SAID[case] not in text} == {}


def test_a_device_that_is_no_gpu_has_no_operators_of_gpus(device):
    (said,) = device.call("itself", f"{JOBS}:refusals")
    assert "flash_attn" in said["keys of another type"]
    assert "q is bfloat16" not in said["keys of another type"]
