"""A stretch of a dataset, such as the end of a file that is kept for evaluation."""

import hashlib
from typing import Any

from data.errors import DataError


class Part:
    """Samples `start` to `stop` (exclusive) of a map-style dataset.

    Attributes:
        lengths, label_counts: those of the dataset, of these samples.
    """

    def __init__(self, dataset: Any, start: int, stop: int) -> None:
        if not 0 <= start < stop <= len(dataset):
            raise DataError(f"samples {start} to {stop} are not a part of {len(dataset)} samples")
        self.dataset = dataset
        self.start, self.stop = start, stop
        self.lengths = dataset.lengths[start:stop]
        self.label_counts = dataset.label_counts[start:stop]

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self._place(index)]

    def _place(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.start + index % len(self)

    def prompt_ids(self, index: int) -> list[int]:
        """Ids before the last answer."""
        ids: list[int] = self.dataset.prompt_ids(self._place(index))
        return ids

    def answers(self, index: int) -> tuple[str, ...]:
        """What counts as right."""
        found: tuple[str, ...] = self.dataset.answers(self._place(index))
        return found

    def fingerprint(self) -> str:
        """sha256 (hex) of the dataset's and of the bounds."""
        text = f"{self.dataset.fingerprint()} {self.start} {self.stop}"
        return hashlib.sha256(text.encode()).hexdigest()


def keep_back(dataset: Any, ratio: float) -> tuple[Part, Part]:
    """The dataset without its last samples, and those: `ratio` of them, at least one.

    Raises:
        DataError: too few samples to give any away.
    """
    kept = max(round(len(dataset) * ratio), 1)
    if kept >= len(dataset):
        raise DataError(
            f"dev_ratio={ratio} of {len(dataset)} examples leaves none to train on: give more "
            "examples or a file of their own for evaluation"
        )
    cut = len(dataset) - kept
    return Part(dataset, 0, cut), Part(dataset, cut, len(dataset))
