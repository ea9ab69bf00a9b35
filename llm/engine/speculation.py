"""Several tokens of an answer in one step: guesses that the model itself checks.

A drafter guesses the next tokens of a sequence. The step runs them behind the sequence's own, so
that the model's logits after each are there at once; the engine draws from the first as ever, and
while what it draws is the guess, from the next (Leviathan et al. 2023, Chen et al. 2023). Since the
draw comes first and is keyed by its position, answers are those without guesses, greedy or sampled,
bit for bit where logits do not depend on the other rows of a step; guesses cost time alone. How
many are made follows from how many were right and from what steps of so many rows take.
"""

import time
from collections.abc import Sequence as SequenceOf
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from llm.engine.sequence import Sequence

Wanted = SequenceOf[tuple[Sequence, int]]

_NEW = 0.3  # weight of the newest of several times


class Drafter(Protocol):
    """Guesses the next tokens of sequences."""

    most: int  # guesses for one sequence in a step

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Take memory beside that many blocks of the engine's cache."""

    def propose(self, wanted: Wanted) -> list[list[int]]:
        """Return guesses for each sequence: so many, or fewer.

        Args:
            wanted: sequences with all but their last token computed, each with a number and with
                blocks for as many tokens more.
        """

    def follow(self, sequences: SequenceOf[Sequence]) -> None:
        """See what sequences have computed, after a step; they still hold their blocks."""


class PromptLookup:
    """Guesses that what followed the last tokens before follows them again.

    Needs no second model (Saxena 2023, prompt lookup decoding). Right where answers quote: text to
    be summed up, code to be changed, and repetitions of their own.

    Args:
        most: guesses for one sequence in a step.
    """

    # Fewer tokens meet by chance too often; more are met too seldom.
    _SIZES = (4, 3, 2)

    def __init__(self, most: int) -> None:
        self.most = most
        # Of each sequence: how many tokens are entered, and where what followed the last time.
        self._known: WeakKeyDictionary[Sequence, tuple[int, dict[tuple[int, ...], int]]]
        self._known = WeakKeyDictionary()

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Nothing: it computes nothing."""

    def follow(self, sequences: SequenceOf[Sequence]) -> None:
        """Nothing: tokens are looked at when guesses are wanted."""

    def propose(self, wanted: Wanted) -> list[list[int]]:
        """See :class:`Drafter`."""
        return [self._propose(sequence, count) for sequence, count in wanted]

    def _propose(self, sequence: Sequence, count: int) -> list[int]:
        tokens, places = sequence.tokens, self._places(sequence)
        for size in self._SIZES:
            place = places.get(tuple(tokens[-size:]))
            if place is not None:
                # A repetition may still be under way: it copies what it has just guessed.
                period = len(tokens) - place
                return [tokens[place + number % period] for number in range(count)]
        return []

    def _places(self, sequence: Sequence) -> dict[tuple[int, ...], int]:
        """Return where each run of tokens was followed by another token the last time."""
        tokens = sequence.tokens
        entered, places = self._known.get(sequence, (0, {}))
        for end in range(entered, len(tokens)):
            for size in self._SIZES:
                if size <= end:
                    places[tuple(tokens[end - size : end])] = end
        self._known[sequence] = len(tokens), places
        return places


class _Pace:
    """How often guesses for one sequence are right."""

    # It begins at one half; the last ten steps or so count.
    _MEMORY, _PRIOR = 0.9, 1.0
    # Without a new guess, what is known halves in some seventy steps: later ones may be right.
    _PATIENCE = 0.99

    def __init__(self) -> None:
        self._right = self._tried = 0.0

    @property
    def share(self) -> float:
        return (self._right + self._PRIOR) / (self._tried + 2 * self._PRIOR)

    def learn(self, right: int, tried: int) -> None:
        """Take in a step: a guess behind a wrong one was not tried."""
        self._right = self._MEMORY * self._right + right
        self._tried = self._MEMORY * self._tried + min(right + 1, tried)

    def forget(self) -> None:
        """Pass over a step without guesses."""
        self._right *= self._PATIENCE
        self._tried *= self._PATIENCE


class StepTimes:
    """What steps took, by their number of rows."""

    # A row more before it has been seen: reading the weights is most of a step.
    _SLOPE = 0.03
    # Steps after which a time is taken anew: it may have been a busy moment's.
    _LIFE = 200

    def __init__(self) -> None:
        self._seconds: dict[int, tuple[float, int]] = {}
        self._step = 0

    def learn(self, rows: int, seconds: float) -> None:
        """Take in one step."""
        self._step += 1
        before, _ = self._seconds.get(rows, (seconds, 0))
        self._seconds[rows] = before + _NEW * (seconds - before), self._step
        for old in [n for n, (_, seen) in self._seconds.items() if seen + self._LIFE < self._step]:
            del self._seconds[old]

    def knows(self, rows: int) -> bool:
        """Whether a step of so many rows has been seen lately."""
        return rows in self._seconds

    def of(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the seconds that steps of so many rows may take; some have been seen."""
        known = sorted(self._seconds)
        rising = np.maximum.accumulate([self._seconds[n][0] for n in known])
        beyond = np.maximum(rows - known[-1], 0)
        seconds_n: NDArray[np.float64] = np.interp(rows, known, rising)
        return seconds_n * (1 + self._SLOPE * beyond)


