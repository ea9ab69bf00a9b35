"""What an engine counts, as plain numbers that cross to another process."""

from typing import NamedTuple


class EngineStats(NamedTuple):
    """The state of an engine at one moment, and what it has counted since it began.

    Args:
        num_running: requests that take part in steps.
        num_waiting: requests that have no place in the cache yet, or have given it up.
        block_size: tokens of a block of the key/value cache.
        num_blocks: of the cache.
        num_free_blocks: those that no request holds; their contents may still be found.
        num_preempted: how often a request gave up its place in the cache.
        prefix_queries: tokens of prompts that were looked for in the cache.
        prefix_hits: those that were there.
        num_drafts: how often tokens were guessed for a request.
        num_drafted: tokens that were guessed.
        num_accepted: guesses that were right.
        num_step_tokens: what the last step computed: of prompts, one of each answer, and guesses.
    """

    num_running: int
    num_waiting: int
    block_size: int
    num_blocks: int
    num_free_blocks: int
    num_preempted: int
    prefix_queries: int
    prefix_hits: int
    num_drafts: int
    num_drafted: int
    num_accepted: int
    num_step_tokens: int
