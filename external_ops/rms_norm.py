"""Root-mean-square normalisation (Zhang and Sennrich 2019), as in ``transformers`` LlamaRMSNorm.

Statistics are in float32 whatever the input's type; the result is cast back before the weight is
applied, which is the order that Llama checkpoints were trained with.
"""

import functools
from pathlib import Path

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.incubate.nn import functional as incubate

from external_ops import native


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last axis; plain Paddle ops, differentiable to any order.

    Args:
        x: ``[..., E]`` in any floating type.
        weight: ``[E]``.
        eps: added to the mean square.

    Returns:
        ``[..., E]`` in the type of ``x``.
    """
    x32 = x.astype("float32")
    rstd = paddle.rsqrt(paddle.mean(x32 * x32, axis=-1, keepdim=True) + eps)
    return (x32 * rstd).astype(x.dtype) * weight


def add_rms_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return :func:`rms_norm_ref` of ``x + residual``, and that sum."""
    total = x + residual
    return rms_norm_ref(total, weight, eps), total


def _kernel(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return incubate.fused_rms_norm(x, weight, None, eps, begin_norm_axis=x.ndim - 1)[0]


class _FusedRMSNorm(PyLayer):
    """Paddle's fused forward kernel, which has no gradient on CPU, with the gradient written out.

    With ``n = x * rstd`` and ``g = dy * weight``: ``dx = rstd * (g - n * mean(g * n))`` and
    ``dw = sum(dy * n)``.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        ctx.frozen = x.stop_gradient, weight.stop_gradient
        return _kernel(x, weight, eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensor()
        shape, size = x.shape, x.shape[-1]
        x, grad = x.reshape([-1, size]), grad.reshape([-1, size])
        # Row and column sums as products with a vector of ones run at matmul speed, and expanding
        # before a product beats broadcasting in it: Paddle's own CPU forms use one slow thread.
        mean = paddle.full([size, 1], 1.0 / size)
        rstd = paddle.rsqrt(paddle.matmul(x * x, mean) + ctx.eps).expand_as(x)
        normed = x * rstd
        product = grad * normed
        grad_weight = None
        # Paddle wants None for an input that is not trained, as most are beside an adapter.
        if not ctx.frozen[1]:
            grad_weight = paddle.matmul(paddle.ones([1, x.shape[0]]), product).reshape([size])
        if ctx.frozen[0]:
            return None, grad_weight
        along = paddle.matmul(product, weight.reshape([size, 1]) / size).expand_as(x)
        grad_x = (grad * weight.expand_as(x) - normed * along) * rstd
        return grad_x.reshape(shape), grad_weight


@functools.cache
def has_fused_cpu() -> bool:
    """Whether Paddle's kernel runs here: on other processors it ends the process (SIGILL)."""
    try:
        return "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def rms_norm_fused_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute :func:`rms_norm_ref`, in one kernel where the processor has AVX-512; float32 only.

    Exported programs get plain operators, since they may run on another processor.
    """
    if not has_fused_cpu() or not paddle.in_dynamic_mode():
        return rms_norm_ref(x, weight, eps)
    if not paddle.is_grad_enabled():
        return _kernel(x, weight, eps)
    return _FusedRMSNorm.apply(x, weight, eps)


def rms_norm_fused_gpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute :func:`rms_norm_ref` with Paddle's CUDA kernel, gradient included.

    The kernel of the gradient writes those of input and weight without asking which are wanted
    (Paddle 3.3.1), and fails where one has no place: the frozen one is then given in a tensor that
    takes a gradient, which nobody reads.
    """
    if paddle.in_dynamic_mode() and paddle.is_grad_enabled():
        if weight.stop_gradient and not x.stop_gradient:
            weight = _unfrozen(weight)
        elif x.stop_gradient and not weight.stop_gradient:
            x = _unfrozen(x)
    return _kernel(x, weight, eps)


def add_rms_norm_fused_gpu(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute :func:`add_rms_norm_ref` with a sum and Paddle's CUDA kernel.

    That kernel takes a residual too, for which it has no gradient (Paddle 3.3.1).
    """
    total = x + residual
    return rms_norm_fused_gpu(total, weight, eps), total


def _unfrozen(tensor: Tensor) -> Tensor:
    alias = tensor.detach()
    alias.stop_gradient = False
    return alias


def rms_norm_native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute :func:`rms_norm_ref` and its gradient with the kernel of csrc/cpu/rms_norm.cc."""
    return native.run("rms_norm", x, weight, eps)[0]


def add_rms_norm_native(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute :func:`add_rms_norm_ref` and its gradient with one kernel each."""
    normed, total, _ = native.run("add_rms_norm", x, residual, weight, eps)
    return normed, total
