"""Float8 linears on the rehearsal device, for numbers that jobs and tests draw alike."""

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor

from external_ops import fp8

Case = tuple[int, int, int, str]  # rows, inputs, outputs, the weight's type


def draw(case: Case) -> list[NDArray[np.float32]]:
    """Return inputs, weight, bias and a gradient of the result, over many magnitudes."""
    rows, inputs, outputs, _ = case
    random = np.random.default_rng(rows + inputs)
    shapes = ((rows, inputs), (inputs, outputs), (outputs,), (rows, outputs))
    found = [random.standard_normal(shape).astype(np.float32) for shape in shapes]
    found[0] *= 10.0 ** random.integers(-12, 4, (rows, 1))  # scales of their own
    found[0][:, :128] = 0  # a block without any
    found[0][0, -1] = 1e-38
    found[1][:128] *= 1e3
    found[3][-1] = 1e30
    return found


def _as(numbers: NDArray[np.float32], dtype: str) -> Tensor:
    tensor = paddle.to_tensor(numbers).astype(dtype).detach()
    tensor.stop_gradient = False
    return tensor


def linear(case: Case, file: str) -> None:
    """Write result and gradients of inputs, weight and bias of a drawn linear."""
    numbers, weight_type = draw(case), case[3]
    x, weight, bias = (
        _as(numbers[0], "bfloat16"),
        _as(numbers[1], weight_type),
        _as(numbers[2], weight_type),
    )
    out = fp8.fp8_linear(x.unsqueeze(0), weight, bias)
    out.backward(_as(numbers[3], "bfloat16").unsqueeze(0))
    assert [x.grad.dtype, weight.grad.dtype] == [x.dtype, weight.dtype]
    found = (out[0], x.grad, weight.grad, bias.grad)
    np.savez(file, *(one.astype("float32").numpy() for one in found))


def not_finite(value: float) -> list[list[bool]]:
    """Return which rows of a result, and columns of a weight's gradient, are finite."""
    numbers = np.ones((256, 256), np.float32)
    numbers[3, 200] = value
    x, weight = _as(numbers, "bfloat16"), _as(np.ones((256, 128), np.float32), "bfloat16")
    out = fp8.fp8_linear(x, weight)
    out.sum().backward()
    found = (out, weight.grad)
    return [np.isfinite(one.astype("float32").numpy()).all(1).tolist() for one in found]


def frozen() -> list[bool]:
    """Return which of inputs and weight have a gradient, where only one wants it; then no rows."""
    found = []
    for wanted in (0, 1):
        both = [_as(np.ones((128, 128), np.float32), "bfloat16") for _ in range(2)]
        both[1 - wanted].stop_gradient = True
        fp8.fp8_linear(*both).sum().backward()
        found += [one.grad is not None for one in both]
    empty = fp8.fp8_linear(paddle.zeros([0, 128], "bfloat16"), both[1])
    return [*found, list(empty.shape) == [0, 128]]


def why_not(capability: list[int], cuda: str) -> str:
    """Return why a GPU of that capability, with Paddle for that CUDA, has no such products."""
    paddle.device.cuda.get_device_capability = lambda: tuple(capability)
    paddle.version.cuda = lambda: cuda
    return fp8.why_not()
