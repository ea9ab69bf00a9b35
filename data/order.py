"""Which samples are taken and in what order: parts, passes, and the share of each rank.

All of it is known beforehand, so that training resumes exactly.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError, check_integer


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

    @property
    def token_counts(self) -> NDArray[np.int64]:
        """Tokens of each sample, where the dataset has rows of two sides."""
        counts: NDArray[np.int64] = self.dataset.token_counts[self.start : self.stop]
        return counts

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


class Sized(Protocol):
    """A map-style dataset that knows how many labels its samples have."""

    label_counts: NDArray[np.int64]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class Passes:
    """A stream of `num_samples` samples that goes over `dataset` again and again.

    Sample k is the (k mod N)-th of a permutation of the N samples that depends on nothing but
    `seed` and the pass, k // N: every pass takes each sample once, and a run that goes on at
    sample k takes what it would have taken without a stop.

    Attributes:
        epochs: passes begun, the last of which may be cut short.
    """

    def __init__(self, dataset: Sized, num_samples: int, seed: int) -> None:
        if not len(dataset):
            raise DataError("the dataset is empty: there is nothing to pass over")
        check_integer("num_samples", num_samples, least=1)
        check_integer("seed", seed, least=0)
        self.dataset = dataset
        self.num_samples = num_samples
        self.seed = seed
        self.epochs = -(-num_samples // len(dataset))
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.index(index)]

    def index(self, k: int) -> int:
        """Which sample of the dataset stands at place k of the stream."""
        if not 0 <= k < self.num_samples:
            raise IndexError(f"sample {k} of {self.num_samples}")
        return int(self._order(int(k) // len(self.dataset))[int(k) % len(self.dataset)])

    def label_counts(self, places: Any) -> NDArray[np.int64]:
        """Labels of the samples at these places of the stream, int64, of the same shape."""
        places = np.asarray(places, np.int64)
        indices = np.array([self.index(k) for k in places.reshape(-1).tolist()], np.int64)
        return self.dataset.label_counts[indices].reshape(places.shape)

    def _order(self, number: int) -> NDArray[np.int64]:
        """The permutation of pass `number`, int64 [N]."""
        if number not in self._orders:
            # A batch may lie across the border of two passes, no further.
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            generator = np.random.Generator(np.random.PCG64([self.seed, number]))
            self._orders[number] = generator.permutation(len(self.dataset))
        return self._orders[number]


class ResumableSampler:
    """Indices of the samples that one data-parallel rank takes, step by step.

    Step k takes the samples `consumed + k * batch_size * num_ranks ...`; each rank takes a
    contiguous share of `batch_size`. The state is one number, the samples that all ranks have
    consumed, so that training resumes exactly, also with another number of ranks.

    Args:
        num_samples: samples in the dataset.
        batch_size: samples a rank takes in a step.
        rank, num_ranks: this rank of how many.
        consumed_samples: taken by all ranks before.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        consumed_samples: int = 0,
    ) -> None:
        check_integer("num_samples", num_samples, least=1)
        check_integer("batch_size", batch_size, least=1)
        check_integer("num_ranks", num_ranks, least=1)
        check_integer("rank", rank, least=0, most=num_ranks - 1)
        check_integer("consumed_samples", consumed_samples, least=0, most=num_samples)
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.consumed_samples = consumed_samples

    @property
    def samples_per_step(self) -> int:
        """Samples that all ranks together take in a step."""
        return self.batch_size * self.num_ranks

    def __len__(self) -> int:
        return (self.num_samples - self.consumed_samples) // self.samples_per_step

    def __iter__(self) -> Iterator[list[int]]:
        while self.consumed_samples + self.samples_per_step <= self.num_samples:
            first = self.consumed_samples + self.rank * self.batch_size
            self.consumed_samples += self.samples_per_step
            yield list(range(first, first + self.batch_size))

    def state_dict(self) -> dict[str, int]:
        """What a later sampler needs to go on."""
        return {"consumed_samples": self.consumed_samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state`."""
        consumed = state["consumed_samples"]
        check_integer("consumed_samples", consumed, least=0, most=self.num_samples)
        self.consumed_samples = consumed
