"""The bits of a row do not depend on what is beside it, in any kernel that generation runs.

``make bits`` runs the long form (``BITS=all``), with the levels that the processor lacks in
software.
"""

import os
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import paddle
import pytest
from paddle import Tensor

from external_ops.linear import pack_weight, packed_linear
from external_ops.paged_attention import paged_attention_native, to_stored
from external_ops.rms_norm import add_rms_norm_native, rms_norm_native
from external_ops.rotary import rotary_native
from external_ops.swiglu import swiglu_native

ALL = os.environ.get("BITS") == "all"
MOST = 65
SET_THREADS = Callable[[int], None]


def bits(x: Tensor) -> np.ndarray:
    """Return a float32 tensor as integers."""
    return x.astype("float32").numpy().view(np.int32)


def counts_that_differ(
    run: Callable[..., Tensor], arrays: tuple[np.ndarray, ...], counts: Iterable[int] = ()
) -> list[int]:
    """Return how many rows have to lie side by side for one to come out otherwise than alone."""
    counts = counts or range(1, len(arrays[0]) + 1)
    one_by_one = zip(*(np.split(a, len(a)) for a in arrays), strict=True)
    alone = np.concatenate([bits(run(*map(paddle.to_tensor, row))) for row in one_by_one])
    found = ((n, run(*(paddle.to_tensor(a[:n]) for a in arrays))) for n in counts)
    return [n for n, together in found if not np.array_equal(bits(together), alone[:n])]


