"""What training minimises: next-token prediction.

An objective maps a network and a batch to ``(loss_sum, weight, figures)``: the loss is
``loss_sum / weight`` whatever the batch it is split into, so micro-batches with different numbers
of labels add up to the mean over all of them. ``figures`` are ``name: (sum, weight)`` pairs that an
evaluation averages. Preference tuning has its own in :mod:`llm.llama.preference`.
"""

from paddle import Tensor, nn

from llm.llama.modeling import CausalLMLoss

Figures = dict[str, tuple[float, float]]

_LOSS = CausalLMLoss()


def next_token_objective(
    model: nn.Layer, batch: dict[str, Tensor]
) -> tuple[Tensor, float, Figures]:
    """Score each label by the tokens before it.

    Args:
        model: maps ids, positions and segments to logits ``[B, S, V]``.
        batch: int64 ``input_ids`` and ``labels`` of shape ``[B, S]``, labels already shifted and
            -100 where they do not count; ``positions`` and ``segments`` for packed rows.

    Returns:
        summed cross-entropy, number of labels, and while evaluating the ``accuracy``: the share of
        labels that are the likeliest token.
    """
    labels_BS = batch["labels"]
    logits_BSV = model(batch["input_ids"], batch.get("positions"), batch.get("segments"))
    total, valid = _LOSS.total(logits_BSV, labels_BS)
    weight = float(valid)
    if model.training:
        return total, weight, {}
    # Ignored labels are negative, so no prediction equals one.
    correct = float((logits_BSV.argmax(-1) == labels_BS).sum())
    return total, weight, {"accuracy": (correct, weight)}
