"""What training minimises: next-token prediction.

An objective maps a network and a batch to ``(loss_sum, weight, figures)``: the loss is
``loss_sum / weight`` whatever the batch it is split into, so micro-batches with different numbers
of labels add up to the mean over all of them. ``figures`` are ``name: (sum, weight)`` pairs that an
evaluation averages. Preference tuning has its own in :mod:`llm.train.preference`.
"""

from collections.abc import Callable

import paddle
from paddle import Tensor, nn

Figures = dict[str, tuple[float, float]]
Objective = Callable[[nn.Layer, dict[str, Tensor]], tuple[Tensor, float, Figures]]


def next_token_objective(
    model: nn.Layer, batch: dict[str, Tensor]
) -> tuple[Tensor, float, Figures]:
    """Score each label by the tokens before it.

    Args:
        model: has ``token_losses``, as ``LlamaForCausalLM`` does.
        batch: int64 ``input_ids`` and ``labels`` of shape ``[B, S]``, labels already shifted and
            -100 where they do not count; ``positions`` and ``segments`` for packed rows.

    Returns:
        summed cross-entropy, number of labels, and while evaluating the ``accuracy``: the share of
        labels that are the likeliest token.
    """
    labels = batch["labels"].flatten()
    counted = (labels >= 0).nonzero().flatten()
    weight = float(counted.shape[0])
    rows = None
    if weight < labels.shape[0]:  # no logits of prompts and padding, which nobody scores
        rows, labels = counted, paddle.gather(labels, counted)
    losses, correct = model.token_losses(
        batch["input_ids"], labels, batch.get("positions"), batch.get("segments"), rows
    )
    if correct is None:
        return losses.sum(), weight, {}
    return losses.sum(), weight, {"accuracy": (float(correct.sum()), weight)}
