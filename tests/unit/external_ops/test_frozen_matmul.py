"""Products with frozen matrices against float64: every form, kind and level, both directions."""

import numpy as np
import paddle
import pytest

from external_ops import frozen_head, native
from external_ops.cross_entropy import cross_entropy_native
from external_ops.frozen_head import cross_entropy_over_frozen
from external_ops.frozen_matmul import frozen_matmul_native, frozen_matmul_ref, multiplied
from tests.unit.external_ops import oracle

# height, width, groups: less than a block and more, groups across vectors, more depth than a slab.
SIZES = [(1, 8, 1), (65, 96, 12), (130, 656, 2), (9, 4200, 1)]


class Case:
    """A matrix as it is stored, and its numbers in float64.

    Args:
        kind: ``bfloat16``, ``int8`` or ``int4``.
        height, width, groups: its shape.
    """

    def __init__(self, kind, height, width, groups):
        self.rng = rng = np.random.default_rng(height + width)
        if kind == "bfloat16":
            wide = paddle.to_tensor(rng.standard_normal([height, width]).astype("float32"))
            self.matrix, self.scale = wide.astype("bfloat16"), None
            self.exact = self.matrix.astype("float32").numpy().astype("float64")
            return
        limit = 128 if kind == "int8" else 8
        integers = rng.integers(-limit, limit, [height, width]).astype("int8")
        scale = rng.uniform(0.01, 0.1, [height, groups]).astype("float32")
        self.scale = paddle.to_tensor(scale)
        stored = integers
        if kind == "int4":
            offset = (integers + 8).astype("uint8")
            stored = offset[:, ::2] + 16 * offset[:, 1::2]
        self.matrix = paddle.to_tensor(stored)
        self.exact = integers * np.repeat(scale.astype("float64"), width // groups, axis=1)

    def check(self, form, rows, transposed):
        """Compare a form's product and gradient with float64, by the 2x rule."""
        left, right = (self.exact.T, self.exact) if transposed else (self.exact, self.exact.T)
        x = self.rng.standard_normal([2, rows, left.shape[0]]).astype("float32")
        grad = self.rng.standard_normal([2, rows, left.shape[1]]).astype("float32")
        given = paddle.to_tensor(x, stop_gradient=False)
        out = form(given, self.matrix, self.scale, transposed=transposed)
        out.backward(paddle.to_tensor(grad))
        for got, by, matrix in ((out, x, left), (given.grad, grad, right)):
            plain = paddle.matmul(paddle.to_tensor(by), paddle.to_tensor(matrix.astype("float32")))
            exact = by.astype("float64") @ matrix
            terms = np.abs(by).max() * np.abs(matrix).max()
            assert oracle.within_twice(got.numpy(), plain.numpy(), exact, terms=terms)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("size", SIZES)
def test_native_form(each_level, set_threads, kind, size):
    case = Case(kind, *size)
    many = 600 if size == SIZES[1] else 16  # more than share a block, for one size
    for rows, transposed, threads in ((1, True, 1), (9, False, 2), (many, True, 2), (8, False, 1)):
        set_threads(threads)
        case.check(frozen_matmul_native, rows, transposed)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_reference(kind):
    case = Case(kind, 65, 96, 12)
    for transposed in (False, True):
        case.check(frozen_matmul_ref, 5, transposed)


def test_no_rows_and_numbers_that_are_none(native_ops):
    case = Case("int8", 70, 48, 2)
    empty = multiplied(paddle.zeros([3, 0, 48]), case.matrix, case.scale, True)
    assert empty.shape == [3, 0, 70]
    x = np.ones([3, 48], "float32")
    x[1, 5] = np.nan
    found = multiplied(paddle.to_tensor(x), case.matrix, case.scale, True).numpy()
    assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2]]).all()


def test_the_type_of_the_input_comes_back(native_ops):
    case = Case("int4", 64, 32, 1)
    x = paddle.ones([2, 32], "bfloat16")
    assert frozen_matmul_native(x, case.matrix, case.scale, transposed=True).dtype == x.dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [2, 47]}, r"x \[2, 47\] has to be float32 \[\.\.\., 48\]"),
        ({"scale": [70, 5]}, "the groups have to divide 48"),
        ({"scale": None}, "integers need a scale"),
        ({"columns": 71}, "71 columns asked for, 70 there"),
    ],
)
def test_what_does_not_fit_is_refused(native_ops, change, message):
    given = {"x": [2, 48], "scale": [70, 2], "columns": 70} | change
    scale = None if given["scale"] is None else paddle.ones(given["scale"])
    with pytest.raises(ValueError, match=message):
        native.run(
            *("frozen_matmul", paddle.ones(given["x"]), paddle.ones([70, 48], "int8"), scale),
            *(True, given["columns"]),
        )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", [cross_entropy_over_frozen, cross_entropy_native])
@pytest.mark.parametrize("tokens", [0, 9])
def test_losses_over_a_frozen_head(native_ops, monkeypatch, form, tied, tokens):
    """Chunks of two tokens; some labels do not count; each loss has a gradient of its own."""
    monkeypatch.setattr(frozen_head, "CHUNK_NUMBERS", 2 * 37)
    rng = np.random.default_rng(tokens)
    hidden = rng.standard_normal([tokens, 16]).astype("float32")
    wide = paddle.to_tensor(rng.standard_normal([16, 37]).astype("float32")).astype("bfloat16")
    labels = rng.integers(0, 37, tokens)
    labels[::4] = -100
    grad = rng.standard_normal(tokens).astype("float32")
    given = paddle.to_tensor(hidden, stop_gradient=False)
    weight = wide.T if tied else wide
    losses, correct = form(given, weight, paddle.to_tensor(labels), tied=tied, accuracy=True)
    losses.backward(paddle.to_tensor(grad))
    *exact, best = oracle.cross_entropy(hidden, wide.astype("float32").numpy(), labels, grad)
    np.testing.assert_allclose(losses.numpy(), exact[0], atol=1e-5)
    np.testing.assert_allclose(given.grad.numpy(), exact[1], atol=1e-5)
    np.testing.assert_array_equal(correct.numpy(), best == labels)
