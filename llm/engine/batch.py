"""The arrays of one step: all that crosses from the engine to what executes it."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from llm.engine.sampler import Outcome, sample_rows
from llm.engine.sequence import Sequence
from llm.llama.manifest import STEP_ARRAYS


@dataclass(frozen=True)
class Batch:
    """Tokens of several sequences, packed one sequence after the other.

    T tokens, N sequences, M blocks of the longest one, n rows whose logits are wanted.

    Args:
        ids_T: int64 token ids.
        sequence_T: int32 number of each token's sequence in the batch, ascending.
        position_T: int32 position of each token in its sequence.
        block_table_NM: int32 cache blocks of each sequence.
        rows_n: int64 indices into the T tokens.
    """

    ids_T: NDArray[np.int64]
    sequence_T: NDArray[np.int32]
    position_T: NDArray[np.int32]
    block_table_NM: NDArray[np.int32]
    rows_n: NDArray[np.int64]

    @classmethod
    def of(cls, plan: SequenceOf[tuple[Sequence, int]], block_size: int) -> "Batch":
        """Lay out the next tokens of sequences; the last one of each that is complete is a row.

        Args:
            plan: sequences that hold their blocks, each with how many of its tokens to run.
            block_size: tokens per cache block.
        """
        ids: list[int] = []
        sequences: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        width = max(len(sequence.blocks) for sequence, _ in plan)
        table = np.zeros([len(plan), width], dtype=np.int32)
        for number, (sequence, count) in enumerate(plan):
            start, end = sequence.num_computed, sequence.num_computed + count
            ids.extend(sequence.tokens[start:end])
            sequences.extend([number] * count)
            positions.extend(range(start, end))
            table[number, : len(sequence.blocks)] = sequence.blocks
            if end == len(sequence.tokens):
                rows.append(len(ids) - 1)
        used = max(positions) // block_size + 1
        return cls(
            np.asarray(ids, dtype=np.int64),
            np.asarray(sequences, dtype=np.int32),
            np.asarray(positions, dtype=np.int32),
            np.ascontiguousarray(table[:, :used]),
            # A step of unfinished prompts alone has one row that nobody asked for.
            np.asarray(rows or [0], dtype=np.int64),
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
class ChoosesTokens(Protocol):
    """A runner that chooses tokens where its logits lie."""

    def sample(self, batch: Batch, sequences: SequenceOf[Sequence]) -> list[Outcome]:
        """Run a batch and choose the next token of each of its rows, of which these are the
        sequences; where there are none, nothing is read from the device."""


def run_and_sample(runner: Runner, batch: Batch, sequences: SequenceOf[Sequence]) -> list[Outcome]:
    """Run a batch and choose the next token of each of its rows.

    Args:
        runner: executes it.
        batch: a step.
        sequences: whose rows these are; none where a step of unfinished prompts alone has one row
            that nobody asked for.
    """
    if isinstance(runner, ChoosesTokens):
        return runner.sample(batch, sequences)
    return sample_rows(runner.run(batch), sequences)
