"""What a stretch of training samples holds."""

from typing import NamedTuple


class Counts(NamedTuple):
    """Input tokens, for throughput, and the weight of the loss: labels, or pairs."""

    tokens: int
    weight: float
