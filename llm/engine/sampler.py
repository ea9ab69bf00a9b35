"""From logits to tokens, on the host; ``llm.engine.device_sampler`` gives the same on a device.

A row's outcome depends on its own logits, parameters and random number alone, not on the rows
beside it. n rows, V vocabulary.
"""

import hashlib
import struct
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from external_ops.sampling import BROKEN, RULED_OUT, Floats, Indices, Settings, sample_ref
from llm.engine.request import BrokenLogitsError, Token
from llm.engine.sequence import Sequence

# What comes of a row: its token, or why there is none.
Outcome = Token | Exception
# A form of ``external_ops.sampling.sample_ref``.
Kernel = Callable[..., tuple[NDArray[np.int64], NDArray[np.float64]]]


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


def sample_rows(
    logits_nV: Any, sequences: SequenceOf[Sequence], kernel: Kernel = sample_ref
) -> list[Outcome]:
    """Choose the next token of every sequence.

    Args:
        logits_nV: float32 scores of the next tokens, an array or a tensor of the host, as many rows
            as sequences or more; not changed.
        sequences: whose rows these are; their parameters, tokens and seeds.
        kernel: draws them.

    Returns:
        For each a token with the logarithm of its probability under the model itself, or why there
        is none: a :class:`BrokenLogitsError` where the row holds nan or inf.
    """
    rows = [_Row(logits_nV, number) for number in range(len(sequences))]
    edited: list[NDArray[np.float32] | None] = []
    faults: dict[int, Exception] = {}
    for number, (sequence, row) in enumerate(zip(sequences, rows, strict=True)):
        try:
            edited.append(_edited(row, sequence))
        except Exception as error:  # noqa: BLE001 - one sequence's fault ends one sequence
            edited.append(None)
            faults[number] = error
    settings = [_settings(sequence) for sequence in sequences]
    if logits_nV.shape[0] > len(sequences):
        logits_nV = logits_nV[: len(sequences)]
    tokens, logprobs = kernel(logits_nV, edited, settings)
    return [
        faults.get(number) or _outcome(sequence, rows[number], *drawn)
        for number, (sequence, *drawn) in enumerate(
            zip(sequences, tokens.tolist(), logprobs.tolist(), strict=True)
        )
    ]


class _Row:
    """A row of logits as an array, once somebody looks at it."""

    def __init__(self, logits_nV: Any, number: int) -> None:
        self._logits_nV, self._number = logits_nV, number

    def array(self) -> NDArray[np.float32]:
        row = self._logits_nV[self._number]
        array: NDArray[np.float32] = row if isinstance(row, np.ndarray) else row.numpy()
        return array


def _settings(sequence: Sequence) -> Settings:
    one = sequence.request.params
    limits = one.temperature, one.top_k, one.top_p, one.min_p, one.typical_p
    return Settings(*limits, place_of(sequence))


def _outcome(sequence: Sequence, row: _Row, token: int, logprob: float) -> Outcome:
    if token == BROKEN:
        return BrokenLogitsError(f"after {len(sequence.tokens)} tokens")
    if token == RULED_OUT:
        return UserError("bad_words, logit_bias and the grammar rule out every token; leave some")
    count = sequence.request.params.logprobs
    if not count:
        return Token(token, logprob)
    logits_V = row.array()
    normaliser = float(logits_V[token]) - logprob
    top = _likeliest(logits_V, count)
    likely = tuple((int(one), float(logits_V[one]) - normaliser) for one in top)
    return Token(token, logprob, top=likely)


def _edited(row: _Row, sequence: Sequence) -> NDArray[np.float32] | None:
    """Return the scores after what changes single ones; None where nothing does."""
    params = sequence.request.params
    counts = params.presence_penalty or params.frequency_penalty
    changed = params.repetition_penalty != 1 or counts or params.logit_bias or params.bad_words
    if not changed and sequence.matcher is None:
        return None
    scores = row.array().copy()
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
    if sequence.matcher is not None:
        scores[~sequence.matcher.allowed()] = -np.inf
    return scores


def _likeliest(logits_V: Floats, count: int) -> Indices:
    """Return the ids of the largest logits, the largest first."""
    if count == 0:
        return np.empty([0], np.intp)
    some = np.arange(logits_V.size)
    if count < logits_V.size:
        some = np.argpartition(logits_V, -count)[-count:]
    ordered: Indices = some[np.lexsort((some, -logits_V[some]))]
    return ordered
