"""From logits that lie on a device to tokens: what ``llm.engine.sampler`` computes, on the device.

Only tokens, their log probabilities and what to make of them cross to the host, in one read. A
request gets the token that the host's sampler gives: the random number is drawn on the host, from
the request's own generator, and everything is in float64. Devices add up in another order; where
that could matter, since a sum lies within :data:`DOUBT` of the number that it is compared with, the
row itself is read and the host decides.

n rows, V vocabulary, L tokens seen by the longest sequence.
"""

from collections.abc import Sequence as SequenceOf

import numpy as np
import paddle
from paddle import Tensor

from llm.engine.sampler import Choice, sample, uniform_of
from llm.engine.sequence import Sequence

# Float64 sums of 10^5 chances differ by less than 10^-11.
DOUBT = 1e-9


def _penalised(logits_nV: Tensor, sequences: SequenceOf[Sequence]) -> Tensor:
    penalties = [one.request.params.repetition_penalty for one in sequences]
    if all(penalty == 1.0 for penalty in penalties):
        return logits_nV
    seen = [np.unique(one.tokens) for one in sequences]
    # Shorter ones name their first token again: it gets the same number twice.
    padded = np.zeros([len(seen), max(map(len, seen))], np.int64) + [[one[0]] for one in seen]
    for row, one in zip(padded, seen, strict=True):
        row[: len(one)] = one
    index_nL = paddle.to_tensor(padded)
    penalty_n1 = paddle.to_tensor(np.asarray(penalties, np.float32)[:, None])
    values = paddle.take_along_axis(logits_nV, index_nL, 1)
    penalty = penalty_n1.expand_as(values)
    values = paddle.where(values > 0, values / penalty, values * penalty)
    return paddle.put_along_axis(logits_nV, index_nL, values, 1)


def _column(numbers: SequenceOf[float]) -> Tensor:
    return paddle.to_tensor(np.asarray(numbers, np.float64)[:, None])


def _keep_top_k(scores_nV: Tensor, sizes: list[int]) -> Tensor:
    """Return scores, those below the k-th of their row as -infinity."""
    vocabulary = scores_nV.shape[1]
    sizes = [vocabulary if size == 0 else min(size, vocabulary) for size in sizes]
    most = max(size for size in [1, *sizes] if size < vocabulary)
    if all(size == vocabulary for size in sizes):
        return scores_nV
    best = paddle.topk(scores_nV, most, axis=1)[0]
    place = np.asarray([[min(size, most) - 1] for size in sizes], np.int64)
    least = paddle.take_along_axis(best, paddle.to_tensor(place), 1)
    every = paddle.to_tensor(np.asarray([[size == vocabulary] for size in sizes]))
    kept = paddle.logical_or(scores_nV >= least, every)
    return paddle.where(kept, scores_nV, paddle.full_like(scores_nV, -np.inf))


def _draw(
    scores_nV: Tensor, sequences: SequenceOf[Sequence], uniforms: SequenceOf[float]
) -> tuple[Tensor, Tensor]:
    """Return the token of each row, and how far its nearest decision was from another one."""
    params = [one.request.params for one in sequences]
    wide = scores_nV.astype("float64") / _column([one.temperature for one in params])
    wide = _keep_top_k(wide, [one.top_k for one in params])
    weights = paddle.exp(wide - wide.max(1, keepdim=True))
    chances = weights / weights.sum(1, keepdim=True)
    order = paddle.arange(wide.shape[1]).unsqueeze(0).expand_as(chances)
    margin = paddle.ones([len(params)], "float64")
    if any(one.top_p < 1 for one in params):
        nucleus = _column([one.top_p for one in params])
        falling = paddle.argsort(-chances, axis=1, stable=True)
        order = paddle.where((nucleus < 1).expand_as(order), falling, order)
        chances = paddle.take_along_axis(chances, order, 1)
        before = paddle.cumsum(chances, 1) - chances
        # Where nothing is cut, nothing is decided.
        kept = paddle.logical_or(before < nucleus, nucleus >= 1)
        distance = (before - nucleus).abs() + (nucleus >= 1).astype("float64")
        margin = distance.min(1)
        chances = paddle.where(kept, chances, paddle.zeros_like(chances))
        chances = chances / chances.sum(1, keepdim=True)
    sums = paddle.cumsum(chances, 1)
    sums = sums / sums[:, -1:]
    drawn = _column(uniforms)
    index = (sums <= drawn).astype("int64").sum(1, keepdim=True)
    margin = paddle.stack([margin, (sums - drawn).abs().min(1)]).min(0)
    return paddle.take_along_axis(order, index, 1).squeeze(1), margin


def _tokens(
    logits_nV: Tensor, sequences: SequenceOf[Sequence], uniforms: SequenceOf[float]
) -> tuple[Tensor, Tensor]:
    """Return the token of each row, greedy ones too, and the distances of :func:`_draw`."""
    scores_nV = _penalised(logits_nV, sequences)
    tokens, margin = scores_nV.argmax(1), paddle.ones([len(sequences)], "float64")
    rows = [n for n, one in enumerate(sequences) if one.request.params.temperature > 0]
    if not rows:
        return tokens, margin
    chosen, drawn = [sequences[n] for n in rows], [uniforms[n] for n in rows]
    if len(rows) == len(sequences):
        return _draw(scores_nV, chosen, drawn)
    index = paddle.to_tensor(rows, dtype="int64")
    found, near = _draw(paddle.gather(scores_nV, index), chosen, drawn)
    return paddle.scatter(tokens, index, found), paddle.scatter(margin, index, near)


def sample_on_device(logits_nV: Tensor, sequences: SequenceOf[Sequence]) -> list[Choice]:
    """Choose the next token of each sequence.

    Args:
        logits_nV: float32 scores on the device, a row for each sequence; not changed.
        sequences: parameters, tokens and random generators.

    Returns:
        What :func:`llm.engine.sampler.sample_rows` returns.
    """
    uniforms = [uniform_of(one) for one in sequences]
    tokens, margin = _tokens(logits_nV, sequences, uniforms)
    top = logits_nV.max(1, keepdim=True)
    normaliser = top + paddle.log(paddle.exp(logits_nV - top).sum(1, keepdim=True))
    logprob = paddle.take_along_axis(logits_nV, tokens.unsqueeze(1), 1) - normaliser
    whole = paddle.isfinite(logits_nV).all(1)
    columns = (tokens, logprob.squeeze(1), whole, margin)
    read = paddle.stack([one.astype("float64") for one in columns], 1).numpy()
    found: list[Choice] = []
    for row, (token, chance, is_whole, near) in enumerate(read):
        if not is_whole:
            found.append(None)
        elif near < DOUBT:
            found.append(sample(logits_nV[row].numpy(), sequences[row], uniforms[row]))
        else:
            found.append((int(token), float(chance)))
    return found
