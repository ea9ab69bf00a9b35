"""Matrix products of csrc/cpu/matmul.cc: each instruction set against float64, by the 2x rule."""

import numpy as np
import paddle
import pytest

from external_ops import native
from external_ops.matmul import matmul_native
from tests.unit.external_ops import oracle

# Rows, depth, columns: single ones, less than a tile, more than each block, none.
SIZES = [(1, 5, 3), (5, 256, 32), (13, 7, 33), (123, 65, 97), (2049, 65, 33), (300, 600, 290)]
SIZES += [(0, 4, 3), (3, 0, 4), (1200, 300, 40)]


def draw(rows, depth, columns, transpose_x, transpose_y):
    rng = np.random.default_rng([rows, depth, columns])
    x = rng.standard_normal([depth, rows] if transpose_x else [rows, depth])
    y = rng.standard_normal([columns, depth] if transpose_y else [depth, columns])
    return x.astype(np.float32), y.astype(np.float32)


@pytest.mark.parametrize("transpose_y", [False, True], ids=["y", "yT"])
@pytest.mark.parametrize("transpose_x", [False, True], ids=["x", "xT"])
def test_against_float64(each_level, transpose_x, transpose_y):
    for rows, depth, columns in SIZES:
        x, y = draw(rows, depth, columns, transpose_x, transpose_y)
        flags = {"transpose_x": transpose_x, "transpose_y": transpose_y}
        got = matmul_native(*map(paddle.to_tensor, (x, y)), **flags).numpy()
        wide = [array.astype(np.float64) for array in (x, y)]
        exact = (wide[0].T if transpose_x else wide[0]) @ (wide[1].T if transpose_y else wide[1])
        plain = (x.T if transpose_x else x) @ (y.T if transpose_y else y)
        assert oracle.within_twice(got, plain, exact, terms=np.sqrt(depth + 1)), (rows, depth)


@pytest.mark.parametrize("transpose_y", [False, True], ids=["y", "yT"])
@pytest.mark.parametrize("transpose_x", [False, True], ids=["x", "xT"])
def test_gradients(native_ops, transpose_x, transpose_y):
    grads = []
    flags = {"transpose_x": transpose_x, "transpose_y": transpose_y}
    for kernel in (matmul_native, paddle.matmul):
        tensors = [paddle.to_tensor(array) for array in draw(123, 65, 97, *flags.values())]
        for tensor in tensors:
            tensor.stop_gradient = False
        weights = paddle.cos(paddle.arange(123 * 97, dtype="float32")).reshape([123, 97])
        (kernel(*tensors, **flags) * weights).sum().backward()
        grads.append([tensor.grad.numpy() for tensor in tensors])
    for ours, reference in zip(*grads, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=2e-5)


def test_shapes_that_do_not_fit_are_refused(native_ops):
    with pytest.raises(ValueError, match=r"\[3, 4\] and \[5, 6\] do not fit"):
        matmul_native(paddle.zeros([3, 4]), paddle.zeros([5, 6]))
    with pytest.raises(ValueError, match="needs float32 matrices"):
        native.run("matmul", paddle.zeros([3, 4, 5]), paddle.zeros([5, 6]), False, False)
