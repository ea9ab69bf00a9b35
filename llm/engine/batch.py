"""The arrays of one step: all that crosses from the engine to what executes it."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from llm.engine.sampler import Outcome, sample_rows
from llm.engine.sequence import Row, Sequence
from llm.llama.manifest import STEP_ARRAYS

if TYPE_CHECKING:  # paddle is loaded with the model
    from llm.llama.adapters.per_request import Adapter, RequestAdapters


class Part(NamedTuple):
    """Tokens that follow one another in a sequence.

    Args:
        ids: token ids to run.
        start: position of the first of them in the cache.
        blocks: cache blocks of the sequence, from its beginning.
        num_rows: how many of the last ones' logits are wanted.
        adapter: number of the sequence's adapter, 0 for none.
    """

    ids: SequenceOf[int]
    start: int
    blocks: SequenceOf[int]
    num_rows: int
    adapter: int = 0


def part_of(sequence: Sequence, count: int) -> Part:
    """Return a sequence's next tokens, and behind the last of them its drafts."""
    start, end = sequence.num_computed, sequence.num_computed + count
    ids = sequence.tokens[start:end]
    place = sequence.virtual + start
    adapter = 0 if sequence.adapter is None else sequence.adapter.number
    complete = end == len(sequence.tokens)
    num_rows = count if sequence.is_scoring else int(complete)
    if not complete or not sequence.drafts:
        return Part(ids, place, sequence.blocks, num_rows, adapter)
    num_rows += len(sequence.drafts)
    return Part(ids + sequence.drafts, place, sequence.blocks, num_rows, adapter)


def rows_of(sequence: Sequence, count: int, num_rows: int) -> list[Row]:
    """Return what the rows of such a part are: scores of the prompt, then what is drawn."""
    if num_rows == 1 and not sequence.drafts and not sequence.is_scoring:
        return [Row(sequence)]
    rows = []
    if sequence.is_scoring:
        first, prompt = sequence.num_computed + 1, sequence.request.prompt_ids
        rows = [Row(sequence, (), target) for target in prompt[first : first + count]]
    drawn = range(num_rows - len(rows))
    return rows + [Row(sequence, tuple(sequence.drafts[:number])) for number in drawn]


@dataclass(frozen=True)
class Batch:
    """Tokens of several sequences, packed one sequence after the other.

    T tokens, N sequences, M blocks of the longest one, n rows whose logits are wanted.

    Args:
        ids_T: int64 token ids.
        sequence_T: int32 number of each token's sequence in the batch, ascending.
        position_T: int32 position of each token in its sequence's cache, where a tuned prefix comes
            first.
        block_table_NM: int32 cache blocks of each sequence.
        rows_n: int64 indices into the T tokens.
        adapter_N: int32 number of each sequence's adapter, 0 for none; None where none has one.
    """

    ids_T: NDArray[np.int64]
    sequence_T: NDArray[np.int32]
    position_T: NDArray[np.int32]
    block_table_NM: NDArray[np.int32]
    rows_n: NDArray[np.int64]
    adapter_N: NDArray[np.int32] | None = None

    @classmethod
    def of(cls, parts: SequenceOf[Part], block_size: int) -> "Batch":
        """Lay out tokens of several sequences.

        Args:
            parts: of each sequence what to run.
            block_size: tokens per cache block.
        """
        described = [(len(part.ids), part.start, part.num_rows) for part in parts]
        counts_N, starts_N, rows_N = np.array(described, np.int64).T
        ends_N = counts_N.cumsum()
        width = -(-int((starts_N + counts_N).max()) // block_size)
        table = np.zeros([len(parts), width], np.int32)
        for row, part in zip(table, parts, strict=True):
            used = part.blocks[:width]
            row[: len(used)] = used
        num_rows = int(rows_N.sum())
        adapters = np.fromiter((part.adapter for part in parts), np.int32, len(parts))
        return cls(
            np.fromiter(chain.from_iterable(part.ids for part in parts), np.int64, int(ends_N[-1])),
            np.repeat(np.arange(len(parts), dtype=np.int32), counts_N),
            _runs(starts_N, counts_N).astype(np.int32),
            table,
            # A step of unfinished prompts alone has one row that nobody asked for.
            _runs(ends_N - rows_N, rows_N) if num_rows else np.zeros([1], np.int64),
            adapters if adapters.any() else None,
        )

    def arrays(self) -> tuple[NDArray[Any], ...]:
        """Return the arrays in the order in which networks and exported programs take them."""
        return tuple(getattr(self, f"{name}_{axes}") for name, axes, _ in STEP_ARRAYS)


def _runs(starts_N: NDArray[np.int64], counts_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return so many numbers from each start on, one run after the other."""
    ends_N = counts_N.cumsum()
    numbers: NDArray[np.int64] = np.arange(ends_N[-1]) + np.repeat(
        starts_N - (ends_N - counts_N), counts_N
    )
    return numbers


class Runner(Protocol):
    """Executes steps and owns the cache's memory."""

    block_size: int
    cache_dtype: str
    block_bytes: int  # memory of a cache block, in all layers of this process
    max_model_len: int
    longest: int  # what max_model_len may become
    vocab_size: int
    eos_ids: tuple[int, ...]

    def allocate(self, num_blocks: int) -> None:
        """Take memory for that many cache blocks."""

    def clear(self, blocks: SequenceOf[int]) -> None:
        """Forget what nan has spoiled: masked positions of a block are multiplied by 0."""

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Return float32 logits ``[n, V]`` of the batch's rows."""


@runtime_checkable
class TakesAdapters(Protocol):
    """A runner whose sequences may have adapters."""

    adapters: "RequestAdapters"


class ChoosesTokens(Runner, Protocol):
    """A runner that chooses tokens where its logits lie."""

    def sample(self, batch: Batch, rows: SequenceOf[Row]) -> list[Outcome]:
        """Run a batch and choose the token of each of its rows. Where nobody asked for one, nothing
        is read from the device."""


def adapter_of(runner: Runner, name: str | None) -> "Adapter | None":
    """Return the adapter that a request names.

    Raises:
        UnknownNameError: it is not loaded.
        UserError: the runner takes none.
    """
    if name is None:
        return None
    if not isinstance(runner, TakesAdapters):
        raise UserError(
            f"adapter {name!r}: an exported program takes none, it has the one that was merged "
            "when it was exported; open the model directory (--model_name_or_path)"
        )
    return runner.adapters.get(name)


def run_and_sample(
    runner: Runner | ChoosesTokens, batch: Batch, rows: SequenceOf[Row]
) -> list[Outcome]:
    """Run a batch and choose the token of each of its rows.

    Args:
        runner: executes it.
        batch: a step.
        rows: what its rows are; none where a step of unfinished prompts alone has one that nobody
            asked for.
    """
    # Not isinstance: a protocol's takes 0.1 ms of each step.
    sample = getattr(runner, "sample", None)
    if sample is not None:
        outcomes: list[Outcome] = sample(batch, rows)
        return outcomes
    return sample_rows(runner.run(batch), rows)
