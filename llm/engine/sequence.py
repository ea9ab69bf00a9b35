"""One request on its way through the engine."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from common.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    The order of operations is that of ``transformers``' generate: repetition penalty, temperature,
    top-k, top-p.

    Raises:
        UserError: a value outside its range.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "between 0 (greedy) and 100"),
            ("top_k", self.top_k >= 0, "0 (off) or positive"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "positive"),
        )
        for name, holds, range_ in rules:
            if not holds:
                raise UserError(f"{name}={getattr(self, name)} has to be {range_}")


@dataclass(frozen=True)
class Step:
    """One generated token; the last of a request carries why it ended."""

    token_id: int
    logprob: float  # natural logarithm of the model's own probability, before any warping
    finish_reason: str | None = None  # "stop" at an end token, "length" at the limit


@dataclass
class Completion:
    """All tokens that a request generated, an end token included."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def append(self, step: Step) -> None:
        """Add the next token."""
        self.ids.append(step.token_id)
        self.logprobs.append(step.logprob)
        self.finish_reason = step.finish_reason


@dataclass(eq=False)
class Sequence:
    """Tokens of one request, the cache blocks it holds, and how far the cache reaches."""

    tokens: list[int]
    params: SamplingParams
    end_ids: frozenset[int]
    prompt_length: int
    rng: np.random.Generator
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    produced: deque[Step] = field(default_factory=deque)  # sampled and not yet collected

    @property
    def max_length(self) -> int:
        """Most tokens that prompt and answer can come to."""
        return self.prompt_length + self.params.max_new_tokens

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are not in the cache yet."""
        return len(self.tokens) - self.num_computed

    def append(self, token: int, logprob: float) -> Step:
        """Add a sampled token and say whether it ends the request."""
        self.tokens.append(token)
        reason = None
        if token in self.end_ids:
            reason = "stop"
        elif len(self.tokens) >= self.max_length:
            reason = "length"
        step = Step(token, logprob, reason)
        self.produced.append(step)
        return step
