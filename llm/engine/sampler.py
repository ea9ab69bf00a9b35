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
from external_ops.tensors import tensor_from
from llm.engine.request import BrokenLogitsError, Token
from llm.engine.sequence import Row

# What comes of a row: its token, or why there is none.
Outcome = Token | Exception
_TOLD = struct.Struct("<QQQ")
_LIKELIEST = Settings(temperature=0.0)
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
    told = _TOLD.pack(seed & (2**64 - 1), choice, position)
    digest = hashlib.blake2b(told, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def place_of(row: Row) -> float:
    """Return the number in [0, 1) that decides a row's token."""
    return uniform(row.sequence.seed, row.sequence.request.choice, row.position)


def sample_rows(
    logits_nV: Any, rows: SequenceOf[Row], kernel: Kernel = sample_ref
) -> list[Outcome]:
    """Choose the token of every row.

    Args:
        logits_nV: float32 scores of the next tokens, an array or a tensor of the host, as many rows
            or more; not changed.
        rows: whose these are; their parameters, tokens and seeds.
        kernel: draws them.

    Returns:
        For each a token with the logarithm of its probability under the model itself, or why there
        is none: a :class:`BrokenLogitsError` where the row holds nan or inf.
    """
    edited: list[NDArray[np.float32] | None] = [None] * len(rows)
    settings: list[Settings] = []
    faults: dict[int, Exception] = {}
    for number, row in enumerate(rows):
        how = row.sequence.settings
        if row.target is not None:
            how = _LIKELIEST
        elif how.temperature:
            how = Settings(*how[:4], place_of(row), how.typical_p)
        settings.append(how)
        if row.is_edited:
            try:
                edited[number] = _edited(_array(logits_nV, number), row)
            except Exception as error:  # noqa: BLE001 - one sequence's fault ends one sequence
                faults[number] = error
    if logits_nV.shape[0] > len(rows):
        logits_nV = logits_nV[: len(rows)]
    tokens, logprobs = kernel(logits_nV, edited, settings)
    scored = [number for number, row in enumerate(rows) if row.target is not None]
    if scored:
        targets = np.array([rows[number].target for number in scored])
        logprobs[scored] = _of_targets(logits_nV, tokens, logprobs, np.array(scored), targets)
        tokens[scored] = np.where(tokens[scored] < 0, tokens[scored], targets)
    drawn = list(map(Token, tokens.tolist(), logprobs.tolist()))
    found: list[Outcome] = [*drawn]
    for number, (row, token) in enumerate(zip(rows, drawn, strict=True)):
        if token.token_id < 0:
            found[number] = _fault(token.token_id, row)
        elif row.num_top:
            found[number] = _with_top(token, _array(logits_nV, number), row.num_top)
    for number, fault in faults.items():
        found[number] = fault
    return found


def score_targets(
    logits_RV: Any, row_K: Indices, target_K: Indices, kernel: Kernel = sample_ref
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return log-probabilities of given tokens: those that prompts are scored with.

    Args:
        logits_RV: float32 scores, an array or a tensor of the host.
        row_K: which row is asked.
        target_K: for which token.
        kernel: of the sampler: who knows the likeliest token and its share knows all others'.

    Returns:
        Natural logarithms ``[K]``, nan where the row holds nan or inf; and whether each token is
        the first of the likeliest.
    """
    count = logits_RV.shape[0]
    best_R, logprob_R = kernel(logits_RV, [None] * count, [_LIKELIEST] * count)
    found_K = _of_targets(logits_RV, best_R, logprob_R, row_K, target_K)
    return np.where(best_R[row_K] < 0, np.nan, found_K), best_R[row_K] == target_K


def _of_targets(
    logits_RV: Any,
    best_R: NDArray[np.int64],
    logprob_R: NDArray[np.float64],
    row_K: Indices,
    target_K: Indices,
) -> NDArray[np.float64]:
    """Return the targets' log-probabilities from that of each row's likeliest token."""
    ids = np.concatenate([np.maximum(best_R[row_K], 0), target_K])
    place_2K = np.tile(row_K, 2), ids
    if isinstance(logits_RV, np.ndarray):
        picked = logits_RV[place_2K]
    else:
        import paddle

        picked = paddle.gather_nd(logits_RV, tensor_from(np.stack(place_2K, 1))).numpy()
    best_K, chosen_K = picked.astype(np.float64).reshape(2, -1)
    with np.errstate(invalid="ignore"):  # of rows that hold inf, which are told of elsewhere
        found_K: NDArray[np.float64] = chosen_K - (best_K - logprob_R[row_K])
    return found_K


def _array(logits_nV: Any, number: int) -> NDArray[np.float32]:
    row = logits_nV[number]
    array: NDArray[np.float32] = row if isinstance(row, np.ndarray) else row.numpy()
    return array


def _fault(code: int, row: Row) -> Exception:
    assert code in (BROKEN, RULED_OUT), f"the kernel gave {code}"
    if code == BROKEN:
        return BrokenLogitsError(f"after {row.position} tokens")
    return UserError("bad_words, logit_bias and the grammar rule out every token; leave some")


def _with_top(token: Token, logits_V: Floats, count: int) -> Token:
    """Return the token with the likeliest ones of its row."""
    normaliser = float(logits_V[token.token_id]) - token.logprob
    top = _likeliest(logits_V, count)
    likely = tuple((int(one), float(logits_V[one]) - normaliser) for one in top)
    return token._replace(top=likely)


def _edited(logits_V: NDArray[np.float32], row: Row) -> NDArray[np.float32]:
    """Return the scores after what changes single ones."""
    params = row.sequence.request.params
    scores = logits_V.copy()
    if params.repetition_penalty != 1:
        seen = row.distinct
        values = scores[seen]
        penalty = np.float32(params.repetition_penalty)
        scores[seen] = np.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty or params.frequency_penalty:
        answered = row.answered
        ids = np.fromiter(answered.keys(), np.intp)
        times = np.fromiter(answered.values(), np.float32)
        scores[ids] -= params.presence_penalty + params.frequency_penalty * times
    for token_id, bias in params.logit_bias:
        scores[token_id] = scores[token_id] + bias if bias > -100 else -np.inf
    for *before, last in params.bad_words:
        if row.last(len(before)) == before:
            scores[last] = -np.inf
    if row.sequence.matcher is not None:
        scores[~row.sequence.matcher.allowed(row.guesses)] = -np.inf
    return scores


def _likeliest(logits_V: Floats, count: int) -> Indices:
    """Return the ids of the largest logits, the largest first."""
    some = np.arange(logits_V.size)
    if count < logits_V.size:
        some = np.argpartition(logits_V, -count)[-count:]
    ordered: Indices = some[np.lexsort((some, -logits_V[some]))]
    return ordered
