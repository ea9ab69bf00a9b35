"""Loss of labels from hidden states and the output matrix, whole or by chunks of tokens.

n tokens, E hidden, V vocabulary (of this process), C tokens of a chunk. The fused form keeps one
number per token and computes logits twice, a chunk at a time, so that ``[n, V]`` never exists:
4 products instead of 3 for memory that does not grow with n (as in Wijmans et al. 2024, "Cut Your
Losses"). With a vocabulary that processes share, each scores its part, and the statistics of a
softmax are put together (Shoeybi et al. 2019).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from common.devices import GPU
from external_ops import devices, modes, native
from external_ops.frozen_matmul import frozen_matmul_ref, multiplied

IGNORED = -100
# Logits that exist at a time on CPUs, and on devices whose memory is not known.
CHUNK_NUMBERS = modes.CHUNK_NUMBERS
# Logits that the native form keeps for the gradient instead of computing them again: 256 MiB.
KEPT_NUMBERS = 2**26

Result = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class VocabularyShard:
    """The tokens that this process scores, and how it talks to those that score the others.

    Args:
        first: number of its first token.
        size: tokens of the whole vocabulary.
        parts: processes that share it.
        enter: returns its argument; sums the gradient over the processes.
        largest: elementwise maximum over the processes, no gradient.
        total: elementwise sum over the processes, no gradient.
        gather: ``[..., V]`` of this process to ``[..., size]`` of all.
    """

    first: int
    size: int
    parts: int
    enter: Callable[[Tensor], Tensor]
    largest: Callable[[Tensor], Tensor]
    total: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]


def is_frozen(hidden_nE: Tensor, weight: Tensor) -> bool:
    """Say whether a matrix lies in bfloat16 that does not train, while all else is float32."""
    return weight.dtype == paddle.bfloat16 and hidden_nE.dtype == paddle.float32


def _product(hidden_nE: Tensor, weight: Tensor, tied: bool) -> Tensor:
    if is_frozen(hidden_nE, weight):
        return frozen_matmul_ref(hidden_nE, weight, transposed=tied)
    return paddle.matmul(hidden_nE, weight, transpose_y=tied).astype("float32")


def _local(labels_n: Tensor, width: int, shard: VocabularyShard | None) -> tuple[Tensor, Tensor]:
    """Return labels as columns of this process's logits, and which of them there are."""
    local_n = labels_n if shard is None else labels_n - shard.first
    inside_n = paddle.logical_and(local_n >= 0, local_n < width)
    return paddle.clip(local_n, 0, width - 1), inside_n


