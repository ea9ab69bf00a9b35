"""What runs in the next step, whose turn comes next, and who gives way when the cache is full."""

import time
from array import array
from bisect import insort
from collections import Counter

from llm.engine.blocks import BlockManager
from llm.engine.sequence import Sequence

Plan = list[tuple[Sequence, int]]
"""The sequences of a step, each with how many of its tokens to run."""

# Share of the cache that stays free when another sequence is let in: those that run need room to
# grow, and giving way costs the computation of everything so far.
_WATERMARK = 0.01
# Waiting requests that are looked at in a step, for each place there is.
_LOOK_AHEAD = 4


class _Room:
    """What a step has left: of its tokens, and of those whose logits score prompts."""

    def __init__(self, tokens: int, scored: int) -> None:
        self.tokens, self._scored = tokens, scored

    def take(self, sequence: Sequence) -> int:
        """Return how many of a sequence's tokens the step runs."""
        count = min(sequence.num_pending, self.tokens)
        if sequence.is_scoring:
            count = min(count, self._scored)
            self._scored -= count
        self.tokens -= count
        return count


class Scheduler:
    """Continuous batching (Yu et al. 2022, Orca) with chunked prompts and blocks that grow.

    A sequence is let in when the blocks of its tokens are free. Running ones take a block when they
    need it; where none is left, the last one of the lowest priority gives up its blocks and waits
    again, so the first of the highest always goes on. Of equal priority, the client with the fewest
    running requests is next, then the request that came first; where all places are taken, a client
    with several gives one up for one that has none, so nobody waits behind another's many answers.

    Args:
        blocks: the cache's blocks.
        max_sequences: sequences that run at the same time.
        max_step_tokens: tokens per step; longer prompts are cut into several steps.
        max_scored: of these, tokens of prompts whose logits are wanted.
        prefix_cache: find beginnings of prompts that were computed before.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_sequences: int,
        max_step_tokens: int,
        *,
        max_scored: int,
        prefix_cache: bool = True,
    ) -> None:
        self.blocks = blocks
        self.max_sequences = max_sequences
        self.max_step_tokens = max_step_tokens
        self.max_scored = max_scored
        self.prefix_cache = prefix_cache
        self.running: list[Sequence] = []  # by rank
        self.num_preempted = 0
        self.prefix_queries = self.prefix_hits = 0  # tokens of prompts
        self._waiting: dict[int, dict[str, list[Sequence]]] = {}  # by priority, client and arrival
        self._watermark = int(_WATERMARK * blocks.num_blocks)
        # Keys of blocks that running sequences are about to compute: who needs one waits for it.
        self._promised: dict[bytes, Sequence] = {}

    def add(self, sequence: Sequence) -> None:
        """Queue a request, or one that gave way: it goes before those that came later."""
        clients = self._waiting.setdefault(sequence.request.priority, {})
        line = clients.setdefault(sequence.request.client, [])
        insort(line, sequence, key=lambda one: one.arrival)

    @property
    def num_waiting(self) -> int:
        """Requests that hold no blocks."""
        return sum(len(line) for clients in self._waiting.values() for line in clients.values())

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.running or self._waiting)

    def schedule(self) -> Plan:
        """Return what the next step runs."""
        if self._waiting and len(self.running) == self.max_sequences:
            self._make_way()
        running, size, before = self.running, self.blocks.block_size, self.num_preempted
        pending = [len(one.tokens) - one.num_computed for one in running]
        # Decoding sequences need one token each and come first: a long prompt delays nobody.
        room = _Room(self.max_step_tokens - pending.count(1), self.max_scored)
        plan: Plan = []
        for sequence, wanted in zip(running.copy(), pending, strict=True):
            if len(plan) == len(running):
                break  # the others have given way
            count = wanted if wanted == 1 else room.take(sequence)
            if sequence.virtual + sequence.num_computed + count > len(sequence.blocks) * size:
                self._grow(sequence, count)
            if len(plan) < len(running):
                plan.append((sequence, count))
        if self.num_preempted == before:
            plan += self._admit(room)
        return [(sequence, count) for sequence, count in plan if count]

    def _make_way(self) -> None:
        """Take a place from the client with the most, for one that has none."""
        running = Counter(one.request.client for one in self.running)
        richest, count = running.most_common(1)[0]
        if count == 1:
            return
        for priority in sorted(self._waiting):
            for client, line in self._waiting[priority].items():
                if running[client] or self._found(line[0]) is None:
                    continue
                for one in reversed(self.running):
                    if one.request.client == richest and one.request.priority >= priority:
                        self._preempt(one)
                        return

    def _grow(self, sequence: Sequence, count: int) -> None:
        """Get a sequence the blocks for more tokens, or take them from the last, which may be it.

        Those before it have theirs.
        """
        wanted = self.blocks.blocks_for(sequence.virtual + sequence.num_computed + count)
        while (more := wanted - len(sequence.blocks)) > self.blocks.num_free:
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return
        sequence.blocks.extend(self.blocks.allocate(more))

    def reserve(self, sequence: Sequence, count: int) -> int:
        """Get a sequence blocks for guesses behind its next token, where some are free.

        Returns:
            For how many there is room; nobody gives way to a guess.
        """
        end = sequence.virtual + sequence.num_computed + 1
        more = self.blocks.blocks_for(end + count) - len(sequence.blocks)
        sequence.blocks.extend(self.blocks.allocate(max(min(more, self.blocks.num_free), 0)))
        return min(count, len(sequence.blocks) * self.blocks.block_size - end)

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preempted += 1
        self._leave(sequence)
        sequence.num_computed = sequence.num_drafted = 0
        self.add(sequence)

    def _admit(self, room: "_Room") -> Plan:
        plan: Plan = []
        while self._waiting and room.tokens and len(self.running) < self.max_sequences:
            sequence = self._next()
            if sequence is None:
                break
            plan.append((sequence, room.take(sequence)))
        return plan

    def _next(self) -> Sequence | None:
        """Let one waiting sequence in; None where none can come in now."""
        running = Counter(one.request.client for one in self.running)
        for priority in sorted(self._waiting):
            clients = self._waiting[priority]
            turns = sorted(clients, key=lambda name: (running[name], clients[name][0].arrival))
            for client in turns:
                for sequence in clients[client][: _LOOK_AHEAD * self.max_sequences]:
                    found = self._found(sequence)
                    if found is None:
                        continue
                    if not self._has_room(sequence, found):
                        return None  # smaller ones behind it must not overtake it for ever
                    self._enter(sequence, found)
                    return sequence
        return None

    def _found(self, sequence: Sequence) -> list[int] | None:
        """Return the cached blocks it begins with; None where another is computing the next one."""
        if not self.prefix_cache or sequence.is_scoring:
            return []
        # At least one token is left to compute: its logits are wanted.
        size = self.blocks.block_size
        keys = sequence.keys((sequence.virtual + len(sequence.tokens) - 1) // size, size)
        found = self.blocks.cached(keys)
        if len(found) < len(keys) and keys[len(found)] in self._promised:
            return None
        return found

    def _has_room(self, sequence: Sequence, found: list[int]) -> bool:
        wanted = self.blocks.blocks_for(sequence.virtual + len(sequence.tokens)) - len(found)
        free = self.blocks.num_free - self.blocks.num_taken_by(found)
        return free - wanted >= (self._watermark if self.running else 0)

    def _enter(self, sequence: Sequence, found: list[int]) -> None:
        size = self.blocks.block_size
        self.blocks.hold(found)
        length = sequence.virtual + len(sequence.tokens)
        wanted = self.blocks.blocks_for(length) - len(found)
        sequence.blocks = array("i", found + self.blocks.allocate(wanted))
        there = max(len(found) * size - sequence.virtual, 0)
        sequence.num_computed = sequence.num_drafted = there
        if sequence.is_scoring:
            sequence.scores.clear()  # it gave way amid its prompt
        if not sequence.answered:
            sequence.num_cached = sequence.num_computed
        if sequence.started is None:
            sequence.started = time.monotonic()
            if self.prefix_cache and not sequence.is_scoring:
                self.prefix_queries += len(sequence.tokens)
                self.prefix_hits += there
        if self.prefix_cache:
            for key in sequence.keys(length // size, size)[len(found) :]:
                self._promised.setdefault(key, sequence)
        self._unqueue(sequence)
        insort(self.running, sequence, key=lambda one: one.rank)

    def computed(self, sequence: Sequence, count: int) -> None:
        """Note that a step has put ``count`` more tokens of a sequence into the cache."""
        size = self.blocks.block_size
        first = sequence.num_stored // size
        sequence.num_computed += count
        last = sequence.num_stored // size
        if first == last or not self.prefix_cache:
            return
        for block, key in zip(
            sequence.blocks[first:last], sequence.keys(last, size)[first:], strict=True
        ):
            self.blocks.publish(block, key)
            if self._promised.get(key) is sequence:
                del self._promised[key]

    def finish(self, sequence: Sequence) -> None:
        """Drop a sequence, wherever it is, and free its blocks; harmless on a finished one."""
        if sequence in self.running:
            self._leave(sequence)
        else:
            self._unqueue(sequence)

    def spoil(self, sequence: Sequence) -> list[int]:
        """Let nobody find what a sequence has computed; return the blocks that it alone holds."""
        return self.blocks.forget(sequence.blocks)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.free(sequence.blocks)
        self._promised = {k: one for k, one in self._promised.items() if one is not sequence}

    def _unqueue(self, sequence: Sequence) -> None:
        clients = self._waiting.get(sequence.request.priority, {})
        line = clients.get(sequence.request.client, [])
        if sequence not in line:
            return
        line.remove(sequence)
        if not line:
            del clients[sequence.request.client]
        if not clients:
            del self._waiting[sequence.request.priority]
