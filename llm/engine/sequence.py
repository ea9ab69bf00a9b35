"""A running request: the engine's alone, and mutable."""

import secrets
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from llm.engine.blocks import block_key
from llm.engine.request import Request, Token

if TYPE_CHECKING:  # sequences without a grammar do not load llguidance
    from llm.engine.grammar import Matcher
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
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens found in the cache when it was first admitted
    num_drafted: int = 0  # tokens whose keys and values are in a draft model's cache
    drafts: list[int] = field(default_factory=list)  # guesses that the present step looks at
    produced: deque[Token] = field(default_factory=deque)  # sampled and not yet collected
    answered: Counter[int] = field(default_factory=Counter)  # how often each token was sampled
    matcher: "Matcher | None" = None  # how far the answer has come in its grammar
    error: Exception | None = None  # it ended without another token
    _keys: list[bytes] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        request: Request,
        eos_ids: tuple[int, ...],
        arrival: int = 0,
        adapter: "Adapter | None" = None,
    ) -> "Sequence":
        """Return the beginning of a request's run."""
        params = request.params
        ends = () if params.ignore_eos else eos_ids
        return cls(
            request,
            list(request.prompt_ids),
            frozenset((*ends, *params.stop_ids)),
            secrets.randbits(63) if params.seed is None else params.seed,
            arrival,
            adapter,
            matcher=None if request.grammar is None else request.grammar.start(),
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

    def after(self, guesses: list[int]) -> "Sequence":
        """Return the sequence as it would be with these tokens, for choosing the next."""
        if not guesses:
            return self
        answered = self.answered + Counter(guesses)
        matcher = None if self.matcher is None else self.matcher.after(guesses)
        return replace(self, tokens=self.tokens + guesses, answered=answered, matcher=matcher)

    def append(self, token: Token) -> Token:
        """Add a sampled token, with why it ends the request if it does.

        Raises:
            UserError: its grammar cannot go on.
        """
        if self.matcher is not None:
            self.matcher.take(token.token_id)
        self.tokens.append(token.token_id)
        self.answered[token.token_id] += 1
        reason = None
        if token.token_id in self.end_ids:
            reason = "stop"
        elif len(self.tokens) >= self.request.max_length:
            reason = "length"
        token = token.ending(reason)
        self.produced.append(token)
        return token
