"""The generation loop: prefill and decode, for one prompt or many."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf

from common.errors import UserError
from llm.engine.batch import Batch, Runner
from llm.engine.blocks import BlockManager
from llm.engine.request import BrokenLogitsError, Completion, Request, Token
from llm.engine.scheduler import Scheduler
from llm.engine.sequence import Sequence


class Engine:
    """Runs requests over one runner. It knows token ids, not text. Not thread-safe.

    Args:
        runner: executes steps; the engine allocates its cache.
        max_sequences: requests that run at the same time.
        max_tokens: prompt plus answer of the longest request to make room for; the runner's
            ``max_model_len`` when not given.
        num_blocks: cache blocks; enough for ``max_sequences`` such requests when not given.
        max_step_tokens: tokens per step; longer prompts are cut.

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
    ) -> None:
        self.runner = runner
        self.vocab_size = runner.vocab_size
        self.eos_ids = runner.eos_ids
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
        runner.allocate(blocks.num_blocks)
        self._scheduler = Scheduler(blocks, max_sequences, max(max_step_tokens, max_sequences))

    @property
    def num_free_blocks(self) -> int:
        """Cache blocks that no request holds."""
        return self._scheduler.blocks.num_free

    def check(self, request: Request) -> None:
        """Refuse a request that could never run.

        Raises:
            UserError: an empty prompt, an id outside the vocabulary, or too many tokens.
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
        if request.max_length > self.max_model_len:
            raise UserError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens="
                f"{request.params.max_new_tokens} make {request.max_length}, but the limit is "
                f"{self.max_model_len}{self._limited_by}; shorten the prompt or the answer"
            )

    def add(self, request: Request) -> Sequence:
        """Queue a request and return its handle.

        Raises:
            UserError: see :meth:`check`.
        """
        self.check(request)
        sequence = Sequence.of(request, self.eos_ids)
        self._scheduler.add(sequence)
        return sequence

    def abort(self, sequence: Sequence) -> None:
        """Drop a request and free its blocks; harmless on a finished one."""
        self._scheduler.finish(sequence)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self._scheduler.has_work

    def step(self) -> None:
        """Run one step; tokens that it samples are appended to their sequences' ``produced``.

        A sequence whose logits hold nan or inf ends as ``is_broken``; the others go on.
        """
        plan = self._scheduler.schedule()
        if not plan:
            return
        # A step of unfinished prompts alone has one row that nobody asked for.
        sampled = [sequence for sequence, count in plan if count == sequence.num_pending]
        choices = self.runner.sample(Batch.of(plan, self.runner.block_size), sampled)
        for sequence, count in plan:
            sequence.num_computed += count
        for sequence, choice in zip(sampled, choices, strict=True):
            if choice is None:
                sequence.is_broken = True
                self.runner.clear(sequence.blocks)
                self._scheduler.finish(sequence)
            elif sequence.append(*choice).finish_reason:
                self._scheduler.finish(sequence)

    def stream(self, request: Request) -> Iterator[Token]:
        """Yield the tokens of one request as they come; closing the iterator frees its blocks.

        Raises:
            UserError: see :meth:`check`; raised by this call, not by the first ``next``. Later, a
                :class:`BrokenLogitsError`.
        """
        return self._stream(self.add(request))

    def _stream(self, sequence: Sequence) -> Iterator[Token]:
        try:
            while True:
                while not sequence.produced:
                    if sequence.is_broken:
                        raise BrokenLogitsError(f"after {len(sequence.tokens)} tokens")
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
        on_token: Callable[[int, Token], None] | None = None,
    ) -> list[Completion]:
        """Answer many requests together.

        Args:
            requests: what to answer.
            on_token: called with the request's number and each token as it comes.

        Raises:
            UserError: see :meth:`check`; checked for all requests before any runs. After all
                others are answered, a :class:`BrokenLogitsError` that names requests from 1.
        """
        for request in requests:
            self.check(request)
        handles = [self.add(request) for request in requests]
        completions = [Completion() for _ in requests]
        try:
            while any(
                completion.finish_reason is None and not handle.is_broken
                for completion, handle in zip(completions, handles, strict=True)
            ):
                self.step()
                for index, handle in enumerate(handles):
                    while handle.produced:
                        token = handle.produced.popleft()
                        completions[index].append(token)
                        if on_token is not None:
                            on_token(index, token)
        finally:
            for handle in handles:
                self.abort(handle)
        check_unbroken(handles)
        return completions


def check_unbroken(handles: SequenceOf[Sequence]) -> None:
    """Raise a :class:`BrokenLogitsError` that names the requests it is about, from 1."""
    broken = [str(number) for number, handle in enumerate(handles, 1) if handle.is_broken]
    if broken:
        raise BrokenLogitsError(
            f"prompt{'s' * (len(broken) > 1)} {', '.join(broken)} of {len(handles)}"
        )
