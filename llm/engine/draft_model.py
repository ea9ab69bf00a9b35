"""A small model that guesses for a large one; its cache has the same blocks as the engine's."""

from collections.abc import Sequence as SequenceOf

from common.errors import UserError
from llm.engine.batch import Batch, Part, Runner, run_and_sample
from llm.engine.sequence import Row, Sequence
from llm.engine.speculation import Wanted

# Tokens that a sequence may be ahead before the small model runs them for themselves; fewer are
# run with the next guess.
_AHEAD = 8


class DraftModel:
    """Guesses what a smaller model would answer; see :class:`llm.engine.speculation.Drafter`.

    Its draws use the numbers that the engine's draws will use, so that two models which nearly
    agree draw the same token at any temperature. A block that the prefix cache finds may lack the
    small model's last few tokens, where their sequence ended: guesses may be worse for it.

    Args:
        runner: of the smaller model, with the engine's vocabulary; its cache is allocated anew.
        most: guesses for one sequence in a step.
    """

    def __init__(self, runner: Runner, most: int) -> None:
        self.most = most
        self._runner = runner

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Take memory for the same blocks as the engine.

        Raises:
            UserError: the smaller model's kernels want blocks of another size.
        """
        if self._runner.block_size != block_size:
            raise UserError(
                f"the draft model's cache has blocks of {self._runner.block_size} tokens and the "
                f"model's of {block_size}; export the model with --block_size "
                f"{self._runner.block_size}, "
                "or open its directory (--model_name_or_path)"
            )
        self._runner.allocate(num_blocks)

    def propose(self, wanted: Wanted) -> list[list[int]]:
        """See :class:`llm.engine.speculation.Drafter`."""
        guesses: list[list[int]] = [[] for _ in wanted]
        active = [
            (sequence, count, made)
            for (sequence, count), made in zip(wanted, guesses, strict=True)
            if self._takes(sequence, len(sequence.tokens) + count)
        ]
        while active:
            parts = [_next(sequence, made) for sequence, _, made in active]
            batch = Batch.of(parts, self._runner.block_size)
            rows = [Row(sequence, tuple(made)) for sequence, _, made in active]
            outcomes = run_and_sample(self._runner, batch, rows)
            going = []
            for (sequence, count, made), part, outcome in zip(active, parts, outcomes, strict=True):
                if isinstance(outcome, Exception):  # the large model answers without it
                    self._runner.clear(sequence.blocks)
                    continue
                sequence.num_drafted = part.start + len(part.ids)
                made.append(outcome.token_id)
                if len(made) < count:
                    going.append((sequence, count, made))
            active = going
        return guesses

    def _takes(self, sequence: Sequence, end: int) -> bool:
        """Say whether it can guess up to a position: a prefix of the large model shifts them."""
        return sequence.virtual == 0 and end <= self._runner.max_model_len

    def follow(self, sequences: SequenceOf[Sequence]) -> None:
        """Run what the engine has computed of prompts; forget guesses that were wrong."""
        parts = []
        for sequence in sequences:
            sequence.num_drafted = min(sequence.num_drafted, sequence.num_computed)
            start, end = sequence.num_drafted, sequence.num_computed
            size = self._runner.block_size
            behind = end - start >= _AHEAD or end // size > start // size  # a full block is found
            if behind and self._takes(sequence, end):
                parts.append(Part(sequence.tokens[start:end], start, sequence.blocks, 0))
                sequence.num_drafted = end
        if parts:
            run_and_sample(self._runner, Batch.of(parts, self._runner.block_size), [])


def _next(sequence: Sequence, made: SequenceOf[int]) -> Part:
    """Return what the small model has to run for another guess."""
    if made:
        return Part(made[-1:], len(sequence.tokens) + len(made) - 1, sequence.blocks, 1)
    start = sequence.num_drafted
    return Part(sequence.tokens[start:], start, sequence.blocks, 1)
