"""Where a run is in its samples, and a fingerprint of the order in which they come."""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

_PROBES = 8


@dataclass(frozen=True)
class Place:
    """Where a run began to count: after ``step`` updates, at sample ``sample``.

    A run that goes on with another global batch takes the next samples, and as many of them with
    every update as the new batch holds.
    """

    step: int = 0
    sample: int = 0

    def sample_at(self, step: int, per_update: int) -> int:
        """Return the samples that were taken when ``step`` updates are done."""
        return self.sample + (step - self.step) * per_update

    def step_at(self, sample: float, per_update: int) -> int:
        """Return the updates after which ``sample`` samples have been taken."""
        return self.step + math.ceil(round((sample - self.sample) / per_update, 6))


def order_fingerprint(dataset: Any, consumed: int) -> str:
    """Hash up to eight samples spread over the first ``consumed`` ones.

    Two datasets with equal fingerprints have, for all practical purposes, shown a run the same
    samples so far; a changed store, split, seed or length of the run shows here.
    """
    digest = hashlib.sha256()
    for index in np.unique(np.linspace(0, consumed - 1, min(_PROBES, consumed)).astype(int)):
        sample = dataset[int(index)]
        for name in sorted(sample):
            if sample[name].dtype.kind == "i":  # ids and labels, not scores of some model
                digest.update(np.ascontiguousarray(sample[name]).tobytes())
    return digest.hexdigest()
