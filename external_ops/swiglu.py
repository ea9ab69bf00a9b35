"""The gate of the feed-forward, SwiGLU (Shazeer 2020)."""

from paddle import Tensor
from paddle.nn import functional as F

from external_ops import native


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` for two tensors of one shape."""
    # Paddle's fused swiglu is slower on CPU than the two ops (docs/log.md).
    return F.silu(gate) * up


def swiglu_gpu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute :func:`swiglu_ref` and its gradient with Paddle's CUDA kernels, one each."""
    return F.swiglu(gate, up)


def swiglu_native(gate: Tensor, up: Tensor) -> Tensor:
    """Compute :func:`swiglu_ref` and its gradient with the kernel of csrc/cpu/swiglu.cc."""
    return native.run("swiglu", gate, up)[0]
