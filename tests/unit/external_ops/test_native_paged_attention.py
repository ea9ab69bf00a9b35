"""Native attention over cache blocks: against float64, in programs, and in a fresh process."""

import subprocess
import sys
import textwrap
from functools import lru_cache

import numpy as np
import paddle
import pytest

from external_ops.paged_attention import paged_attention_native, paged_attention_ref
from tests.unit.external_ops import oracle
from tests.unit.external_ops.oracle import through_int8, to_bfloat16, to_cached_int8

# tokens of each sequence before the step and in it, H, G, D, block size
STEPS = {
    "one": ([(0, 1)], 2, 2, 64, 16),
    "prompt of 17": ([(0, 17)], 4, 1, 80, 16),
    "odd everything": ([(3, 5), (0, 17), (40, 1), (2, 9)], 6, 3, 10, 7),
    "decoding": ([(299, 1), (0, 1), (511, 1), (256, 1)], 8, 8, 64, 16),
    "decoding, 4 heads a key": ([(700, 1), (63, 1)], 8, 2, 128, 32),
    "decoding, 8 heads a key": ([(300, 1), (5, 2)], 8, 1, 80, 16),
    "decoding, 3 heads a key": ([(70, 1), (600, 2)], 6, 2, 72, 16),
    "prompts": ([(0, 150), (100, 40), (260, 1), (0, 3)], 8, 2, 64, 16),
    "a chunk's first key is some rows' last": ([(17, 120)], 8, 2, 64, 16),
    "long prompt": ([(0, 1000)], 4, 1, 128, 64),
    "block of 1": ([(4, 8), (0, 8)], 8, 8, 8, 1),
}


# What each type of cache makes of heads.
KEEP = {"float32": np.float32, "bfloat16": to_bfloat16, "int8": through_int8}


