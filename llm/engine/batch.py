"""The arrays of one step, and what executes them."""

from typing import Protocol

import numpy as np

from llm.engine.sequence import Sequence


def _pack(plan: list[tuple[Sequence, int]], block_size: int) -> tuple[np.ndarray, ...]:
    """Lay the tokens of a step out as the runner's five arrays."""
    ids, sequences, positions, rows = [], [], [], []
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
    return (
        np.asarray(ids, dtype=np.int64),
        np.asarray(sequences, dtype=np.int32),
        np.asarray(positions, dtype=np.int32),
        np.ascontiguousarray(table[:, :used]),
        np.asarray(rows or [0], dtype=np.int64),
    )


class Runner(Protocol):
    """Executes steps and owns the cache's memory."""

    block_size: int
    max_model_len: int
    vocab_size: int
    eos_ids: tuple[int, ...]

    def allocate(self, num_blocks: int) -> None:
        """Take memory for that many cache blocks."""

    def run(
        self,
        ids_T: np.ndarray,
        sequence_T: np.ndarray,
        position_T: np.ndarray,
        block_table_NM: np.ndarray,
        rows_n: np.ndarray,
    ) -> np.ndarray:
        """Return float32 logits ``[n, V]`` of the chosen rows; see ``forward_paged``."""
