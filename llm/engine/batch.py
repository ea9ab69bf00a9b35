"""The arrays of one step: all that crosses from the engine to what executes it."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from llm.engine.sampler import Outcome, sample_rows
from llm.engine.sequence import Sequence
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
    if end < len(sequence.tokens):
        return Part(ids, place, sequence.blocks, 0, adapter)
    rows = 1 + len(sequence.drafts)
    return Part(ids + sequence.drafts, place, sequence.blocks, rows, adapter)


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
        counts = [len(part.ids) for part in parts]
        ends = np.cumsum(counts)
        table = np.zeros([len(parts), max(len(part.blocks) for part in parts)], dtype=np.int32)
        for row, part in zip(table, parts, strict=True):
            row[: len(part.blocks)] = part.blocks
        positions = np.concatenate(
            [np.arange(part.start, part.start + len(part.ids), dtype=np.int32) for part in parts]
        )
        rows = [
            row
            for end, part in zip(ends.tolist(), parts, strict=True)
            for row in range(end - part.num_rows, end)
        ]
        used = int(positions.max()) // block_size + 1
        adapters = np.asarray([part.adapter for part in parts], dtype=np.int32)
        return cls(
            np.fromiter((one for part in parts for one in part.ids), np.int64, int(ends[-1])),
            np.repeat(np.arange(len(parts), dtype=np.int32), counts),
            positions,
            np.ascontiguousarray(table[:, :used]),
            # A step of unfinished prompts alone has one row that nobody asked for.
            np.asarray(rows or [0], dtype=np.int64),
            adapters if adapters.any() else None,
        )

    def arrays(self) -> tuple[NDArray[Any], ...]:
        """Return the arrays in the order in which networks and exported programs take them."""
        return tuple(getattr(self, f"{name}_{axes}") for name, axes, _ in STEP_ARRAYS)


class Runner(Protocol):
    """Executes steps and owns the cache's memory."""

    block_size: int
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


@runtime_checkable
class ChoosesTokens(Protocol):
    """A runner that chooses tokens where its logits lie."""

    def sample(self, batch: Batch, sequences: SequenceOf[Sequence]) -> list[Outcome]:
        """Run a batch and choose the next token of each of its rows; these are the sequences as
        they stand there. Where there are none, nothing is read from the device."""


def adapter_of(runner: Runner, name: str | None) -> "Adapter | None":
    """Return the adapter that a request names.

    Raises:
        UserError: it is not loaded, or the runner takes none.
    """
    if name is None:
        return None
    if not isinstance(runner, TakesAdapters):
        raise UserError(
            f"adapter {name!r}: an exported program takes none, it has the one that was merged "
            "when it was exported; open the model directory (--model_name_or_path)"
        )
    return runner.adapters.get(name)


def run_and_sample(runner: Runner, batch: Batch, sequences: SequenceOf[Sequence]) -> list[Outcome]:
    """Run a batch and choose the next token of each of its rows.

    Args:
        runner: executes it.
        batch: a step.
        sequences: as they stand at each row; none where a step of unfinished prompts alone has one
            row that nobody asked for.
    """
    if isinstance(runner, ChoosesTokens):
        return runner.sample(batch, sequences)
    return sample_rows(runner.run(batch), sequences)