def _statistics(
    logits_nV: Tensor, labels_n: Tensor, accuracy: bool, shard: VocabularyShard | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, largest logit, logarithm of softmax's denominator, which labels are likeliest.

    Logits become ``exp(logits - largest)``, in place. A label that is neither in the vocabulary nor
    ignored has the loss NaN. Paddle's own ``cross_entropy`` stops at 64 on CPU: it is no help here.
    """
    width = logits_nV.shape[-1]
    local_n, inside_n = _local(labels_n, width, shard)
    target_n = paddle.take_along_axis(logits_nV, local_n.unsqueeze(-1), -1).squeeze(-1)
    target_n = paddle.where(inside_n, target_n, paddle.zeros_like(target_n))
    top_n = logits_nV.max(-1)
    peak_n = top_n if shard is None else shard.largest(top_n)
    correct_n = paddle.zeros_like(inside_n)
    if accuracy:
        correct_n = _likeliest(logits_nV, top_n, peak_n, shard) == labels_n
    sums_n = logits_nV.subtract_(peak_n.unsqueeze(-1)).exp_().sum(-1)
    known_n = inside_n.astype("float32")
    if shard is not None:
        sums_n, target_n, known_n = shard.total(paddle.stack([sums_n, target_n, known_n])).unbind()
    denominator_n = peak_n + paddle.log(sums_n)
    loss_n = paddle.where(known_n > 0, denominator_n - target_n, paddle.full_like(top_n, "nan"))
    loss_n = paddle.where(labels_n == IGNORED, paddle.zeros_like(loss_n), loss_n)
    return loss_n, peak_n, denominator_n, correct_n


def _likeliest(
    logits_nV: Tensor, top_n: Tensor, peak_n: Tensor, shard: VocabularyShard | None
) -> Tensor:
    """Return the first of the likeliest tokens, int64 ``[n]``."""
    best_n = logits_nV.argmax(-1)
    if shard is None:
        return best_n
    missing_n = paddle.full_like(best_n, shard.size)
    best_n = paddle.where(top_n == peak_n, best_n + shard.first, missing_n)
    return -shard.largest(-best_n)


def _less_label(
    chances_nV: Tensor, labels_n: Tensor, scale_n1: Tensor | None, shard: VocabularyShard | None
) -> Tensor:
    """Subtract 1 (or a token's scale) at every label, in place."""
    local_n, inside_n = _local(labels_n, chances_nV.shape[-1], shard)
    minus_n1 = -inside_n.astype("float32").unsqueeze(-1)
    if scale_n1 is not None:
        minus_n1 = minus_n1 * scale_n1
    return chances_nV.put_along_axis_(local_n.unsqueeze(-1), minus_n1, -1, reduce="add")


def _counted(grad_n: Tensor, labels_n: Tensor) -> Tensor:
    """Return gradients ``[n, 1]``, 0 where a label does not count."""
    return paddle.where(labels_n == IGNORED, paddle.zeros_like(grad_n), grad_n).unsqueeze(-1)


class _LogitLoss(PyLayer):
    @staticmethod
    def forward(ctx, logits_nV, labels_n, accuracy, shard):
        exps_nV = logits_nV.clone()
        loss_n, peak_n, denominator_n, correct_n = _statistics(exps_nV, labels_n, accuracy, shard)
        ctx.save_for_backward(exps_nV, labels_n, paddle.exp(peak_n - denominator_n))
        ctx.shard = shard
        ctx.mark_non_differentiable(correct_n)
        return loss_n, correct_n

    @staticmethod
    def backward(ctx, grad_n, _):
        exps_nV, labels_n, factor_n = ctx.saved_tensor()
        scale_n1 = _counted(grad_n, labels_n)
        chances_nV = exps_nV * (factor_n.unsqueeze(-1) * scale_n1)
        return _less_label(chances_nV, labels_n, scale_n1, ctx.shard), None


def logit_losses(
    logits_nV: Tensor,
    labels_n: Tensor,
    *,
    accuracy: bool = False,
    shard: VocabularyShard | None = None,
) -> Result:
    """Compute :func:`cross_entropy_ref` from logits, for output layers that are no plain matrix.

    Args:
        logits_nV: float32; those of this process's tokens where the vocabulary is shared.
        labels_n, accuracy, shard: those of :func:`cross_entropy_ref`.
    """
    loss_n, correct_n = _LogitLoss.apply(logits_nV, labels_n, accuracy, shard)
    return loss_n, (correct_n if accuracy else None)


def cross_entropy_ref(
    hidden_nE: Tensor,
    weight: Tensor,
    labels_n: Tensor,
    *,
    tied: bool = False,
    accuracy: bool = False,
    shard: VocabularyShard | None = None,
) -> Result:
    """Return each label's loss; materialises all logits.

    Args:
        hidden_nE: normed hidden states in any floating type.
        weight: output matrix ``[E, V]``, or with ``tied`` the embedding ``[V, E]``.
        labels_n: int64 tokens; -100 does not count.
        tied: how the weight lies.
        accuracy: also say which labels are the likeliest token.
        shard: the part of the vocabulary that the weight scores; None is all of it.

    Returns:
        float32 ``[n]``, 0 where a label does not count, and bool ``[n]`` or None.
    """
    if shard is not None:
        hidden_nE = shard.enter(hidden_nE)
    logits_nV = _product(hidden_nE, weight, tied)
    return logit_losses(logits_nV, labels_n, accuracy=accuracy, shard=shard)


def chunk_numbers() -> int:
    """Return how many logits exist at a time on the current device."""
    if devices.current() != GPU:
        return CHUNK_NUMBERS
    memory = paddle.device.cuda.get_device_properties().total_memory
    return modes.chunk_numbers(memory)


def _chunks(tokens: int, width: int) -> list[slice]:
    size = max(1, chunk_numbers() // width)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def joined(parts: list[Tensor], dtype: str) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return paddle.concat(parts) if parts else paddle.zeros([0], dtype)


def _gradients(
    ctx: Any,
    grads_hidden: list[Tensor],
    grad_weight: Tensor | None,
    hidden_nE: Tensor,
    weight: Tensor,
) -> tuple[Tensor | None, Tensor | None, None]:
    """Return what a backward pass does, from hidden gradients by chunks and the weight's sum."""
    # Paddle wants None for an input that is not trained.
    if grad_weight is not None:
        grad_weight = grad_weight.astype(weight.dtype)
    if ctx.frozen[0]:
        return None, grad_weight, None
    grad_hidden = joined(grads_hidden, hidden_nE.dtype).reshape(hidden_nE.shape)
    shard = ctx.shard
    return grad_hidden if shard is None else shard.total(grad_hidden), grad_weight, None


class _ChunkedLoss(PyLayer):
    @staticmethod
    def forward(ctx, hidden_nE, weight, labels_n, tied, accuracy, shard):
        width = weight.shape[0 if tied else 1]
        found = [
            _statistics(_product(hidden_nE[rows], weight, tied), labels_n[rows], accuracy, shard)
            for rows in _chunks(labels_n.shape[0], width)
        ]
        losses, _, denominators, correct = ([part[i] for part in found] for i in range(4))
        correct_n = joined(correct, "bool")
        ctx.save_for_backward(hidden_nE, weight, labels_n, joined(denominators, "float32"))
        ctx.tied, ctx.shard = tied, shard
        ctx.frozen = hidden_nE.stop_gradient, weight.stop_gradient
        ctx.mark_non_differentiable(correct_n)
        return joined(losses, "float32"), correct_n

    @staticmethod
    def backward(ctx, grad_n, _):
        hidden_nE, weight, labels_n, denominator_n = ctx.saved_tensor()
        tied, shard = ctx.tied, ctx.shard
        scale_n1, grads_hidden = _counted(grad_n, labels_n), []
        weight = _wide(weight) if is_frozen(hidden_nE, weight) else weight
        grad_weight = None if ctx.frozen[1] else paddle.zeros(weight.shape, "float32")
        for rows in _chunks(labels_n.shape[0], weight.shape[0 if tied else 1]):
            hidden, scale = hidden_nE[rows], scale_n1[rows]
            logits = _product(hidden, weight, tied)
            chances = logits.subtract_(denominator_n[rows].unsqueeze(-1)).exp_()
            residual = _less_label(chances, labels_n[rows], None, shard).astype(weight.dtype)
            # Rows of length E are scaled, not those of length V.
            if not ctx.frozen[0]:
                of_hidden = paddle.matmul(residual, weight, transpose_y=not tied) * scale
                grads_hidden.append(of_hidden.astype(hidden.dtype))
            if grad_weight is not None:
                scaled = (hidden * scale).astype(weight.dtype)
                left, right = (residual, scaled) if tied else (scaled, residual)
                grad_weight.add_(paddle.matmul(left, right, transpose_x=True).astype("float32"))
        return _gradients(ctx, grads_hidden, grad_weight, hidden_nE, weight)


def cross_entropy_chunked(
    hidden_nE: Tensor,
    weight: Tensor,
    labels_n: Tensor,
    *,
    tied: bool = False,
    accuracy: bool = False,
    shard: VocabularyShard | None = None,
) -> Result:
    """Compute :func:`cross_entropy_ref` with at most :func:`chunk_numbers` logits at a time.

    The gradient of the weight adds up in float32. Arguments and results are the reference's.
    """
    loss_n, correct_n = _ChunkedLoss.apply(hidden_nE, weight, labels_n, tied, accuracy, shard)
    return loss_n, (correct_n if accuracy else None)


def native_statistics(
    logits_nV: Tensor, labels_n: Tensor, accuracy: bool, shard: VocabularyShard | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`_statistics` but for the largest logits; these stay as they are."""
    first = 0 if shard is None else shard.first
    top_n, sums_n, target_n, best_n = native.run(
        "cross_entropy_statistics", logits_nV, labels_n, first, accuracy
    )
    _, inside_n = _local(labels_n, logits_nV.shape[-1], shard)
    correct_n = best_n == labels_n if accuracy else paddle.zeros_like(inside_n)
    peak_n, known_n = top_n, inside_n.astype("float32")
    if shard is not None:
        peak_n = shard.largest(top_n)
        if accuracy:
            missing_n = paddle.full_like(best_n, shard.size)
            best_n = paddle.where(top_n == peak_n, best_n + shard.first, missing_n)
            correct_n = -shard.largest(-best_n) == labels_n
        sums_n = sums_n * paddle.exp(top_n - peak_n)
        sums_n, target_n, known_n = shard.total(paddle.stack([sums_n, target_n, known_n])).unbind()
    denominator_n = peak_n + paddle.log(sums_n)
    loss_n = paddle.where(known_n > 0, denominator_n - target_n, paddle.full_like(top_n, "nan"))
    loss_n = paddle.where(labels_n == IGNORED, paddle.zeros_like(loss_n), loss_n)
    return loss_n, denominator_n, correct_n


def _native_chunks(tokens: int, width: int) -> list[slice]:
    """Return all tokens at once where their logits may be kept, else chunks."""
    return [slice(0, tokens)] if 0 < tokens * width <= KEPT_NUMBERS else _chunks(tokens, width)


def _outer(residual_nV: Tensor, hidden_nE: Tensor, tied: bool) -> Tensor:
    """Return the gradient of the output matrix, as the matrix lies."""
    left, right = (residual_nV, hidden_nE) if tied else (hidden_nE, residual_nV)
    return paddle.matmul(left, right, transpose_x=True)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == paddle.float32 else x.astype("float32")


def _wide_product(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """Multiply float32 with an output matrix, which is widened a block at a time."""
    if weight.dtype == paddle.bfloat16:
        return multiplied(x, weight, None, transposed)
    return paddle.matmul(x, _wide(weight), transpose_y=transposed)


class _NativeLoss(PyLayer):
    @staticmethod
    def forward(ctx, hidden_nE, weight, labels_n, tied, accuracy, shard):
        tokens, width = labels_n.shape[0], weight.shape[0 if tied else 1]
        ctx.frozen = hidden_nE.stop_gradient, weight.stop_gradient
        ctx.tied, ctx.shard, ctx.kept = tied, shard, None
        chunks = _native_chunks(tokens, width)
        found, logits_nV = [], None
        for rows in chunks:
            del logits_nV  # those of one chunk exist at a time
            logits_nV = _wide_product(_wide(hidden_nE[rows]), weight, tied)
            found.append(native_statistics(logits_nV, labels_n[rows], accuracy, shard))
            if tokens * width <= KEPT_NUMBERS and not all(ctx.frozen):
                ctx.kept = logits_nV
        losses, denominators, correct = ([part[i] for part in found] for i in range(3))
        correct_n = joined(correct, "bool")
        ctx.save_for_backward(hidden_nE, weight, labels_n, joined(denominators, "float32"))
        ctx.mark_non_differentiable(correct_n)
        return joined(losses, "float32"), correct_n

    @staticmethod
    def backward(ctx, grad_n, _):
        hidden_nE, weight, labels_n, denominator_n = ctx.saved_tensor()
        tied, shard = ctx.tied, ctx.shard
        first = 0 if shard is None else shard.first
        scale_n = _counted(grad_n, labels_n).squeeze(-1)
        grads_hidden, grad_weight = [], None
        for rows in _native_chunks(labels_n.shape[0], weight.shape[0 if tied else 1]):
            hidden = _wide(hidden_nE[rows])
            residual, ctx.kept = ctx.kept, None
            if residual is None:
                residual = _wide_product(hidden, weight, tied)
            native.run(
                "cross_entropy_residual",
                *(residual, labels_n[rows], denominator_n[rows], scale_n[rows], first),
            )
            if not ctx.frozen[0]:
                of_hidden = _wide_product(residual, weight, not tied)
                grads_hidden.append(of_hidden.astype(hidden_nE.dtype))
            if not ctx.frozen[1]:
                part = _outer(residual, hidden, tied)
                grad_weight = part if grad_weight is None else grad_weight.add_(part)
                del part
            del residual  # the logits of one chunk exist at a time
        if grad_weight is None and not ctx.frozen[1]:  # no tokens
            grad_weight = paddle.zeros(weight.shape, "float32")
        return _gradients(ctx, grads_hidden, grad_weight, hidden_nE, weight)


def cross_entropy_native(
    hidden_nE: Tensor,
    weight: Tensor,
    labels_n: Tensor,
    *,
    tied: bool = False,
    accuracy: bool = False,
    shard: VocabularyShard | None = None,
) -> Result:
    """Compute :func:`cross_entropy_ref` with native kernels between the matrix products.

    Up to :data:`KEPT_NUMBERS` logits are kept for the gradient, which then costs 2 products; where
    there are more, at most :func:`chunk_numbers` exist at a time, computed twice. Arguments and
    results are the reference's; half precision is multiplied in float32.
    """
    loss_n, correct_n = _NativeLoss.apply(hidden_nE, weight, labels_n, tied, accuracy, shard)
    return loss_n, (correct_n if accuracy else None)
