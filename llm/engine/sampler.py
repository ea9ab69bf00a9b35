"""From logits to one token, in NumPy; ``llm.engine.device_sampler`` does the same on a device."""

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm.engine.sequence import Sequence

Floats = NDArray[np.floating[Any]]
Indices = NDArray[np.intp]
# A token and the logarithm of its probability under the model itself; None where logits hold nan or
# inf.
Choice = tuple[int, float] | None


def _penalise(logits: Floats, tokens: list[int], penalty: float) -> None:
    """Divide positive and multiply negative logits of seen tokens (Keskar et al. 2019, CTRL)."""
    seen = np.unique(tokens)
    values = logits[seen]
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)


def _keep_top_k(logits: Floats, k: int) -> Indices:
    if k == 0 or k >= logits.size:
        return np.arange(logits.size)
    # A partial sort is linear; a full one of 128k tokens takes milliseconds.
    smallest_kept = np.partition(logits, -k)[-k]
    return np.flatnonzero(logits >= smallest_kept)


def _keep_top_p(probabilities: Floats, p: float) -> Indices:
    """Return the fewest likeliest entries whose mass reaches ``p`` (Holtzman et al. 2019)."""
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept: Indices = order[before < p]
    return kept


def _softmax(values: Floats) -> Floats:
    weights = np.exp(values - values.max())
    total: Floats = weights / weights.sum()
    return total


def _log_normaliser(logits: Floats) -> float:
    top = logits.max()
    return float(top + np.log(np.exp(logits - top).sum()))


def uniform_of(sequence: Sequence) -> float:
    """Draw the number from 0 to 1 that decides a sequence's next token; 0 where it is greedy."""
    return 0.0 if sequence.request.params.temperature == 0 else float(sequence.rng.random())


def sample(logits_V: NDArray[np.float32], sequence: Sequence, uniform: float) -> tuple[int, float]:
    """Choose the next token of a sequence.

    Args:
        logits_V: float32 scores of the next token; not changed.
        sequence: its parameters and tokens.
        uniform: from :func:`uniform_of`.

    Returns:
        The token, and the logarithm of its probability under the model itself.
    """
    params = sequence.request.params
    scores: Floats = logits_V
    if params.repetition_penalty != 1.0:
        scores = logits_V.copy()
        _penalise(scores, sequence.tokens, params.repetition_penalty)
    if params.temperature == 0:
        token = int(scores.argmax())
    else:
        scores = scores.astype(np.float64) / params.temperature
        kept = _keep_top_k(scores, params.top_k)
        probabilities = _softmax(scores[kept])
        if params.top_p < 1:
            nucleus = _keep_top_p(probabilities, params.top_p)
            kept = kept[nucleus]
            probabilities = probabilities[nucleus] / probabilities[nucleus].sum()
        sums = probabilities.cumsum()
        token = int(kept[np.searchsorted(sums / sums[-1], uniform, side="right")])
    return token, float(logits_V[token]) - _log_normaliser(logits_V)


def sample_rows(logits_nV: NDArray[np.float32], sequences: SequenceOf[Sequence]) -> list[Choice]:
    """Choose the next token of each sequence.

    Args:
        logits_nV: float32 scores, a row for each sequence; not changed.
        sequences: parameters, tokens and random generators.
    """
    return [
        sample(row, sequence, uniform_of(sequence)) if np.isfinite(row).all() else None
        for row, sequence in zip(logits_nV, sequences, strict=True)
    ]
