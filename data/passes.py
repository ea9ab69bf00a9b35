"""Many passes over a dataset as one stream, whose every place is known beforehand."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError, check_integer


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
