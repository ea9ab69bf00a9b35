"""Losses over an output matrix in bfloat16 that does not train, below float32 activations, on CPUs.

n tokens, E hidden, V vocabulary (of this process).
"""

from functools import partial

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from external_ops import native
from external_ops.cross_entropy import (
    IGNORED,
    Result,
    VocabularyShard,
    cross_entropy_native,
    is_frozen,
    joined,
    native_statistics,
)
from external_ops.frozen_matmul import multiplied

# Logits that exist at a time: 128 MiB. Each chunk reads and widens the whole matrix twice.
CHUNK_NUMBERS = 2**25


class _FrozenHeadLoss(PyLayer):
    """Losses over an output matrix that does not train, whose gradient is made along with them.

    The gradient of a row of hidden states is that of its loss times a number that only the backward
    pass knows, so a chunk's logits are used for both, and none are kept or computed twice.
    """

    @staticmethod
    def forward(ctx, hidden_nE, labels_n, chunks, products, accuracy, shard, wanted):
        found, gradients = [], []
        scores, back = products
        for rows in chunks:
            logits_nV = scores(hidden_nE[rows])
            found.append(native_statistics(logits_nV, labels_n[rows], accuracy, shard))
            if wanted:
                first, ones_n = 0 if shard is None else shard.first, paddle.ones_like(found[-1][1])
                native.run(
                    "cross_entropy_residual", logits_nV, labels_n[rows], found[-1][1], ones_n, first
                )
                gradients.append(back(logits_nV))
            del logits_nV  # those of one chunk exist at a time
        losses, _, correct = ([part[i] for part in found] for i in range(3))
        correct_n = joined(correct, "bool")
        if wanted:
            ctx.save_for_backward(joined(gradients, "float32").reshape(hidden_nE.shape), labels_n)
        ctx.shard = shard
        ctx.mark_non_differentiable(correct_n)
        return joined(losses, "float32"), correct_n

    @staticmethod
    def backward(ctx, grad_n, _):
        gradient_nE, labels_n = ctx.saved_tensor()
        ignored_n1 = (labels_n == IGNORED).unsqueeze(-1)
        grad_nE = gradient_nE * grad_n.unsqueeze(-1)
        grad_nE = paddle.where(ignored_n1, paddle.zeros_like(grad_nE), grad_nE)
        return (grad_nE if ctx.shard is None else ctx.shard.total(grad_nE)), None


def cross_entropy_over_frozen(
    hidden_nE: Tensor,
    weight: Tensor,
    labels_n: Tensor,
    *,
    tied: bool = False,
    accuracy: bool = False,
    shard: VocabularyShard | None = None,
) -> Result:
    """Compute the native loss, in 2 products and :data:`CHUNK_NUMBERS` where the matrix is frozen.

    Arguments and results are those of ``external_ops.cross_entropy.cross_entropy_ref``; a matrix
    that trains takes :func:`~external_ops.cross_entropy.cross_entropy_native`.
    """
    if not is_frozen(hidden_nE, weight):
        options = {"tied": tied, "accuracy": accuracy, "shard": shard}
        return cross_entropy_native(hidden_nE, weight, labels_n, **options)
    size = max(1, CHUNK_NUMBERS // weight.shape[0 if tied else 1])
    tokens = labels_n.shape[0]
    chunks = [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
    wanted = paddle.is_grad_enabled() and not hidden_nE.stop_gradient
    products = tuple(
        partial(multiplied, matrix=weight, scale=None, transposed=turned)
        for turned in (tied, not tied)
    )
    loss_n, correct_n = _FrozenHeadLoss.apply(
        hidden_nE, labels_n, chunks, products, accuracy, shard, wanted
    )
    return loss_n, (correct_n if accuracy else None)