class Step:
    """A step of random sequences over blocks in random order."""

    def __init__(self, name, dtype="float32", scale=1.0):
        spans, heads, groups, size, block = STEPS[name]
        rng = np.random.default_rng(len(name))
        lengths = [done + new for done, new in spans]
        self.q, self.k, self.v = (
            [rng.standard_normal([n, h, size]).astype(np.float32) for n in lengths]
            for h in (heads, groups, groups)
        )
        self.q = [q * np.float32(scale) for q in self.q]
        self.spans, self.dtype = spans, dtype
        widths = [-(-n // block) for n in lengths]
        free = rng.permutation(sum(widths) + 2)
        # Entries past a sequence's end are no blocks at all: they must not be looked at.
        self.table = np.full([len(spans), max(widths) + 1], 1 << 30, np.int32)
        for row, width in enumerate(widths):
            self.table[row, :width], free = free[:width], free[width:]
        shape = [sum(widths) + 2, block, groups, size]
        caches = [np.full(shape, np.nan, np.float32) for _ in "kv"]
        for row, (done, _) in enumerate(spans):
            at = np.arange(done)
            slot = self.table[row, at // block], at % block
            caches[0][slot], caches[1][slot] = self.k[row][:done], self.v[row][:done]
        self.caches = caches
        self.owner = np.concatenate([np.full(new, n) for n, (_, new) in enumerate(spans)])
        self.position = np.concatenate([np.arange(d, d + new) for d, new in spans])

    def packed(self):
        """Return the tensors of the step, caches included."""
        parts = [
            np.concatenate([a[n][d : d + new] for n, (d, new) in enumerate(self.spans)])
            for a in (self.q, self.k, self.v)
        ]
        return [
            *map(paddle.to_tensor, parts),
            *map(self._stored, self.caches),
            paddle.to_tensor(self.table),
            paddle.to_tensor(self.owner.astype(np.int32)),
            paddle.to_tensor(self.position.astype(np.int32)),
        ]

    def _stored(self, cache):
        if self.dtype == "int8":
            return paddle.to_tensor(to_cached_int8(cache))
        return paddle.to_tensor(cache).astype(self.dtype)


def attend(step, precision):
    """Softmax over all keys in some precision, sequence by sequence."""
    keep = KEEP[step.dtype]
    rows = []
    for (done, new), q, k, v in zip(step.spans, step.q, step.k, step.v, strict=True):
        shared = q.shape[1] // k.shape[1]
        keys, values = (keep(a).repeat(shared, 1).astype(precision) for a in (k, v))
        queries = q[done:].astype(precision) * precision(q.shape[-1] ** -0.5)
        scores = np.matmul(queries.transpose(1, 0, 2), keys.transpose(1, 2, 0))
        hidden = np.arange(done + new) > np.arange(done, done + new)[:, None]
        scores = np.where(hidden, precision(-1e30), scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        rows.append(np.matmul(weights, values.transpose(1, 0, 2)).transpose(1, 0, 2))
    return np.concatenate(rows)


@lru_cache
def case(name, dtype="float32", scale=1.0):
    """A step, what plain float32 makes of it, and the truth; the same for every level."""
    step = Step(name, dtype, scale)
    return step, attend(step, np.float32), attend(step, np.float64)


@pytest.mark.parametrize("name", ["odd everything", "decoding, 4 heads a key"])
def test_the_truth_is_that_of_the_oracle(name):
    step, _, exact = case(name)
    # The oracle takes the keys before its queries for a prefix that all of them see.
    rows = [
        oracle.attention(q[done:], k, v)
        for (done, _), q, k, v in zip(step.spans, step.q, step.k, step.v, strict=True)
    ]
    np.testing.assert_allclose(exact, np.concatenate(rows), atol=1e-12)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", KEEP)
def test_two_times_rule(each_level, name, dtype):
    step, theirs, exact = case(name, dtype)
    tensors = step.packed()
    assert oracle.within_twice(paged_attention_native(*tensors).numpy(), theirs, exact)
    check_caches(step, tensors)


def check_caches(step, tensors):
    """The step's keys and values are in the cache, and nothing else changed."""
    keep = to_cached_int8 if step.dtype == "int8" else KEEP[step.dtype]
    block = step.caches[0].shape[1]
    slot = step.table[step.owner, step.position // block], step.position % block
    for before, cache, new in zip(step.caches, tensors[3:5], tensors[1:3], strict=True):
        expected = keep(before)
        expected[slot] = keep(new.numpy())
        found = cache if step.dtype == "int8" else cache.astype("float32")
        np.testing.assert_array_equal(found.numpy(), expected)


def test_a_scale_of_the_neighbours_head_is_found(native_ops):
    step, theirs, exact = case("decoding, 4 heads a key", "int8")
    tensors = step.packed()
    for number in (3, 4):
        bytes_of = tensors[number].numpy()
        bytes_of[..., -4:] = bytes_of[:, :, ::-1, -4:]
        tensors[number] = paddle.to_tensor(bytes_of)
    found = paged_attention_native(*tensors).numpy()
    assert not oracle.within_twice(found, theirs, exact)
    assert np.abs(found - exact).max() > 1e-3


@pytest.mark.parametrize("dtype", KEEP)
def test_agrees_with_the_plain_operator(each_level, dtype):
    step = Step("prompts", dtype)
    step.table = np.where(step.table == 1 << 30, 0, step.table)  # the operator gathers them all
    step.caches = [np.nan_to_num(c) for c in step.caches]
    ours, theirs = step.packed(), step.packed()
    np.testing.assert_allclose(
        paged_attention_native(*ours).numpy(), paged_attention_ref(*theirs).numpy(), atol=2e-6
    )
    for one, two in zip(ours[3:5], theirs[3:5], strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())


@pytest.mark.parametrize("name", ["decoding, 3 heads a key", "decoding", "odd everything"])
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_scores(each_level, name, scale):
    """Equal scores, and scores of which one takes all, be it far below zero where it is alone."""
    step, _, exact = case(name, scale=scale)
    out = paged_attention_native(*step.packed()).numpy()
    np.testing.assert_allclose(out, exact, atol=1e-5)


@pytest.mark.parametrize("name", ["decoding, 8 heads a key", "prompts", "prompt of 17"])
@pytest.mark.parametrize("dtype", KEEP)
def test_threads_do_not_change_a_bit(each_level, set_threads, name, dtype):
    """With three threads, heads are too few and keys are dealt out as well."""
    step, results = Step(name, dtype), []
    for count in (1, 2, 3):
        set_threads(count)
        results.append(paged_attention_native(*step.packed()).numpy())
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_padding_is_left_alone(each_level):
    step = Step("odd everything")
    tensors = step.packed()
    expected = paged_attention_native(*step.packed()).numpy()
    spare = [np.zeros([2, *t.shape[1:]], np.float32) for t in tensors[:3]]
    mixed = [
        paddle.concat([t[:5], paddle.to_tensor(s), t[5:]])
        for t, s in zip(tensors[:3], spare, strict=True)
    ]
    owner, position = (
        paddle.concat([t[:5], paddle.to_tensor(np.array(s, np.int32)), t[5:]])
        for t, s in ((tensors[6], [-1, 1]), (tensors[7], [4, -1]))
    )
    out = paged_attention_native(*mixed, *tensors[3:6], owner, position).numpy()
    np.testing.assert_array_equal(np.delete(out, [5, 6], axis=0), expected)
    assert (out[5:7] == 0).all()
    check_caches(step, tensors)


def test_empty_step(each_level):
    q, k, v, k_cache, v_cache, table, owner, position = Step("one").packed()
    out = paged_attention_native(
        q[:0], k[:0], v[:0], k_cache, v_cache, table, owner[:0], position[:0]
    )
    assert out.shape == [0, 2, 64]


def test_refused_inputs_are_named(native_ops):
    good = Step("decoding").packed()

    def refused(message, **changed):
        names = "q", "k", "v", "k_cache", "v_cache", "table", "owner", "position"
        with pytest.raises(ValueError, match=message):
            tensors = dict(zip(names, good, strict=True)) | changed
            paged_attention_native(*tensors.values())

    refused(r"keys \[4, 3, 64\]", k=paddle.zeros([4, 3, 64]))
    refused(r"values \[4, 8, 32\]", v=paddle.zeros([4, 8, 32]))
    refused(r"D \+ 4\] of int8", k_cache=good[3].astype("int8"))
    refused("have to have one shape and type", v_cache=good[4].astype("bfloat16"))
    refused("have to be float32", q=good[0].astype("bfloat16"))
    refused("have to be int32", owner=good[6].astype("int64"))
    owner, position = (
        paddle.to_tensor(np.array(numbers, np.int32))
        for numbers in ([0, 1, 2, 4], [299, 0, 10511, 256])
    )
    refused("token 3 is of sequence 4, but the block table has 4", owner=owner)
    refused("token 2 has position 10511.*widen it", position=position)
    refused("sequence 0 owns block 1073741824", position=good[7] + 15)
    # Padding at a sequence's end does not hide the tokens before.
    owner, position = (
        paddle.to_tensor(np.array(numbers, np.int32))
        for numbers in ([0, 0, 2, 3], [314, -1, 511, 256])
    )
    refused("sequence 0 owns block 1073741824", owner=owner, position=position)


PROGRAM = """
    import sys
    import numpy as np
    import paddle

    from external_ops import native
    from external_ops.paged_attention import paged_attention_native

    assert native.available()
    prefix = sys.argv[1]
    config = paddle.inference.Config(prefix + ".json", prefix + ".pdiparams")
    config.disable_gpu()
    config.disable_mkldnn()
    config.enable_new_ir(True)
    config.disable_glog_info()
    predictor = paddle.inference.create_predictor(config)
    arrays = np.load(prefix + ".npz")
    inputs = [paddle.to_tensor(arrays[name]) for name in predictor.get_input_names()]
    for key in range(2):
        out = predictor.run(inputs)[0].numpy()
    caches = {n: t.numpy() for n, t in zip(predictor.get_input_names(), inputs) if "cache" in n}
    np.savez(prefix + "_out.npz", out=out, **caches)
"""


def test_exported_program_in_a_fresh_process(native_ops, tmp_path, repo):
    """Paddle Inference writes into the caches that it is given, as the eager operator does."""
    step = Step("prompts")
    names = "q", "k", "v", "k_cache", "v_cache", "table", "owner", "position"
    tensors = step.packed()

    class Program(paddle.nn.Layer):
        def forward(self, q, k, v, k_cache, v_cache, table, owner, position):
            out = paged_attention_native(q * 2.0, k, v, k_cache, v_cache, table, owner, position)
            return out + 1.0

    specs = [
        paddle.static.InputSpec([None, *t.shape[1:]], t.dtype, name)
        for name, t in zip(names, tensors, strict=True)
    ]
    prefix = str(tmp_path / "program")
    program = paddle.jit.to_static(Program(), input_spec=specs, full_graph=True)
    paddle.jit.save(program, prefix)
    np.savez(f"{prefix}.npz", **dict(zip(names, (t.numpy() for t in tensors), strict=True)))
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), prefix],
        cwd=repo,
        check=True,
        capture_output=True,
    )
    found = np.load(f"{prefix}_out.npz")
    expected = paged_attention_native(tensors[0] * 2.0, *tensors[1:]) + 1.0
    np.testing.assert_array_equal(found["out"], expected.numpy())
    np.testing.assert_array_equal(found["k_cache"], tensors[3].numpy())
    np.testing.assert_array_equal(found["v_cache"], tensors[4].numpy())
