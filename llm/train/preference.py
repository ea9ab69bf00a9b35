"""Preference tuning without a reward model: DPO, IPO and the hinge variant.

A pair is a prompt with a chosen and a rejected answer. The losses compare how far the trained
network (the policy) has moved each answer's log-probability away from a fixed reference:

- ``sigmoid``: Rafailov et al. 2023, eq. 7; ``label_smoothing`` is the probability that a pair is
  labelled the wrong way round (Mitchell 2023, "cDPO").
- ``hinge``: Zhao et al. 2023 (SLiC) with the reference subtracted, as in Liu et al. 2023 (RSO).
- ``ipo``: Azar et al. 2023, eq. 17, on log-probabilities per token, as TRL and its authors do.

The reference is scored once, before the first update, so no second network stays in memory.
B pairs per batch, S sequence, V vocabulary, N pairs of a data set, n labels that count.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor, nn
from paddle.nn import functional as F
from tqdm import tqdm

from common.errors import UserError
from llm.train.checkpoints import Samples
from llm.train.objectives import Figures

LOSS_TYPES = ("sigmoid", "ipo", "hinge")
_IGNORED = -100
# What rounding moves a float32 log-probability by, as a share of it: scored in other company, the
# same network gives the same pair another margin of about a tenth of this.
ROUNDING = 1e-5
# Pairs of this many batches are scored in order of length, which keeps padding short.
_WINDOW = 16

Batch = dict[str, NDArray[Any]]
Collate = Callable[[list[Any]], Batch]


def token_counts(labels: Tensor) -> Tensor:
    """Return how many labels of each row count, ``[2B]`` in float32.

    Raises:
        UserError: an odd number of rows, or a row in which no label counts.
    """
    if labels.ndim != 2 or labels.shape[0] < 2 or labels.shape[0] % 2:
        raise UserError(
            f"labels of shape {list(labels.shape)} are not pairs: [2B, S] is needed, the chosen "
            "answers first, then as many rejected ones"
        )
    counts = (labels != _IGNORED).astype("float32").sum(-1)
    empty = np.flatnonzero(counts.numpy() == 0)
    if empty.size:
        pairs = labels.shape[0] // 2
        kind = "chosen" if empty[0] < pairs else "rejected"
        raise UserError(
            f"the {kind} answer of pair {empty[0] % pairs} in the batch has no label that counts: "
            "an empty answer, or a prompt that fills the row; drop the pair or raise the length"
        )
    return counts


def sequence_log_probs(model: nn.Layer, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probability of every row's answer.

    Logits exist only where a label counts: prompts and padding take no memory of size V.

    Args:
        model: a ``LlamaForCausalLM``.
        input_ids: int64 ``[2B, S]``.
        labels: int64 ``[2B, S]``, already shifted, -100 where they do not count.

    Returns:
        float32 ``[2B]``, the sum of ``log p(label)`` over the labels that count; 0 without any.
    """
    flat = labels.flatten()
    rows_n = (flat != _IGNORED).nonzero().flatten()
    if rows_n.shape[0] == 0:
        return paddle.zeros([labels.shape[0]])
    losses_n, _ = model.token_losses(input_ids, paddle.gather(flat, rows_n), rows_n=rows_n)
    spread = paddle.scatter(paddle.zeros(flat.shape), rows_n, losses_n)
    return -spread.reshape(labels.shape).sum(-1)


def _check_settings(beta: float, label_smoothing: float, loss_type: str) -> None:
    if loss_type not in LOSS_TYPES:
        raise UserError(f"loss_type={loss_type!r} is not one of {', '.join(LOSS_TYPES)}")
    if not 0 < beta < math.inf:
        raise UserError(f"beta={beta} has to be a positive number; 0.1 is usual")
    if not 0 <= label_smoothing < 0.5:
        raise UserError(
            f"label_smoothing={label_smoothing} has to be at least 0 and below 0.5, at which "
            "a pair says nothing"
        )
    if label_smoothing and loss_type != "sigmoid":
        raise UserError(
            f"label_smoothing={label_smoothing} only exists for loss_type=sigmoid, not for "
            f"{loss_type}; set it to 0"
        )


