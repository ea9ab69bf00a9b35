"""Drawing tokens from logits.

n rows, V vocabulary, m rows whose scores are not their logits.
"""

import math
import threading
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from external_ops import native
from external_ops.tensors import tensor_from

if TYPE_CHECKING:  # the engine's words are imported before paddle is loaded
    from paddle import Tensor

Floats = NDArray[np.floating[Any]]
Indices = NDArray[np.intp]

# In place of a token: logits that hold nan or inf, and scores that rule every token out.
BROKEN, RULED_OUT = -1, -2

# Weights are added in pieces of this size, so that finding a place in their sum needs no running
# sum over the whole vocabulary.
_PIECE = 512


class Settings(NamedTuple):
    """How one token is drawn.

    Args:
        temperature: divides the scores; 0 takes the largest, the first of several.
        top_k: the largest stay, with those that are equal to the last one; 0 is all.
        top_p: then the fewest of the largest whose share reaches it (Holtzman et al. 2019).
        min_p: then those that are at least this share of the largest (Nguyen et al. 2024).
        place: in [0, 1): where in the sum of what stays, in the order of the vocabulary.
        typical_p: before that, those whose surprise is nearest to the expected one, up to this
            share (Meister et al. 2022).
    """

    temperature: float = 1.0
    top_k: float = 0
    top_p: float = 1.0
    min_p: float = 0.0
    place: float = 0.0
    typical_p: float = 1.0


def sample_ref(
    logits_nV: "Tensor | NDArray[np.float32]",
    edited: Sequence[NDArray[np.float32] | None],
    settings: Sequence[Settings],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Draw a token from each row, in NumPy.

    Args:
        logits_nV: float32 scores of the model.
        edited: scores ``[V]`` to draw from in place of a row's logits, -inf for tokens that may not
            come; None where those are the logits.
        settings: how, by row.

    Returns:
        Tokens ``[n]``, or :data:`BROKEN` or :data:`RULED_OUT`; and the logarithms of their
        probabilities under the model itself.
    """
    logits_nV = logits_nV if isinstance(logits_nV, np.ndarray) else logits_nV.numpy()
    tokens = np.empty([len(settings)], np.int64)
    logprobs = np.zeros([len(settings)])
    with np.errstate(over="ignore"):  # what is infinitely far below the largest counts as nothing
        for number, (own, how) in enumerate(zip(edited, settings, strict=True)):
            logits_V = logits_nV[number]
            scores_V = logits_V if own is None else own
            if not np.isfinite(logits_V).all():
                tokens[number] = BROKEN
            elif scores_V.max() == -np.inf:
                tokens[number] = RULED_OUT
            else:
                tokens[number] = token = _draw(scores_V, how)
                logprobs[number] = float(logits_V[token]) - _log_normaliser(logits_V)
    return tokens, logprobs


def sample_native(
    logits_nV: "Tensor | NDArray[np.float32]",
    edited: Sequence[NDArray[np.float32] | None],
    settings: Sequence[Settings],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Compute :func:`sample_ref` with the kernel of csrc/cpu/sample.cc, but for typical sampling.

    Exponentials are rounded otherwise than NumPy's, which may matter where a place lies within 1e-6
    of the border of two tokens.
    """
    logits = tensor_from(logits_nV) if isinstance(logits_nV, np.ndarray) else logits_nV
    numbers = [number for number, one in enumerate(edited) if one is not None]
    scores, edit = _kept.unedited(len(settings), logits.shape[1])
    if numbers:
        places = np.full(len(settings), -1)
        places[numbers] = np.arange(len(numbers))
        scores = tensor_from(np.stack([edited[number] for number in numbers]), on_host=True)
        edit = tensor_from(places, on_host=True)
    # np.array looks for a type in each tuple, which takes ten times as long.
    table = np.fromiter(chain.from_iterable(settings), np.float64).reshape(
        -1, len(Settings._fields)
    )
    described = _kept.table(np.ascontiguousarray(table[:, :-1]))
    inputs = logits, scores, edit, described
    tokens, logprobs = (one.numpy() for one in native.run("sample", *inputs))
    typical = np.flatnonzero(table[:, -1] < 1).tolist()
    if typical:
        rows = logits.numpy()[typical]
        others = [edited[number] for number in typical], [settings[number] for number in typical]
        tokens[typical], logprobs[typical] = sample_ref(rows, *others)
    return tokens, logprobs


class _Kept(threading.local):
    """Inputs of the kernel that a thread uses again: to make them takes longer than to draw."""

    def __init__(self) -> None:
        self._unedited: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._tables: dict[int, Tensor] = {}

    def unedited(self, rows: int, width: int) -> tuple["Tensor", "Tensor"]:
        """Return no scores, and which of them each row has."""
        if (rows, width) not in self._unedited:
            arrays = np.empty([0, width], np.float32), np.full(rows, -1)
            scores, edit = (tensor_from(one, on_host=True) for one in arrays)
            self._unedited[rows, width] = scores, edit
        return self._unedited[rows, width]

    def table(self, table: NDArray[np.float64]) -> "Tensor":
        """Return the settings of each row, overwritten by the next call for as many."""
        import paddle

        if len(table) not in self._tables:
            self._tables[len(table)] = tensor_from(table, on_host=True)
        self._tables[len(table)].get_tensor().set(table, paddle.CPUPlace())
        return self._tables[len(table)]


_kept = _Kept()


def _draw(scores_V: Floats, settings: Settings) -> int:
    """Return the token at the place of the distribution that temperature and limits leave."""
    if settings.temperature == 0:
        return int(scores_V.argmax())
    # Beside the likeliest, since a tiny temperature carries any other number to infinity.
    scaled = (scores_V - scores_V.max()) / np.float32(max(settings.temperature, 1e-30))
    kept = _keep(scaled, settings)
    weights = np.exp(scaled if kept is None else scaled[kept])
    number = _find(weights, settings.place)
    return number if kept is None else int(kept[number])


def _keep(scaled_V: Floats, settings: Settings) -> Indices | None:
    """Return the tokens that may be drawn; None is all of them."""
    kept: Indices | None = None
    if 0 < settings.top_k < scaled_V.size:
        ones = np.ones(scaled_V.size, np.float32)
        fewest = _fewest(np.abs(scaled_V), ones, settings.top_k)
        kept = np.flatnonzero(scaled_V >= scaled_V[fewest].min())  # all that are as likely
    if settings.top_p < 1:
        kept = _all(scaled_V) if kept is None else kept
        weights = np.exp(scaled_V[kept])
        wanted = settings.top_p * weights.sum(dtype=np.float64)
        kept = kept[_fewest(np.abs(scaled_V[kept]), weights, wanted)]
    if settings.min_p > 0:
        kept = _all(scaled_V) if kept is None else kept
        kept = kept[scaled_V[kept] >= math.log(settings.min_p)]
    if settings.typical_p < 1:
        kept = _typical(scaled_V, _all(scaled_V) if kept is None else kept, settings.typical_p)
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


def _log_normaliser(logits_V: Floats) -> float:
    """Return the logarithm of the sum of exponentials, added in float64."""
    top = logits_V.max()
    return float(top) + math.log(float(np.exp(logits_V - top).sum(dtype=np.float64)))
