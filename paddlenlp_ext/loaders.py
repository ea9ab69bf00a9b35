"""Which samples a process takes: its share of every update, and of every evaluation."""

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

from common.ending import end_with_parent
from data.order import ResumableSampler
from llm.train.logs import quiet_import

with quiet_import():
    import paddle
    from paddlenlp.utils.batch_sampler import DistributedBatchSampler


class EvaluationShare:
    """Batches of one data-parallel rank that together cover a dataset once.

    All ranks get equally many batches, since sharded weights have to be gathered together; a rank
    that runs out gets empty ones.

    Args:
        samples: in the dataset.
        batch_size: of a rank.
        rank, ranks: which share of how many.
    """

    def __init__(self, samples: int, batch_size: int, rank: int, ranks: int) -> None:
        self.samples, self.batch_size, self.rank, self.ranks = samples, batch_size, rank, ranks

    def __len__(self) -> int:
        return math.ceil(self.samples / (self.batch_size * self.ranks))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            first = min((batch * self.ranks + self.rank) * self.batch_size, self.samples)
            yield list(range(first, min(first + self.batch_size, self.samples)))


class _Resumed(DistributedBatchSampler):
    """Batches that begin where a run is.

    PaddleNLP's loop asks for its own class, and tells it where to begin by counting updates of the
    batch of today; the batch may have been another one before.
    """

    def __init__(self, sampler: ResumableSampler, batches: int) -> None:
        self.sampler, self.batches = sampler, batches
        self.batch_size = sampler.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int = 0, consumed_samples: int = 0) -> None:
        """Stay: the sampler knows its place."""


class Loader(paddle.io.DataLoader):
    """Paddle's loader, which ends its workers when it is closed.

    Left before its end, as by a run that has taken its steps, an iterator of Paddle's stays for
    ever with its workers: the thread that reads from them holds it.
    """

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        self._begun = [*getattr(self, "_begun", ()), iterator]
        return iterator

    def close(self) -> None:
        """End the workers of all iterators; what they have loaded is gone."""
        while begun := getattr(self, "_begun", None):
            begun.pop()._try_shutdown_all()


def training_loader(
    dataset: Any,
    *,
    batches: int,
    first: int,
    samples: int,
    batch_size: int,
    rank: int,
    ranks: int,
    collate: Callable[..., Any],
    workers: int,
) -> Loader:
    """Return batches in the dataset's own order, one rank's share of each.

    The order is fixed by the dataset, so the number of samples consumed is the whole state of the
    loader.

    Args:
        dataset: map-style, as long as all runs need it.
        batches: of a rank in the whole run, those before ``first`` too.
        first: sample to begin with.
        samples: that the run takes; not one more, so that a finished run does not go on.
        batch_size: of a rank.
        rank, ranks: which share of how many.
        collate: makes a batch of samples.
        workers: processes that load.
    """
    subset = paddle.io.Subset(dataset, range(samples))
    sampler = ResumableSampler(
        samples, batch_size=batch_size, rank=rank, num_ranks=ranks, consumed_samples=first
    )
    return _loader(subset, _Resumed(sampler, batches), collate, workers)


def evaluation_loader(
    dataset: Any,
    *,
    batch_size: int,
    rank: int,
    ranks: int,
    collate: Callable[..., Any],
    workers: int,
) -> Loader:
    """Return batches that cover a dataset once over all ranks; arguments as above.

    Each is a pair: the batch, and whether it only repeats the last sample, which another rank has.
    """
    sampler = EvaluationShare(len(dataset), batch_size, rank, ranks)
    padded = _Padded(dataset)
    batches = [batch or [len(dataset)] for batch in sampler]

    def mark(samples: list[Any]) -> Any:
        return collate([sample for sample, _ in samples]), any(extra for _, extra in samples)

    return _loader(padded, batches, mark, workers)


class _Padded(paddle.io.Dataset):
    """A dataset with one more place, which repeats its last sample for a rank without any."""

    def __init__(self, dataset: Any) -> None:
        super().__init__()
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset) + 1

    def __getitem__(self, index: int) -> tuple[Any, bool]:
        extra = index == len(self.dataset)
        return self.dataset[index - extra], extra


def _loader(dataset: Any, sampler: Any, collate: Callable[..., Any], workers: int) -> Loader:
    parent = os.getpid()
    return Loader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        # Paddle's workers outlive a trainer that was killed, and wait for it for ever.
        worker_init_fn=lambda _: end_with_parent(parent),
    )
