"""What callers make and what comes back: requests in, tokens out. Nothing here knows text."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.errors import UserError
from llm.config.sampling import RANGES, check_range


class BrokenLogitsError(UserError):
    """The model gave nan or inf where a token was to be chosen."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: the model's logits hold nan or inf, so no token can be chosen; its weights "
            "are damaged or overflow in their type: try another --dtype, or fetch them again"
        )


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
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} has to be at least 1")
        for name in RANGES:
            check_range(name, getattr(self, name))


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it.

    Args:
        prompt_ids: token ids, at least one.
        params: how the answer is chosen.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams = SamplingParams()

    @property
    def max_length(self) -> int:
        """Most tokens that prompt and answer can come to."""
        return len(self.prompt_ids) + self.params.max_new_tokens


def requests(
    prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[Request]:
    """Return a request for each prompt.

    Args:
        prompts: token ids of each.
        params: for all, or one per prompt.

    Raises:
        UserError: another number of parameters than of prompts.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise UserError(f"{len(prompts)} prompts but {len(each)} sets of parameters")
    return [Request(prompt, one) for prompt, one in zip(prompts, each, strict=True)]


@dataclass(frozen=True)
class Token:
    """One event out of the engine; the last of a request carries why it ended."""

    token_id: int
    logprob: float  # natural logarithm of the model's own probability, before any warping
    finish_reason: str | None = None  # "stop" at an end token, "length" at the limit


@dataclass
class Completion:
    """All tokens that a request generated, an end token included."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def append(self, token: Token) -> None:
        """Add the next token."""
        self.ids.append(token.token_id)
        self.logprobs.append(token.logprob)
        self.finish_reason = token.finish_reason