def dpo_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    counts: Tensor | None = None,
) -> Tensor:
    """Return the loss of each pair.

    Args:
        policy_logps: float32 ``[2B]`` of the trained network, chosen answers first.
        reference_logps: float32 ``[2B]`` of the reference, no gradient.
        beta: how strongly the reference holds the policy; IPO's tau.
        label_smoothing: probability that a pair's two answers were exchanged, ``[0, 0.5)``.
        loss_type: one of :data:`LOSS_TYPES`.
        counts: ``[2B]`` labels of each answer; ``ipo`` divides by them, the others do not.

    Returns:
        float32 ``[B]``.

    Raises:
        UserError: settings out of bounds, ``ipo`` without counts, or vectors that are not pairs of
            equal length.
    """
    _check_settings(beta, label_smoothing, loss_type)
    size = policy_logps.shape
    if len(size) != 1 or size[0] < 2 or size[0] % 2 or reference_logps.shape != size:
        raise UserError(
            f"log-probabilities of shapes {list(size)} and {list(reference_logps.shape)} are not "
            "two equal vectors of pairs"
        )
    ratios = policy_logps - reference_logps
    if loss_type == "ipo":
        if counts is None:
            raise UserError("loss_type=ipo needs the number of labels of each answer")
        ratios = ratios / counts
    chosen, rejected = ratios.chunk(2)
    margin = chosen - rejected
    if loss_type == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    if loss_type == "hinge":
        return F.relu(1 - beta * margin)
    as_labelled = -F.log_sigmoid(beta * margin)
    if label_smoothing == 0:
        return as_labelled
    exchanged = -F.log_sigmoid(-beta * margin)
    return (1 - label_smoothing) * as_labelled + label_smoothing * exchanged


class DPOObjective:
    """What preference tuning minimises; see :mod:`llm.train.objectives` for the signature.

    Args:
        beta: how strongly the reference holds the policy; IPO's tau.
        label_smoothing: probability that a pair's two answers were exchanged.
        loss_type: one of :data:`LOSS_TYPES`.

    Raises:
        UserError: settings out of bounds.
    """

    def __init__(
        self, beta: float = 0.1, *, label_smoothing: float = 0.0, loss_type: str = "sigmoid"
    ) -> None:
        _check_settings(beta, label_smoothing, loss_type)
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.loss_type = loss_type

    def __call__(self, model: nn.Layer, batch: dict[str, Tensor]) -> tuple[Tensor, float, Figures]:
        """Score a batch of B pairs.

        Args:
            model: the policy.
            batch: int64 ``input_ids`` and ``labels`` ``[2B, S]``, chosen answers first, and
                float32 ``reference_logps`` ``[2B]``.

        Returns:
            the summed loss, the number of pairs, and figures over pairs: ``rewards_chosen`` and
            ``rewards_rejected`` (beta times the log-ratio), ``rewards_margin``,
            ``rewards_accuracy`` (share of pairs whose margin is positive beyond what rounding
            makes of none), ``logps_chosen`` and ``logps_rejected``.

        Raises:
            UserError: no reference in the batch, one that is not finite, or an empty answer.
        """
        reference = _checked_reference(batch)
        counts = token_counts(batch["labels"])
        policy = sequence_log_probs(model, batch["input_ids"], batch["labels"])
        losses = dpo_loss(
            policy,
            reference,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            loss_type=self.loss_type,
            counts=counts,
        )
        pairs = losses.shape[0]
        figures = self._figures(policy.numpy(), reference.numpy(), pairs)
        return losses.sum(), float(pairs), figures

    def _figures(self, policy: NDArray[Any], reference: NDArray[Any], pairs: int) -> Figures:
        rewards = self.beta * (policy.astype(np.float64) - reference)
        chosen, rejected = rewards[:pairs], rewards[pairs:]
        sizes = np.abs(policy[:pairs]) + np.abs(policy[pairs:])
        values = {
            "rewards_chosen": chosen,
            "rewards_rejected": rejected,
            "rewards_margin": chosen - rejected,
            "rewards_accuracy": chosen - rejected > self.beta * ROUNDING * sizes,
            "logps_chosen": policy[:pairs],
            "logps_rejected": policy[pairs:],
        }
        return {name: (float(value.sum()), float(pairs)) for name, value in values.items()}


