"""Ranges of the numbers by which tokens are chosen: one for flags, requests and the engine."""

from numbers import Integral, Real
from typing import NamedTuple

from common.errors import UserError


class Range(NamedTuple):
    """Values from `least` to `most`, or above `least` only."""

    least: float
    most: float
    words: str
    above: bool = False

    def holds(self, value: float) -> bool:
        """Whether a value lies in it; nan does not."""
        return self.least <= value <= self.most and not (self.above and value == self.least)


# Penalties further from 1 carry logits out of float32, whose infinities would then be chosen.
RANGES = {
    "temperature": Range(0, 100, "between 0 (greedy) and 100"),
    "top_k": Range(0, float("inf"), "0 (off) or positive"),
    "top_p": Range(0, 1, "above 0 and at most 1", above=True),
    "min_p": Range(0, 1, "between 0 (off) and 1"),
    "typical_p": Range(0, 1, "above 0 and at most 1 (off)", above=True),
    "presence_penalty": Range(-2, 2, "between -2 and 2"),
    "frequency_penalty": Range(-2, 2, "between -2 and 2"),
    "repetition_penalty": Range(0.01, 100, "between 0.01 and 100; 1 is off"),
}
BEAM_RANGES = {"length_penalty": Range(-100, 100, "between -100 and 100")}


def check_range(name: str, value: float) -> None:
    """Refuse a value outside its range, or that is no number.

    Raises:
        UserError: names the value and the range.
    """
    kind, range_ = Integral if name == "top_k" else Real, (RANGES | BEAM_RANGES)[name]
    if isinstance(value, bool) or not isinstance(value, kind) or not range_.holds(value):
        whole = "a whole number, " if name == "top_k" else ""
        raise UserError(f"{name}={value!r} has to be {whole}{range_.words}")


def check_whole(name: str, value: int, least: int) -> None:
    """Refuse a number that is not whole, or too small.

    Raises:
        UserError: names the value and the smallest.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise UserError(f"{name}={value!r} has to be a whole number, at least {least}")
