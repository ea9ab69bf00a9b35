"""A running request: the engine's alone, and mutable."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from llm.engine.request import Request, Token


@dataclass(eq=False)
class Sequence:
    """Tokens of one request, the cache blocks it holds, and how far the cache reaches."""

    request: Request
    tokens: list[int]
    end_ids: frozenset[int]
    rng: np.random.Generator
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    produced: deque[Token] = field(default_factory=deque)  # sampled and not yet collected
    is_broken: bool = False  # its logits hold nan or inf: it ended without another token

    @classmethod
    def of(cls, request: Request, eos_ids: tuple[int, ...]) -> "Sequence":
        """Return the beginning of a request's run."""
        params = request.params
        ends = () if params.ignore_eos else eos_ids
        return cls(
            request,
            list(request.prompt_ids),
            frozenset((*ends, *params.stop_ids)),
            np.random.default_rng(params.seed),
        )

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are not in the cache yet."""
        return len(self.tokens) - self.num_computed

    def append(self, token_id: int, logprob: float) -> Token:
        """Add a sampled token and say whether it ends the request."""
        self.tokens.append(token_id)
        reason = None
        if token_id in self.end_ids:
            reason = "stop"
        elif len(self.tokens) >= self.request.max_length:
            reason = "length"
        token = Token(token_id, logprob, reason)
        self.produced.append(token)
        return token
