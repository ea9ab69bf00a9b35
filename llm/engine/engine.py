"""The generation loop: prefill and decode, for one prompt or many."""

import itertools
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from common.errors import UserError
from llm.engine.batch import Batch, Part, Runner, adapter_of, part_of, rows_of, run_and_sample
from llm.engine.blocks import BlockManager
from llm.engine.request import BrokenLogitsError, Completion, GrammarSpec, Request, Token
from llm.engine.sampler import Outcome
from llm.engine.scheduler import Plan, Scheduler
from llm.engine.sequence import Sequence
from llm.engine.speculation import Drafter, Speculator
from llm.engine.stats import EngineStats

if TYPE_CHECKING:  # an engine without grammars does not load llguidance
    from llm.engine.grammar import Grammar

# Of the float32 logits in a step that score prompts; longer ones are scored in several steps.
_SCORED_BYTES = 64 << 20


class Engine:
    """Runs requests over one runner. It knows token ids, not text. Not thread-safe.

    Args:
        runner: executes steps; the engine allocates its cache.
        max_sequences: requests that run at the same time.
        max_tokens: prompt plus answer of the longest request to make room for; the runner's
            ``max_model_len`` when not given.
        num_blocks: cache blocks; enough for ``max_sequences`` such requests when not given.
        max_step_tokens: tokens per step; longer prompts are cut.
        prefix_cache: compute equal beginnings of prompts once.
        eos_ids: tokens that end an answer beside those that the model's files name.
        drafter: guesses tokens, for several in one step; answers are the same.
        compile_grammar: of requests that bring theirs as a text.

    Raises:
        UserError: ``max_tokens`` beyond the model's context.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_sequences: int = 8,
        max_tokens: int | None = None,
        num_blocks: int | None = None,
        max_step_tokens: int = 512,
        prefix_cache: bool = True,
        eos_ids: tuple[int, ...] = (),
        drafter: Drafter | None = None,
        compile_grammar: "Callable[[GrammarSpec], Grammar] | None" = None,
    ) -> None:
        self.runner = runner
        self.vocab_size = runner.vocab_size
        self.eos_ids = tuple(dict.fromkeys((*runner.eos_ids, *eos_ids)))
        self.max_model_len = max_tokens or runner.max_model_len
        if self.max_model_len > runner.max_model_len:
            raise UserError(
                f"{self.max_model_len} tokens of prompt and answer exceed the model's context of "
                f"{runner.max_model_len}"
            )
        per_sequence = -(-self.max_model_len // runner.block_size)
        blocks = BlockManager(num_blocks or per_sequence * max_sequences, runner.block_size)
        self._limited_by = ""
        if blocks.num_blocks < per_sequence:
            self.max_model_len = blocks.num_blocks * blocks.block_size
            self._limited_by = f", what {blocks.num_blocks} cache blocks hold"
        self.max_sequences = max_sequences
        runner.allocate(blocks.num_blocks)
        self._scheduler = Scheduler(
            blocks,
            max_sequences,
            max(max_step_tokens, max_sequences),
            max_scored=max(1, _SCORED_BYTES // (4 * self.vocab_size)),
            prefix_cache=prefix_cache,
        )
        self._arrivals = itertools.count()
        self._num_step_tokens = 0
        self._compile_grammar = compile_grammar
        self._speculator = None
        if drafter is not None:
            drafter.allocate(blocks.num_blocks, blocks.block_size)
            self._speculator = Speculator(drafter)

    @property
    def num_free_blocks(self) -> int:
        """Cache blocks that no request holds."""
        return self._scheduler.blocks.num_free

    @property
    def num_running(self) -> int:
        """Requests that take part in steps."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests that have no place in the cache yet, or have given it up."""
        return self._scheduler.num_waiting

    @property
    def num_preempted(self) -> int:
        """How often a request gave up its place in the cache so far."""
        return self._scheduler.num_preempted

    @property
    def num_drafted(self) -> int:
        """Tokens that were guessed so far."""
        return 0 if self._speculator is None else self._speculator.num_drafted

    @property
    def num_accepted(self) -> int:
        """Guesses that were right so far."""
        return 0 if self._speculator is None else self._speculator.num_accepted

    @property
    def stats(self) -> EngineStats:
        """What it holds and has counted, at this moment."""
        scheduler = self._scheduler
        return EngineStats(
            self.num_running,
            self.num_waiting,
            scheduler.blocks.block_size,
            scheduler.blocks.num_blocks,
            self.num_free_blocks,
            self.num_preempted,
            scheduler.prefix_queries,
            scheduler.prefix_hits,
            0 if self._speculator is None else self._speculator.num_drafts,
            self.num_drafted,
            self.num_accepted,
            self._num_step_tokens,
        )

    def check(self, request: Request) -> None:
        """Refuse a request that could never run.

        Raises:
            UserError: an empty prompt, an id outside the vocabulary, too many tokens, an adapter
                that is not loaded, or a grammar that cannot be followed.
        """
        prompt = request.prompt_ids
        if not prompt:
            raise UserError("the prompt has no tokens; give at least one")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self.vocab_size:
            raise UserError(
                f"token id {low if low < 0 else high} is outside the vocabulary of "
                f"{self.vocab_size}; does the tokenizer belong to this model?"
            )
        params = request.params
        for name, ids in (
            ("logit_bias", [token_id for token_id, _ in params.logit_bias]),
            ("bad_words", [token_id for word in params.bad_words for token_id in word]),
        ):
            if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
                raise UserError(
                    f"{name} has the token id {min(ids) if min(ids) < 0 else max(ids)}, but the "
                    f"model's ids go from 0 to {self.vocab_size - 1}"
                )
        if request.grammar is not None and params.ignore_eos:
            raise UserError(
                "ignore_eos has the answer go on past its end, and a grammar says where that is; "
                "keep one of them"
            )
        if request.max_length > self.max_model_len:
            raise UserError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens="
                f"{request.params.max_new_tokens} make {request.max_length}, but the limit is "
                f"{self.max_model_len}{self._limited_by}; shorten the prompt or the answer"
            )
        self._compiled(request.grammar)
        adapter = adapter_of(self.runner, request.adapter)
        if adapter is None:
            return
        blocks = self._scheduler.blocks
        limit = min(self.runner.max_model_len, blocks.num_blocks * blocks.block_size)
        if adapter.length + request.max_length > limit:
            raise UserError(
                f"the tuned prefix {adapter.name!r} of {adapter.length} tokens, prompt and answer "
                f"make {adapter.length + request.max_length}, but the limit is {limit}; shorten "
                "the prompt or the answer"
            )

    def add(self, request: Request) -> Sequence:
        """Queue a request and return its handle.

        Raises:
            UserError: see :meth:`check`.
        """
        self.check(request)
        adapter = adapter_of(self.runner, request.adapter)
        grammar = self._compiled(request.grammar)
        sequence = Sequence.of(request, self.eos_ids, next(self._arrivals), adapter, grammar)
        self._scheduler.add(sequence)
        return sequence

    def _compiled(self, grammar: "Grammar | GrammarSpec | None") -> "Grammar | None":
        if not isinstance(grammar, GrammarSpec):
            return grammar
        if self._compile_grammar is None:
            raise UserError("this engine compiles no grammars; OpenedModel.open_engine's does")
        return self._compile_grammar(grammar)

    def abort(self, sequence: Sequence) -> None:
        """Drop a request and free its blocks; harmless on a finished one."""
        self._scheduler.finish(sequence)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self._scheduler.has_work

    def step(self) -> list[Sequence]:
        """Run one step; tokens that it samples are appended to their sequences' ``produced``.

        A sequence whose logits hold nan or inf, or whose token cannot be chosen, ends with an
        ``error``; the others go on.

        Returns:
            The sequences that have another token or have ended: nobody has to look at all others.

        Raises:
            Exception: what the runner raises; all sequences of the step have ended with it.
        """
        plan = self._scheduler.schedule()
        self._num_step_tokens = 0
        if not plan:
            return []
        try:
            parts, outcomes = self._run(plan)
        except Exception as error:
            for sequence, _ in plan:
                self._end(sequence, error)
            raise
        told, first = [], 0
        for (sequence, count), part in zip(plan, parts, strict=True):
            if part.num_rows:
                found = outcomes[first : first + part.num_rows]
                first += part.num_rows
                if sequence.is_scoring:
                    found = self._score(sequence, found)
                if found:
                    self._take(sequence, count, found)
                    told.append(sequence)
                    continue
            self._scheduler.computed(sequence, count)
        if self._speculator is not None:
            self._speculator.drafter.follow([one for one, _ in plan if one.is_running])
        return told

    def _run(self, plan: Plan) -> tuple[list[Part], list[Outcome]]:
        """Run a step; return its parts, and what follows the tokens of each of their rows.

        What follows a draft is what would follow if it is right.
        """
        if self._speculator is not None:
            self._guess(self._speculator, plan)
        parts = [part_of(sequence, count) for sequence, count in plan]
        rows = [
            row
            for (sequence, count), part in zip(plan, parts, strict=True)
            if part.num_rows
            for row in rows_of(sequence, count, part.num_rows)
        ]
        batch = Batch.of(parts, self.runner.block_size)
        self._num_step_tokens = len(batch.ids_T)
        began = time.perf_counter()
        outcomes = run_and_sample(self.runner, batch, rows)
        if self._speculator is not None and len(batch.ids_T) == len(rows):
            self._speculator.learn_time(len(rows), time.perf_counter() - began)
        return parts, outcomes

    def _score(self, sequence: Sequence, outcomes: list[Outcome]) -> list[Outcome]:
        """Take the scores of a prompt's next tokens; return what is left: a fault, or what follows.

        Prompts are scored by the step's own logits, so that scores do not depend on the company.
        """
        left = len(sequence.request.prompt_ids) - 1 - len(sequence.scores)
        for outcome in outcomes[:left]:
            if isinstance(outcome, Exception):
                return [outcome]
            sequence.scores.append(outcome)
        return outcomes[left:]

    def _guess(self, speculator: Speculator, plan: Plan) -> None:
        """Let the drafter guess for sequences that answer, in the room that the plan leaves."""
        room = self._scheduler.max_step_tokens - sum(count for _, count in plan)
        limits = [
            (sequence, sequence.request.max_length - len(sequence.tokens) - 1)
            for sequence, _ in plan
            if sequence.num_pending == 1
        ]
        if limits:
            lengths = speculator.lengths(limits, room)
            speculator.propose(
                [
                    (sequence, self._scheduler.reserve(sequence, length))
                    for (sequence, _), length in zip(limits, lengths, strict=True)
                ]
            )

    def _take(self, sequence: Sequence, count: int, outcomes: SequenceOf[Outcome]) -> None:
        """Add what follows a sequence's tokens, as far as its drafts are what was drawn."""
        right, reason = 0, None
        error: Exception | None = None
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, Exception):
                error = outcome
                break
            try:
                reason = sequence.append(outcome).finish_reason
            except UserError as failed:
                error = failed
                break
            if reason or [outcome.token_id] != sequence.drafts[number : number + 1]:
                break
            right += 1
        self._scheduler.computed(sequence, count + right)
        if self._speculator is not None:
            self._speculator.learn(sequence, right)
        if error is not None:
            self._end(sequence, error)
        elif reason is not None:
            self._scheduler.finish(sequence)

    def _end(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence that cannot go on; what it has computed may be spoiled."""
        sequence.error = error
        alone = self._scheduler.spoil(sequence)
        if alone:
            self.runner.clear(alone)
        self._scheduler.finish(sequence)

    def check_blocks(self) -> None:
        """Compare the cache's books with what the sequences hold; for tests."""
        running = self._scheduler.running
        self._scheduler.blocks.check([sequence.blocks for sequence in running])

    def stream(self, request: Request) -> Iterator[Token]:
        """Yield the tokens of one request as they come; closing the iterator frees its blocks.

        Raises:
            UserError: see :meth:`check`; raised by this call, not by the first ``next``. Later, a
                :class:`BrokenLogitsError`.
            Exception: why the request cannot go on.
        """
        return self._stream(self.add(request))

    def _stream(self, sequence: Sequence) -> Iterator[Token]:
        try:
            while True:
                while not sequence.produced:
                    if sequence.error is not None:
                        raise sequence.error
                    self.step()
                token = sequence.produced.popleft()
                yield token
                if token.finish_reason:
                    return
        finally:
            self.abort(sequence)

    def generate(
        self,
        requests: SequenceOf[Request],
        on_token: Callable[[int, Token], bool | None] | None = None,
        on_done: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Answer many requests together.

        Args:
            requests: what to answer.
            on_token: called with the request's number and each token as it comes; True ends that
                answer, as a stop does.
            on_done: called with the request's number and its answer when that has ended.

        Raises:
            UserError: see :meth:`check`; checked for all requests before any runs. After all
                others are answered, a :class:`BrokenLogitsError` that names requests from 1.
        """
        for request in requests:
            self.check(request)
        handles = [self.add(request) for request in requests]
        completions = [Completion() for _ in handles]
        open_ = {handle: number for number, handle in enumerate(handles)}
        try:
            while open_:
                for handle in self.step():
                    number = open_.get(handle)
                    if number is None:
                        continue  # another's
                    completion = completions[number]
                    while handle.produced and completion.finish_reason is None:
                        token = handle.produced.popleft()
                        completion.append(token)
                        if on_token is not None and on_token(number, token):
                            completion.finish_reason = token.finish_reason or "stop"
                            self.abort(handle)
                    if completion.finish_reason is not None or handle.error is not None:
                        del open_[handle]
                        if on_done is not None and handle.error is None:
                            on_done(number, completion)
        finally:
            for handle in open_:
                self.abort(handle)
        _check_unbroken(handles)
        return completions


def _check_unbroken(handles: SequenceOf[Sequence]) -> None:
    """Raise what ended requests; a :class:`BrokenLogitsError` names them, from 1."""
    ended = {n: handle.error for n, handle in enumerate(handles, 1) if handle.error is not None}
    for error in ended.values():
        if not isinstance(error, BrokenLogitsError):
            raise error
    if ended:
        numbers = ", ".join(map(str, ended))
        raise BrokenLogitsError(f"prompt{'s' * (len(ended) > 1)} {numbers} of {len(handles)}")
