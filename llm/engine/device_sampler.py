"""From logits that lie on a device to tokens: what ``llm.engine.sampler`` gives, on the device.

Only tokens, their log probabilities and what to make of them cross to the host, in one read. A
sequence gets the token that the host's sampler gives it: its random number is made on the host, and
weights and their sums are in float64. The host's are rounded otherwise; a row in which that could
matter, since a decision lies within :data:`DOUBT` of another one, is read and left to the host. So
are rows that want what is not written for devices: typical sampling, and lists of likely tokens.

n rows, V vocabulary, L tokens of a row whose scores are changed.
"""

import math
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor

from external_ops.tensors import tensor_from
from llm.engine.request import BrokenLogitsError, SamplingParams, Token
from llm.engine.sampler import Outcome, place_of, sample_rows
from llm.engine.sequence import Row

# Share of a row's weights. NumPy's float32 exponentials are off by up to 2.5 units in the last
# place, 1.5e-7 of each weight, and so of all sums of them.
DOUBT = 1e-6


def _is_for_host(row: Row) -> bool:
    params = row.sequence.request.params
    if row.target is not None:
        return row.num_top > 0
    if row.sequence.matcher is not None:
        return True
    ids = [token_id for token_id, _ in params.logit_bias]
    return params.typical_p < 1 or params.logprobs > 0 or len(set(ids)) < len(ids)


def _edits(row: Row) -> dict[int, list[Any]]:
    """Return penalty, subtrahend, bias and whether it is forbidden of each changed token."""
    params = row.sequence.request.params
    edits: dict[int, list[Any]] = {}
    none: list[Any] = [1.0, 0.0, 0.0, False]
    if params.repetition_penalty != 1:
        penalty = params.repetition_penalty
        edits = {token: [penalty, *none[1:]] for token in row.distinct.tolist()}
    if params.presence_penalty or params.frequency_penalty:
        for token, times in row.answered.items():
            frequency = np.float32(params.frequency_penalty) * np.float32(times)
            lost = np.float32(params.presence_penalty) + frequency
            edits.setdefault(token, list(none))[1] = lost
    for token, bias in params.logit_bias:
        place = edits.setdefault(token, list(none))
        place[2], place[3] = (bias, False) if bias > -100 else (0.0, True)
    for *before, last in params.bad_words:
        if row.last(len(before)) == before:
            edits.setdefault(last, list(none))[3] = True
    return edits


def _edited(logits_nV: Tensor, rows: SequenceOf[Row]) -> Tensor:
    """Return the scores after what changes single ones; the same tensor where nothing does."""
    edits = [_edits(one) if one.is_edited else {} for one in rows]
    width = max(map(len, edits))
    if not width:
        return logits_nV
    # A row with fewer repeats its first one, which then gets the same number several times.
    changed = [list(one.items()) or [(0, [1.0, 0.0, 0.0, False])] for one in edits]
    changed = [one + one[:1] * (width - len(one)) for one in changed]

    def column(number: int, dtype: Any) -> Tensor:
        return tensor_from(np.array([[what[number] for _, what in row] for row in changed], dtype))

    index = tensor_from(np.array([[token for token, _ in row] for row in changed], np.int64))
    values = paddle.take_along_axis(logits_nV, index, 1)
    penalty = column(0, np.float32)
    values = paddle.where(values > 0, values / penalty, values * penalty) - column(1, np.float32)
    values = (values.astype("float64") + column(2, np.float64)).astype("float32")
    values = paddle.where(column(3, np.bool_), paddle.full_like(values, -np.inf), values)
    return paddle.put_along_axis(logits_nV, index, values, 1)


def _column(numbers: SequenceOf[float], dtype: Any = np.float64) -> Tensor:
    return tensor_from(np.asarray(numbers, dtype)[:, None])


def _keep_top_k(scaled_nV: Tensor, sizes: SequenceOf[int]) -> Tensor:
    """Return which tokens are among the likeliest of their row; a size of 0 limits nothing."""
    best = paddle.topk(scaled_nV, max(sizes), axis=1)[0]
    place = np.asarray([[max(size, 1) - 1] for size in sizes], np.int64)
    smallest = paddle.take_along_axis(best, tensor_from(place), 1)
    every = tensor_from(np.asarray([[size == 0] for size in sizes]))
    return paddle.logical_or(scaled_nV >= smallest, every)


