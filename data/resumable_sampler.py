"""Which samples each data-parallel rank takes, so that training resumes exactly."""

from collections.abc import Iterator

from data.errors import check_integer


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