class Speculator:
    """Decides how many guesses are worth their time, and counts those that were right.

    Args:
        drafter: makes them.
    """

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.num_drafts = 0
        self.num_drafted = 0
        self.num_accepted = 0
        self._paces: WeakKeyDictionary[Sequence, _Pace] = WeakKeyDictionary()
        self._times = StepTimes()
        self._draft_seconds: float | None = None  # of one guess for all sequences

    def lengths(self, limits: Wanted, room: int) -> list[int]:
        """Return how many guesses to make for each sequence.

        The number of rows that gives the most tokens a second is taken, the likeliest guesses
        first: guess number j of a sequence counts as share ** j tokens.

        Args:
            limits: the sequences of a step that need one token, with the most guesses of each.
            room: the most guesses of all.
        """
        count, most = len(limits), self.drafter.most
        if not self._times.knows(count):  # what guesses cost is seen beside a step without
            return [0] * count
        shares = [self._paces.setdefault(sequence, _Pace()).share for sequence, _ in limits]
        depth = np.tile(np.arange(1, most + 1), count)
        gains = np.repeat(shares, most) ** depth
        order = np.argsort(-gains, kind="stable")
        order = order[depth[order] <= np.repeat([limit for _, limit in limits], most)[order]][:room]
        tokens = count + np.concatenate([[0.0], np.cumsum(gains[order])])
        deepest = np.concatenate([[0], np.maximum.accumulate(depth[order])])
        seconds = self._times.of(count + np.arange(len(tokens)))
        seconds = seconds + deepest * (self._draft_seconds or 0.0)
        chosen = order[: int(np.argmax(tokens / seconds))]
        lengths: list[int] = np.bincount(chosen // most, minlength=count).tolist()
        return lengths

    def propose(self, wanted: Wanted) -> None:
        """Give each sequence its drafts."""
        asked = [(sequence, count) for sequence, count in wanted if count]
        if not asked:
            return
        began = time.perf_counter()
        for (sequence, _), drafts in zip(asked, self.drafter.propose(asked), strict=True):
            matcher = sequence.matcher
            # What a grammar does not allow is not drawn.
            count = len(drafts) if matcher is None else matcher.num_allowed(drafts)
            sequence.drafts = drafts[:count]
            self.num_drafts += count > 0
            self.num_drafted += count
        deepest = max(len(sequence.drafts) for sequence, _ in asked)
        if deepest:
            seconds = (time.perf_counter() - began) / deepest
            before = seconds if self._draft_seconds is None else self._draft_seconds
            self._draft_seconds = before + _NEW * (seconds - before)

    def learn_time(self, rows: int, seconds: float) -> None:
        """Take in what a step of answers alone took."""
        self._times.learn(rows, seconds)

    def learn(self, sequence: Sequence, right: int) -> None:
        """Take in how many of a sequence's guesses were right; they are used up."""
        pace = self._paces.setdefault(sequence, _Pace())
        if sequence.drafts:
            pace.learn(right, len(sequence.drafts))
        else:
            pace.forget()
        self.num_accepted += right
        sequence.drafts = []
