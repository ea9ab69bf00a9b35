"""What runs in the next step: every decoding sequence, then as much prompt as fits."""

from collections import deque

from llm.engine.blocks import BlockManager
from llm.engine.sequence import Sequence


class Scheduler:
    """Continuous batching (Yu et al. 2022, Orca) with chunked prompts, first come first served.

    A sequence is admitted when blocks for its longest possible answer are free, so a running one
    is never evicted.

    Args:
        blocks: the cache's blocks.
        max_sequences: sequences that run at the same time.
        max_step_tokens: tokens per step; longer prompts are cut into several steps.
    """

    def __init__(self, blocks: BlockManager, max_sequences: int, max_step_tokens: int) -> None:
        self.blocks = blocks
        self.max_sequences = max_sequences
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a request."""
        self.waiting.append(sequence)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.running)

    def schedule(self) -> list[tuple[Sequence, int]]:
        """Return the sequences of the next step, each with how many of its tokens to run."""
        while (
            self.waiting
            and len(self.running) < self.max_sequences
            and self.blocks.can_allocate(self.waiting[0].request.max_length)
        ):
            sequence = self.waiting.popleft()
            sequence.blocks = self.blocks.allocate(sequence.request.max_length)
            self.running.append(sequence)
        budget = self.max_step_tokens
        plan = []
        # Decoding sequences need one token each and come first: a long prompt delays nobody.
        for sequence in sorted(self.running, key=lambda s: s.num_pending > 1):
            count = min(sequence.num_pending, budget)
            if count:
                plan.append((sequence, count))
                budget -= count
        return plan

    def finish(self, sequence: Sequence) -> None:
        """Drop a sequence, wherever it is, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.blocks.free(sequence.blocks)
