"""From logits to tokens, in NumPy; ``llm.engine.device_sampler`` gives the same on a device.

A row's outcome depends on its own logits, parameters and random number alone, not on the rows
beside it. n rows, V vocabulary.
"""

import hashlib
import math
import struct
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm.engine.request import BrokenLogitsError, SamplingParams, Token
from llm.engine.sequence import Sequence

Floats = NDArray[np.floating[Any]]
Indices = NDArray[np.intp]
# What comes of a row: its token, or why there is none.
Outcome = Token | Exception

# Weights are added in pieces of this size, so that finding a place in their sum needs no running
# sum over the whole vocabulary.
_PIECE = 512


def uniform(seed: int, choice: int, position: int) -> float:
    """Return a number in [0, 1) that hangs on nothing else.

    Args:
        seed: of the request.
        choice: number of the answer.
        position: of the token in its sequence.
    """
    # A hash is a generator without state; NumPy's own (Philox) takes 25 times as long to set up.
    told = struct.pack("<QQQ", seed & (2**64 - 1), choice, position)
    digest = hashlib.blake2b(told, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def place_of(sequence: Sequence) -> float:
    """Return the number in [0, 1) that decides a sequence's next token."""
    return uniform(sequence.seed, sequence.request.choice, len(sequence.tokens))


def sample_rows(logits_nV: NDArray[np.float32], sequences: SequenceOf[Sequence]) -> list[Outcome]:
    """Choose the next token of every sequence.

    Args:
        logits_nV: float32 scores of the next tokens, as many rows as sequences or more; not
            changed.
        sequences: whose rows these are; their parameters, tokens and seeds.

    Returns:
        For each a token with the logarithm of its probability under the model itself, or why there
        is none: a :class:`BrokenLogitsError` where the row holds nan or inf.
    """
    outcomes: list[Outcome] = []
    for sequence, row in zip(sequences, logits_nV[: len(sequences)], strict=True):
        if not np.isfinite(row).all():
            outcomes.append(BrokenLogitsError(f"after {len(sequence.tokens)} tokens"))
            continue
        try:
            outcomes.append(sample(row, sequence))
        except Exception as error:  # noqa: BLE001 - one sequence's fault ends one sequence
            outcomes.append(error)
    return outcomes


def sample(logits_V: NDArray[np.float32], sequence: Sequence) -> Token:
    """Choose the next token of one sequence; see :func:`sample_rows`."""
    params = sequence.request.params
    scores = _edited(logits_V, sequence)
    if params.temperature == 0:
        chosen = int(scores.argmax())
    else:
        chosen = _draw(scores, params, place_of(sequence))
    normaliser = _log_normaliser(logits_V)
    top = _likeliest(logits_V, params.logprobs)
    return Token(
        chosen,
        float(logits_V[chosen]) - normaliser,
        top=tuple((int(one), float(logits_V[one]) - normaliser) for one in top),
    )


def _edited(logits_V: NDArray[np.float32], sequence: Sequence) -> NDArray[np.float32]:
    """Return the scores after what changes single ones; the same array where nothing does."""
    params = sequence.request.params
    counts = params.presence_penalty or params.frequency_penalty
    if not (params.repetition_penalty != 1 or counts or params.logit_bias or params.bad_words):
        return logits_V
    scores = logits_V.copy()
    if params.repetition_penalty != 1:
        seen = np.unique(sequence.tokens)
        values = scores[seen]
        penalty = np.float32(params.repetition_penalty)
        scores[seen] = np.where(values > 0, values / penalty, values * penalty)
    if counts and sequence.answered:
        ids = np.fromiter(sequence.answered.keys(), np.intp)
        times = np.fromiter(sequence.answered.values(), np.float32)
        scores[ids] -= params.presence_penalty + params.frequency_penalty * times
    for token_id, bias in params.logit_bias:
        scores[token_id] = scores[token_id] + bias if bias > -100 else -np.inf
    for *before, last in params.bad_words:
        if not before or sequence.tokens[-len(before) :] == before:
            scores[last] = -np.inf
    return scores


def _draw(scores_V: NDArray[np.float32], params: SamplingParams, place: float) -> int:
    """Return the token at ``place`` of the distribution that temperature and limits leave."""
    # Beside the likeliest, since a tiny temperature carries any other number to infinity.
    with np.errstate(over="ignore"):
        scaled = (scores_V - scores_V.max()) / np.float32(max(params.temperature, 1e-30))
    kept = _keep(scaled, params)
    weights = np.exp(scaled if kept is None else scaled[kept])
    number = _find(weights, place)
    return number if kept is None else int(kept[number])


def _keep(scaled_V: Floats, params: SamplingParams) -> Indices | None:
    """Return the tokens that may be drawn; None is all of them."""
    kept: Indices | None = None
    if 0 < params.top_k < scaled_V.size:
        ones = np.ones(scaled_V.size, np.float32)
        fewest = _fewest(np.abs(scaled_V), ones, params.top_k)
        kept = np.flatnonzero(scaled_V >= scaled_V[fewest].min())  # all that are as likely
    if params.top_p < 1:
        kept = _all(scaled_V) if kept is None else kept
        weights = np.exp(scaled_V[kept])
        wanted = params.top_p * weights.sum(dtype=np.float64)
        kept = kept[_fewest(np.abs(scaled_V[kept]), weights, wanted)]
    if params.min_p > 0:
        kept = _all(scaled_V) if kept is None else kept
        kept = kept[scaled_V[kept] >= math.log(params.min_p)]
    if params.typical_p < 1:
        kept = _typical(scaled_V, _all(scaled_V) if kept is None else kept, params.typical_p)
    return kept


def _all(scaled_V: Floats) -> Indices:
    return np.arange(scaled_V.size)


def _typical(scaled_V: Floats, kept: Indices, mass: float) -> Indices:
    """Return the tokens of the most typical surprise whose share of those kept reaches ``mass``."""
    weights = np.exp(scaled_V[kept].astype(np.float64))
    shares = weights / weights.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        surprise = -np.log(shares)
        expected = np.nansum(shares * surprise)
    return kept[_fewest(np.abs(surprise - expected), shares, mass)]


def _fewest(keys: Floats, weights: Floats, wanted: float) -> Indices:
    """Return the fewest elements of the smallest keys whose weights reach a sum, in rising order.

    Sorting 128k keys takes tens of milliseconds. So their weights are added by the keys' leading
    bits, and only those are sorted that share them with the last one in.

    Args:
        keys: not negative; of equal ones the first comes first.
        weights: of each.
        wanted: their sum; all elements where it is not reached.
    """
    # Floats that are not negative rise as their bits do: here in 128 steps from one power of two
    # to the next.
    bins = (keys.astype(np.float32).view(np.uint32) >> 16).astype(np.intp)
    sums = np.cumsum(np.bincount(bins, weights))
    edge = min(int(np.searchsorted(sums, wanted)), sums.size - 1)
    inside = np.flatnonzero(bins == edge)
    inside = inside[np.argsort(keys[inside], kind="stable")]
    ends = np.cumsum(weights[inside], dtype=np.float64) + (sums[edge - 1] if edge else 0.0)
    chosen = bins < edge
    chosen[inside[: int(np.searchsorted(ends, wanted)) + 1]] = True
    return np.flatnonzero(chosen)


def _find(weights: Floats, place: float) -> int:
    """Return the number of the weight that covers ``place`` of their sum."""
    pieces = np.add.reduceat(weights, np.arange(0, weights.size, _PIECE), dtype=np.float64)
    ends = np.cumsum(pieces)
    wanted = place * ends[-1]
    piece = int(np.searchsorted(ends, wanted, side="right"))
    piece = min(piece, pieces.size - 1)
    start = piece * _PIECE
    inside = np.cumsum(weights[start : start + _PIECE], dtype=np.float64)
    wanted -= ends[piece] - pieces[piece]
    number = start + int(np.searchsorted(inside, wanted, side="right"))
    # Rounding may lead past the last weight that counts, or onto one that is zero.
    while number >= weights.size or weights[number] == 0:
        number -= 1
    return number


def _log_normaliser(logits_V: NDArray[np.float32]) -> float:
    top = logits_V.max()
    return float(top) + math.log(float(np.exp(logits_V - top).sum(dtype=np.float64)))


def _likeliest(logits_V: Floats, count: int) -> Indices:
    """Return the ids of the largest logits, the largest first."""
    if count == 0:
        return np.empty([0], np.intp)
    some = _all(logits_V)
    if count < logits_V.size:
        some = np.argpartition(logits_V, -count)[-count:]
    ordered: Indices = some[np.lexsort((some, -logits_V[some]))]
    return ordered
