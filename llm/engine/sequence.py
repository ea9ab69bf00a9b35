"""A running request: the engine's alone, and mutable."""

import secrets
from array import array
from collections import Counter, deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from external_ops.sampling import Settings
from llm.engine.blocks import block_key
from llm.engine.request import Request, Token

if TYPE_CHECKING:  # sequences without a grammar do not load llguidance
    from llm.engine.grammar import Grammar, Matcher
    from llm.llama.adapters.per_request import Adapter


@dataclass(eq=False)
class Sequence:
    """Tokens of one request, the cache blocks it holds, and how far the cache reaches.

    Args:
        request: what was asked.
        tokens: of the prompt, then of the answer.
        end_ids: tokens that end the answer.
        seed: of its randomness; drawn where the request has none.
        arrival: its number in the order of requests.
        adapter: that answers, which lasts as long as the sequence.
    """

    request: Request
    tokens: list[int]
    end_ids: frozenset[int]
    seed: int
    arrival: int = 0
    adapter: "Adapter | None" = None
    # An array, which a step's block table takes ten times as fast as a list.
    blocks: "array[int]" = field(default_factory=lambda: array("i"))
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens found in the cache when it was first admitted
    started: float | None = None  # time.monotonic() when it was first admitted
    num_drafted: int = 0  # tokens whose keys and values are in a draft model's cache
    drafts: list[int] = field(default_factory=list)  # guesses that the present step looks at
    produced: deque[Token] = field(default_factory=deque)  # sampled and not yet collected
    answered: Counter[int] = field(default_factory=Counter)  # how often each token was sampled
    matcher: "Matcher | None" = None  # how far the answer has come in its grammar
    scores: list[Token] = field(default_factory=list)  # of the prompt, from its second token on
    error: Exception | None = None  # it ended without another token
    _keys: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Note what every step asks of the parameters, which stay as they are."""
        one = self.request.params
        self.settings = Settings(
            one.temperature, one.top_k, one.top_p, one.min_p, typical_p=one.typical_p
        )
        counts = one.presence_penalty != 0 or one.frequency_penalty != 0
        changed = one.repetition_penalty != 1 or counts or one.logit_bias or one.bad_words
        self.is_edited = bool(changed) or self.matcher is not None
        self.num_top = one.logprobs
        self._max_length = self.request.max_length
        # Each token of prompt and answer once, for the penalty that asks for them at every step.
        self._distinct: dict[int, None] = {}
        self.distinct = array("q")
        if one.repetition_penalty != 1:
            self._see(self.tokens)

    def _see(self, tokens: SequenceOf[int]) -> None:
        before = len(self._distinct)
        self._distinct.update(dict.fromkeys(tokens))
        if len(self._distinct) > before:
            self.distinct.extend(islice(self._distinct, before, None))

    @classmethod
    def of(
        cls,
        request: Request,
        eos_ids: tuple[int, ...],
        arrival: int = 0,
        adapter: "Adapter | None" = None,
        grammar: "Grammar | None" = None,
    ) -> "Sequence":
        """Return the beginning of a request's run; its grammar comes compiled."""
        params = request.params
        ends = () if params.ignore_eos else eos_ids
        return cls(
            request,
            list(request.prompt_ids),
            frozenset((*ends, *params.stop_ids)),
            secrets.randbits(63) if params.seed is None else params.seed,
            arrival,
            adapter,
            matcher=None if grammar is None else grammar.start(),
        )

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are not in the cache yet."""
        return len(self.tokens) - self.num_computed

    @property
    def virtual(self) -> int:
        """Positions of the cache before its first token: those of its tuned prefix."""
        return 0 if self.adapter is None else self.adapter.length

    @property
    def num_stored(self) -> int:
        """Positions of the cache that are filled; a prefix comes with the first token."""
        return self.virtual + self.num_computed if self.num_computed else 0

    @property
    def is_scoring(self) -> bool:
        """Whether its next tokens are of a prompt that is to be scored."""
        asked = self.request.params.prompt_logprobs is not None
        return asked and len(self.scores) < len(self.request.prompt_ids) - 1

    @property
    def is_running(self) -> bool:
        """Whether it takes part in steps."""
        return bool(self.blocks)

    @property
    def rank(self) -> tuple[int, int]:
        """Its place among sequences: the smallest runs first and loses its blocks last."""
        return self.request.priority, self.arrival

    def keys(self, count: int, block_size: int) -> list[bytes]:
        """Return the keys of its first ``count`` blocks, all of them full."""
        while len(self._keys) < count:
            end = (len(self._keys) + 1) * block_size - self.virtual
            ids = self.tokens[max(end - block_size, 0) : max(end, 0)]
            root = b"" if self.adapter is None else self.adapter.key
            self._keys.append(block_key(self._keys[-1] if self._keys else root, ids))
        return self._keys[:count]

    def append(self, token: Token) -> Token:
        """Add a sampled token, with why it ends the request if it does.

        Raises:
            UserError: its grammar cannot go on.
        """
        if self.matcher is not None:
            self.matcher.take(token.token_id)
        self.tokens.append(token.token_id)
        self.answered[token.token_id] += 1
        if self._distinct:
            self._see((token.token_id,))
        reason = None
        if token.token_id in self.end_ids:
            reason = "stop"
        elif len(self.tokens) >= self._max_length:
            reason = "length"
        token = token.ending(reason)
        if len(self.tokens) == len(self.request.prompt_ids) + 1:
            token = token._replace(prompt=tuple(self.scores))
        self.produced.append(token)
        return token


class Row(NamedTuple):
    """A row of logits: what may follow a sequence's tokens, and behind them some guesses.

    Where it has a target, a token of the sequence's prompt, that one is scored instead.
    """

    sequence: Sequence
    guesses: SequenceOf[int] = ()
    target: int | None = None

    @property
    def num_top(self) -> int:
        """How many of the likeliest tokens are to be told."""
        if self.target is None:
            return self.sequence.num_top
        return self.sequence.request.params.prompt_logprobs or 0

    @property
    def is_edited(self) -> bool:
        """Whether the token is chosen by other scores than the logits."""
        return self.target is None and self.sequence.is_edited

    @property
    def temperature(self) -> float:
        """Of the choice; 0 where nothing is chosen."""
        return 0.0 if self.target is not None else self.sequence.settings.temperature

    @property
    def position(self) -> int:
        """Of the token that is to be chosen."""
        return len(self.sequence.tokens) + len(self.guesses)

    def last(self, count: int) -> list[int]:
        """Return so many tokens before it, or all where there are fewer."""
        if not count:
            return []
        return [*self.sequence.tokens[-count:], *self.guesses][-count:]

    @property
    def distinct(self) -> NDArray[np.int64]:
        """Each token before it once, where the sequence has a repetition penalty."""
        seen = np.frombuffer(self.sequence.distinct, np.int64)
        # Not a view, which would forbid the array to grow.
        return np.union1d(seen, self.guesses) if self.guesses else seen.copy()

    @property
    def answered(self) -> Counter[int]:
        """How often each token is in the answer before it."""
        answered = self.sequence.answered
        return answered + Counter(self.guesses) if self.guesses else answered