def packed(kind: str, outputs: int, inputs: int, groups: int):
    """Return a random weight, scales of which differ by orders of magnitude."""
    rng = np.random.default_rng(inputs + groups)
    if kind in ("float32", "bfloat16"):
        wide = rng.standard_normal((outputs, inputs), np.float32)
        return pack_weight(paddle.to_tensor(wide), kind)
    scale = (2 ** rng.uniform(-3, 3, (outputs, groups))).astype(np.float32)
    if kind.startswith("int8"):
        integers = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    else:
        integers = rng.integers(0, 256, (outputs, inputs // 2)).astype(np.uint8)
    return pack_weight(paddle.to_tensor(integers), kind, paddle.to_tensor(scale))


# Inputs and groups: sums that end with the kernels' blocks of inputs, within them, and across them.
WIDTHS = [(1320, 1), (1320, 11), (1280, 40)]
WIDTHS += [(65, 1), (256, 1), (264, 33), (512, 2), (4096, 1), (4096, 64)] if ALL else []
WEIGHTS = [
    *[(kind, inputs, 1) for kind in ("float32", "bfloat16") for inputs, n in WIDTHS if n == 1],
    *[
        (kind, inputs, groups)
        for kind in ("int8", "int8_weight_only", "int4", "int4_weight_only")
        for inputs, groups in WIDTHS
        if inputs != 65 or kind.startswith("int8")
    ],
]


@pytest.mark.parametrize(("kind", "inputs", "groups"), WEIGHTS)
def test_products(each_level, set_threads: SET_THREADS, kind, inputs, groups):
    weight = packed(kind, 70, inputs, groups)
    x = np.random.default_rng(1).standard_normal((530 if ALL else MOST, inputs), np.float32)
    for threads in (1, 2):
        set_threads(threads)
        counts = [*range(1, MOST + 1), 530] if ALL else range(threads, MOST + 1, 2)
        assert counts_that_differ(partial(packed_linear, packed=weight), (x,), counts) == []


@pytest.mark.parametrize(("kind", "inputs", "groups"), WEIGHTS)
def test_products_beside_rows_that_are_no_numbers(each_level, kind, inputs, groups):
    weight = packed(kind, 70, inputs, groups)
    x = np.random.default_rng(1).standard_normal((MOST, inputs), np.float32)
    alone = bits(packed_linear(paddle.to_tensor(x), weight))
    spoiled = x.copy()
    spoiled[::3, 5], spoiled[1::3] = np.nan, np.inf
    for count in (3, 6, MOST):
        found = bits(packed_linear(paddle.to_tensor(spoiled[:count]), weight))
        np.testing.assert_array_equal(found[2::3], alone[2:count:3])


def test_a_product_whose_sum_depends_on_the_number_of_rows_is_found(native_ops):
    weight = packed("float32", 70, 1320, 1)

    def cut(x: Tensor) -> Tensor:
        if len(x) < 9:
            return packed_linear(x, weight)
        low, high = x.clone(), x.clone()
        low[:, 660:], high[:, :660] = 0, 0
        return packed_linear(low, weight) + packed_linear(high, weight)

    x = np.random.default_rng(1).standard_normal((12, 1320), np.float32)
    assert counts_that_differ(cut, (x,)) == [9, 10, 11, 12]


@pytest.mark.parametrize("size", [72, 576, 1000])
def test_operations_on_rows(each_level, size):
    rng = np.random.default_rng(size)
    x, y = (rng.standard_normal((MOST, size), np.float32) for _ in "xy")
    weight = paddle.to_tensor(rng.standard_normal(size, np.float32))
    angles = rng.standard_normal((2, MOST, 1, 12), np.float32)
    kernels = [
        lambda x, y: rms_norm_native(x, weight, 1e-5),
        lambda x, y: add_rms_norm_native(x, y, weight, 1e-5)[0],
        swiglu_native,
    ]
    for kernel in kernels:
        assert counts_that_differ(kernel, (x, y), (2, 3, 8, 17, MOST)) == []
    heads = x[:, :72].reshape(MOST, 3, 24)
    turned = counts_that_differ(rotary_native, (heads, *angles), (2, 3, 8, 17, MOST))
    assert turned == []


class Sequences:
    """Sequences whose keys and values lie in a cache, and any of whose tokens can be run.

    Args:
        lengths: of the sequences.
        heads: H, G and D.
        dtype: of the cache.
        block: tokens of a cache block.
    """

    def __init__(self, lengths: tuple[int, ...], heads: tuple[int, int, int], dtype: str, block=16):
        rng = np.random.default_rng(sum(lengths))
        H, G, D = heads
        self.q, self.k, self.v = (
            [rng.standard_normal((n, h, D), np.float32) for n in lengths] for h in (H, G, G)
        )
        widths = [-(-n // block) for n in lengths]
        free = rng.permutation(sum(widths)).astype(np.int32)
        table = np.zeros((len(lengths), max(widths)), np.int32)
        caches = np.zeros((2, sum(widths), block, G, D), np.float32)
        for n, width in enumerate(widths):
            table[n, :width], free = free[:width], free[width:]
            at = np.arange(lengths[n])
            caches[:, table[n, at // block], at % block] = self.k[n], self.v[n]
        self.lengths, self.table = lengths, paddle.to_tensor(table)
        kind = getattr(paddle, dtype)
        self.caches = [to_stored(paddle.to_tensor(cache), kind) for cache in caches]

    def run(self, *parts: tuple[int, int, int]) -> list[np.ndarray]:
        """Return the bits of tokens ``[start, end)`` of sequences, all of them in one step."""
        step = [
            paddle.to_tensor(np.concatenate([x[n][start:end] for n, start, end in parts]))
            for x in (self.q, self.k, self.v)
        ]
        owner = np.concatenate([np.full(end - start, n, np.int32) for n, start, end in parts])
        place = np.concatenate([np.arange(start, end, dtype=np.int32) for _, start, end in parts])
        tensors = (*step, *self.caches, self.table, *map(paddle.to_tensor, (owner, place)))
        out = bits(paged_attention_native(*tensors))
        return np.split(out, np.cumsum([end - start for _, start, end in parts])[:-1])

    def alone(self, n: int) -> np.ndarray:
        """Return the bits of every token of a sequence, each the only one of its step."""
        return np.concatenate([self.run((n, p, p + 1))[0] for p in range(self.lengths[n])])


# H, G, D: several heads a key and one, dimensions that are no multiple of vectors.
HEADS = [(9, 3, 64), (4, 4, 72), (8, 1, 10)]
HEADS += [(32, 8, 64), (8, 8, 80), (16, 1, 128), (4, 2, 256)] if ALL else []
CHUNKS = (2, 3, 5, 8, 9, 17, 33, 130, 300)
CHUNKS = (*range(2, 70), 86, 100, 128, 129, 256, 257, 300) if ALL else CHUNKS


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_attention(each_level, set_threads: SET_THREADS, heads, dtype):
    made = Sequences((300, 1, 129, 17), heads, dtype)
    alone = [made.alone(n) for n in range(4)]
    for threads in (1, 2):
        set_threads(threads)
        for size in CHUNKS if ALL or threads == 1 else CHUNKS[4:]:
            starts = range(0, 300, size)
            found = [made.run((0, start, min(start + size, 300)))[0] for start in starts]
            np.testing.assert_array_equal(np.concatenate(found), alone[0], f"chunks of {size}")
        last = [(n, length - 1, length) for n, length in enumerate(made.lengths)]
        for together in (last, [last[1], (2, 3, 90), last[3]], [(0, 100, 300), (2, 0, 129)]):
            for (n, start, end), found in zip(together, made.run(*together), strict=True):
                np.testing.assert_array_equal(found, alone[n][start:end], str(together))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "value"),
    [("float32", np.inf), ("float32", np.nan), ("float32", 3e38), ("int8", np.inf)],
)
def test_attention_before_tokens_that_are_no_numbers(each_level, heads, dtype, value):
    """Later tokens of a chunk are hidden by weights of 0, and 0 times infinity is no number."""
    made = Sequences((140,), heads, dtype)
    alone = made.alone(0)
    for first, end in ((1, 3), (3, 8), (3, 40), (100, 130), (120, 140)):
        kept = [
            (x[0].copy(), cache.clone())
            for x, cache in zip((made.k, made.v), made.caches, strict=True)
        ]
        for x in (made.k, made.v):
            x[0][first + 1 : end] = value
        found = made.run((0, first, end))[0]
        np.testing.assert_array_equal(found[:1], alone[first : first + 1], f"{first} to {end}")
        made.k[0], made.v[0] = (x for x, _ in kept)
        made.caches = [cache for _, cache in kept]