def _checked_reference(batch: dict[str, Tensor]) -> Tensor:
    if "reference_logps" not in batch:
        raise UserError(
            "the batch has no reference_logps: score the data with reference_log_probs before "
            "training and collate with ReferencedPairs"
        )
    reference = batch["reference_logps"]
    rows = batch["labels"].shape[0]
    if reference.shape != [rows]:
        raise UserError(f"reference_logps of shape {list(reference.shape)} do not fit {rows} rows")
    _check_finite(reference.numpy())
    return reference


def _check_finite(logps: NDArray[Any]) -> None:
    bad = np.argwhere(~np.isfinite(logps))
    if bad.size:
        raise UserError(
            f"the reference's log-probability at {bad[0].tolist()} is {logps[tuple(bad[0])]}: the "
            "initial model cannot score that pair; check its weights"
        )


def reference_log_probs(
    model: nn.Layer,
    dataset: Samples,
    collate: Collate,
    batch_size: int,
    score: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> NDArray[Any]:
    """Score every pair with the network as it is now, before it is trained.

    With a fresh adapter this is the base model's score; with one that was loaded to go on from, its
    own, unless the caller disables it.

    Args:
        model: the initial network; its mode is restored.
        dataset: map-style pairs.
        collate: makes ``input_ids`` and ``labels`` ``[2B, S]`` of B items, chosen answers first.
        batch_size: pairs per forward pass.
        score: maps ids and labels to what :func:`sequence_log_probs` returns; None is that, of the
            model, which then has to be whole.

    Returns:
        float32 ``[N, 2]``: log-probability of the chosen and of the rejected answer.

    Raises:
        UserError: no pairs, an empty answer, or a score that is not finite.
    """
    if len(dataset) == 0:
        raise UserError("there is no preference pair to score")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} has to be at least 1")
    score = score or partial(sequence_log_probs, model)
    scores = np.empty([len(dataset), 2], np.float32)
    training = model.training
    model.eval()
    bar = tqdm(total=len(dataset), desc="scoring pairs", disable=None, leave=False)
    try:
        with paddle.no_grad(), bar:
            for first in range(0, len(dataset), _WINDOW * batch_size):
                numbers = range(first, min(first + _WINDOW * batch_size, len(dataset)))
                for part in _by_length([(n, dataset[n]) for n in numbers], batch_size):
                    batch = collate([item for _, item in part])
                    tensors = {k: paddle.to_tensor(batch[k]) for k in ("input_ids", "labels")}
                    token_counts(tensors["labels"])
                    logps = score(tensors["input_ids"], tensors["labels"])
                    scores[[n for n, _ in part]] = logps.numpy().reshape(2, -1).T
                    bar.update(len(part))
    finally:
        model.train() if training else model.eval()
    _check_finite(scores)
    return scores


def _by_length(items: list[tuple[int, Any]], size: int) -> list[list[tuple[int, Any]]]:
    def length(entry: tuple[int, Any]) -> int:
        return max(len(entry[1]["chosen_ids"]), len(entry[1]["rejected_ids"]))

    items = sorted(items, key=length)
    return [items[start : start + size] for start in range(0, len(items), size)]


class ReferencedPairs:
    """Pairs together with their reference scores, map-style.

    Args:
        dataset: pairs, as scored by :func:`reference_log_probs`.
        logps: float32 ``[N, 2]``, its result.
        collate: of the pairs.

    Raises:
        UserError: scores of another number of pairs, or scores that are not finite.
    """

    def __init__(self, dataset: Samples, logps: NDArray[Any], collate: Collate) -> None:
        if logps.shape != (len(dataset), 2):
            raise UserError(
                f"reference scores of shape {list(logps.shape)} do not fit {len(dataset)} pairs; "
                "score this data set again"
            )
        _check_finite(logps)
        self.dataset = dataset
        self.logps = logps.astype(np.float32)
        self._collate = collate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "reference_logps": self.logps[index]}

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Make a batch of B items, with ``reference_logps`` float32 ``[2B]``."""
        batch = self._collate(samples)
        columns = np.stack([sample["reference_logps"] for sample in samples], axis=1)
        return {**batch, "reference_logps": columns.reshape(-1)}