def _nucleus(weights_nV: Tensor, masses: SequenceOf[float]) -> tuple[Tensor, Tensor]:
    """Return the weights of the fewest likeliest tokens, and how far they are from others.

    Where the last one in and the first one out weigh the same, the host puts them in order.
    """
    order = paddle.argsort(-weights_nV, axis=1, stable=True)
    falling = paddle.take_along_axis(weights_nV, order, 1)
    ends = paddle.cumsum(falling, 1)
    total = ends[:, -1:]
    wanted = _column(masses) * total
    before = ends - falling
    inside = before < wanted
    free = _column([mass >= 1 for mass in masses], np.bool_)
    inside = paddle.logical_or(inside, free.expand_as(inside))
    distance = ((before - wanted) / total).abs().min(1, keepdim=True)
    count = inside.astype("int64").sum(1, keepdim=True)
    edge = paddle.clip(count, max=weights_nV.shape[1] - 1)
    last, first = (paddle.take_along_axis(falling, place, 1) for place in (count - 1, edge))
    margin = paddle.concat([distance, (last - first) / last], 1).min(1, keepdim=True)
    # A row without a limit has nothing to decide.
    margin = paddle.where(free, paddle.ones_like(margin), margin)
    kept = paddle.where(inside, falling, paddle.zeros_like(falling))
    back = paddle.put_along_axis(paddle.zeros_like(kept), order, kept, 1)
    return back, margin.squeeze(1)


def _draw(
    scores_nV: Tensor, params: SequenceOf[SamplingParams], places: SequenceOf[float]
) -> tuple[Tensor, Tensor]:
    """Return the token of each row, and how far its nearest decision was from another one."""
    temperature = _column([max(one.temperature, 1e-30) for one in params], np.float32)
    scaled = (scores_nV - scores_nV.max(1, keepdim=True)) / temperature
    weights = paddle.exp(scaled.astype("float64"))
    nothing = paddle.zeros_like(weights)
    sizes = [one.top_k if 0 < one.top_k < scaled.shape[1] else 0 for one in params]
    if any(sizes):
        weights = paddle.where(_keep_top_k(scaled, sizes), weights, nothing)
    margin = paddle.ones([len(params)], "float64")
    if any(one.top_p < 1 for one in params):
        weights, margin = _nucleus(weights, [one.top_p for one in params])
    if any(one.min_p > 0 for one in params):
        least = [math.log(one.min_p) if one.min_p > 0 else -math.inf for one in params]
        weights = paddle.where(scaled >= _column(least, np.float32), weights, nothing)
    sums = paddle.cumsum(weights, 1)
    total = sums[:, -1:]
    wanted = _column(places) * total
    tokens = (sums <= wanted).astype("int64").sum(1)
    near = ((sums - wanted) / total).abs().min(1)
    return tokens, paddle.stack([margin, near]).min(0)


def _tokens(scores_nV: Tensor, rows: SequenceOf[Row]) -> tuple[Tensor, Tensor]:
    """Return the token of each row, greedy ones too, and the distances of :func:`_draw`."""
    tokens, margin = scores_nV.argmax(1), paddle.ones([len(rows)], "float64")
    drawn = [n for n, one in enumerate(rows) if one.temperature > 0]
    if not drawn:
        return tokens, margin
    params = [rows[n].sequence.request.params for n in drawn]
    places = [place_of(rows[n]) for n in drawn]
    if len(drawn) == len(rows):
        return _draw(scores_nV, params, places)
    index = tensor_from(np.array(drawn, np.int64))
    found, near = _draw(paddle.gather(scores_nV, index), params, places)
    return paddle.scatter(tokens, index, found), paddle.scatter(margin, index, near)


def _read(logits_nV: Tensor, rows: SequenceOf[Row]) -> NDArray[np.float64]:
    """Return token, log probability, whether logits are finite and the distance of each row."""
    tokens, margin = _tokens(_edited(logits_nV, rows), rows)
    tokens = paddle.clip(tokens, max=logits_nV.shape[1] - 1)  # past the end: nan, told below
    if any(row.target is not None for row in rows):
        targets = [-1 if row.target is None else row.target for row in rows]
        target_n = tensor_from(np.array(targets, np.int64))
        tokens = paddle.where(target_n >= 0, target_n, tokens)
    top = logits_nV.max(1, keepdim=True)
    normaliser = top + paddle.log(paddle.exp(logits_nV - top).sum(1, keepdim=True))
    logprob = paddle.take_along_axis(logits_nV, tokens.unsqueeze(1), 1) - normaliser
    whole = paddle.isfinite(logits_nV).all(1)
    columns = (tokens, logprob.squeeze(1), whole, margin)
    found: NDArray[np.float64] = paddle.stack([one.astype("float64") for one in columns], 1).numpy()
    return found


def sample_on_device(logits_nV: Tensor, rows: SequenceOf[Row]) -> list[Outcome]:
    """Choose the token of each row.

    Args:
        logits_nV: float32 scores on the device; not changed.
        rows: whose these are; their parameters, tokens and seeds.

    Returns:
        What :func:`llm.engine.sampler.sample_rows` returns.
    """
    outcomes: list[Outcome] = []
    for number, (token, logprob, whole, near) in enumerate(_read(logits_nV, rows)):
        row = rows[number]
        if not whole:
            outcomes.append(BrokenLogitsError(f"after {row.position} tokens"))
        elif not near >= DOUBT or _is_for_host(row):
            outcomes += sample_rows(logits_nV[number : number + 1].numpy(), [row])
        else:
            outcomes.append(Token(int(token), float(logprob)))
    return outcomes
