"""Attention over cache blocks, in ragged steps, against whole sequences in float64."""

import numpy as np
import paddle
import pytest

from external_ops.paged_attention import paged_attention_ref, stored_dim, to_stored
from tests.unit.external_ops import oracle
from tests.unit.external_ops.half_precision import half_kernels

# lengths of the sequences, H, G, D, block size
LAYOUTS = [
    ((1,), 2, 2, 4, 4),
    ((5, 17, 1, 9), 4, 2, 6, 4),
    ((33, 2), 3, 1, 5, 16),
    ((8, 8, 8), 8, 8, 8, 1),
    ((21, 4, 13, 1, 1, 30), 6, 3, 10, 7),
]


class Paged:
    """Random sequences and a cache whose blocks they own in random order."""

    def __init__(self, layout, seed, dtype="float32", cache_dtype=None):
        self.dtype = dtype
        cache_dtype = cache_dtype or dtype
        lengths, heads, groups, size, self.block = layout
        self.rng = np.random.default_rng(seed)
        self.q, self.k, self.v = (
            [self.rng.standard_normal([n, h, size]).astype(np.float32) for n in lengths]
            for h in (heads, groups, groups)
        )
        self.lengths, self.done = lengths, [0] * len(lengths)
        widths = [-(-n // self.block) for n in lengths]
        blocks = self.rng.permutation(sum(widths) + 3)
        # Unused entries of a row point anywhere: attention must not read past a sequence's end.
        self.table = self.rng.integers(0, len(blocks), [len(lengths), max(widths)], np.int32)
        for row, width in enumerate(widths):
            self.table[row, :width], blocks = blocks[:width], blocks[width:]
        shape = [sum(widths) + 3, self.block, groups, stored_dim(size, cache_dtype)]
        # In int8 a small scale: Paddle's softmax gives keys that are hidden a weight of e^-64.
        fill = 1 if cache_dtype == "int8" else 1e4
        self.caches = [paddle.full(shape, fill, cache_dtype) for _ in "kv"]

    def step(self, counts):
        """Advance each sequence by a number of tokens; return rows of output per sequence."""
        spans = [(n, self.done[n], self.done[n] + c) for n, c in enumerate(counts) if c]
        packed = [
            np.concatenate([a[n][i:j] for n, i, j in spans]) for a in (self.q, self.k, self.v)
        ]
        owner = np.concatenate([np.full(j - i, n) for n, i, j in spans]).astype(np.int32)
        position = np.concatenate([np.arange(i, j) for _, i, j in spans]).astype(np.int32)
        out = paged_attention_ref(
            *(paddle.to_tensor(array).astype(self.dtype) for array in packed),
            *self.caches,
            *map(paddle.to_tensor, (self.table, owner, position)),
        )
        assert out.dtype == getattr(paddle, self.dtype)
        out = out.astype("float32").numpy()
        for n, _, j in spans:
            self.done[n] = j
        ends = np.cumsum([j - i for _, i, j in spans])
        parts = np.split(out, ends[:-1])
        return {n: (i, j, part) for (n, i, j), part in zip(spans, parts, strict=True)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("largest_step", [1, 4, 100])
def test_ragged_steps(layout, largest_step):
    paged = Paged(layout, largest_step)
    exact = [oracle.attention(*one) for one in zip(paged.q, paged.k, paged.v, strict=True)]
    while any(left := [n - d for n, d in zip(paged.lengths, paged.done, strict=True)]):
        # Some sequences sit a step out, as requests that wait do.
        counts = [min(n, paged.rng.integers(0, largest_step + 1)) for n in left]
        if not any(counts):
            continue
        for n, (i, j, rows) in paged.step(counts).items():
            np.testing.assert_allclose(rows, exact[n][i:j], atol=2e-6, err_msg=f"{n}: {i}:{j}")
    keys, values = (cache.numpy() for cache in paged.caches)
    for n, length in enumerate(paged.lengths):
        positions = np.arange(length)
        slot = paged.table[n, positions // paged.block], positions % paged.block
        np.testing.assert_array_equal(keys[slot], paged.k[n])
        np.testing.assert_array_equal(values[slot], paged.v[n])


def test_foreign_blocks_stay_untouched():
    paged = Paged(LAYOUTS[1], 0)
    owned = {b for n, length in enumerate(paged.lengths) for b in paged.table[n, : -(-length // 4)]}
    paged.step(paged.lengths)
    foreign = [b for b in range(paged.caches[0].shape[0]) if b not in owned]
    assert foreign
    for cache in paged.caches:
        assert (cache.numpy()[foreign] == 1e4).all()


def test_neighbours_do_not_change_an_answer():
    """A sequence's rows are those that it gets alone, whatever shares its step."""
    layout = ((12, 12), 4, 2, 8, 4)
    together, alone = Paged(layout, 3), Paged(layout, 3)
    shared = together.step([12, 12])[0][2]
    np.testing.assert_allclose(alone.step([12, 0])[0][2], shared, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_cache_of_int8(layout):
    """Attends exactly to what NumPy makes of the heads."""
    paged = Paged(layout, 2, cache_dtype="int8")
    while any(left := [n - d for n, d in zip(paged.lengths, paged.done, strict=True)]):
        for n, (i, j, rows) in paged.step([min(n, 7) for n in left]).items():
            k, v = (oracle.through_int8(x[n][:j]) for x in (paged.k, paged.v))
            exact = oracle.attention(paged.q[n][:j], k, v)[i:]
            np.testing.assert_allclose(rows, exact, atol=2e-6)


def test_heads_of_a_cache_of_int8():
    """The bytes are NumPy's; extremes and ties, nothing, and numbers that are none."""
    x = np.random.default_rng(0).standard_normal((8, 3, 10)).astype(np.float32)
    x[0], x[1], x[2] = 0, x[1] * 1e37, x[2] * np.float32(1e-38)
    x[3, 1, 4], x[4, 2, 0], x[5, 0] = np.nan, np.inf, [127, *np.arange(0.5, 9)]
    found = to_stored(paddle.to_tensor(x), paddle.int8).numpy()
    np.testing.assert_array_equal(found, oracle.to_cached_int8(x))
    wide = oracle.through_int8(x)
    assert (wide[0] == 0).all() and np.isnan(wide[3, 1]).all() and np.isfinite(wide[3, ::2]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    """As float32 over the same rounded numbers, up to the rounding of what lies between."""
    layout = LAYOUTS[1]
    half = Paged(layout, 5, dtype)
    for arrays in (half.q, half.k, half.v):
        arrays[:] = [paddle.to_tensor(a).astype(dtype).astype("float32").numpy() for a in arrays]
    with half_kernels():
        rows = half.step(layout[0])
    unit = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    for n, (_, _, found) in rows.items():
        exact = oracle.attention(half.q[n], half.k[n], half.v[n])
        np.testing.assert_allclose(found, exact, atol=6 * unit)
