"""What callers make and what comes back: requests in, tokens out. Nothing here knows text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple

from common.errors import UserError
from llm.config.sampling import RANGES, check_range, check_whole

if TYPE_CHECKING:  # requests without a grammar do not load llguidance
    from llm.engine.grammar import Grammar


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

    The order of operations is that of ``transformers``' generate: what changes single logits
    (repetition, presence and frequency penalty, bias, bad words), then temperature, top-k, top-p,
    min-p, typical-p.

    Args:
        max_new_tokens: most tokens of the answer.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: how many of the likeliest tokens stay; 0 is all.
        top_p: the likeliest tokens stay whose mass reaches it (Holtzman et al. 2019).
        min_p: tokens stay that are at least this share as likely as the likeliest (Nguyen et al.
            2024).
        typical_p: the tokens stay whose surprise is nearest to the expected one, up to this mass
            (Meister et al. 2022).
        repetition_penalty: of tokens of prompt and answer (Keskar et al. 2019, CTRL).
        presence_penalty: taken off the logits of every token of the answer, as OpenAI's API does.
        frequency_penalty: likewise, times how often the token has come.
        logit_bias: token ids, each with what is added to its logit; -100 and less bans it.
        bad_words: sequences of token ids that may not come.
        logprobs: how many of the likeliest tokens to report beside the chosen one.
        prompt_logprobs: score the prompt's tokens from the second on, and report as many of the
            likeliest beside each, as vLLM does; 0 scores alone, None does not. The whole prompt is
            then computed, whatever the cache has of it.
        seed: of the randomness; drawn when None. Equal seeds and choices give equal answers,
            whatever else runs.
        stop_ids: tokens that end the answer, beside the model's own.
        ignore_eos: the model's own do not end it.

    Raises:
        UserError: a value outside its range.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int = 0
    prompt_logprobs: int | None = None
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in RANGES:
            check_range(name, getattr(self, name))
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_whole("logprobs", self.logprobs, 0)
        if self.prompt_logprobs is not None:
            check_whole("prompt_logprobs", self.prompt_logprobs, 0)
        others = (
            ("seed", self.seed is None or isinstance(self.seed, Integral), "a whole number"),
            ("logit_bias", all(math.isfinite(b) for _, b in self.logit_bias), "finite numbers"),
            ("bad_words", all(self.bad_words), "sequences of at least one token"),
        )
        for name, holds, range_ in others:
            if not holds:
                raise UserError(f"{name}={getattr(self, name)} has to be {range_}")


class GrammarSpec(NamedTuple):
    """A grammar that is not compiled yet: plain data, which may cross to the engine's process.

    Args:
        kind: one of ``llm.engine.grammar.KINDS``.
        source: its text (of a JSON schema, the JSON), or the choices.
    """

    kind: str
    source: str | tuple[str, ...] = ""


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it.

    Args:
        prompt_ids: token ids, at least one.
        params: how the answer is chosen.
        choice: number among the answers to one prompt; each draws other tokens with one seed.
        priority: smaller ones run first.
        client: whose it is; clients take turns.
        grammar: what the answer has to obey; ``llm.engine.opening.OpenedModel.grammars`` compiles
            it, here or when the engine gets the request.
        adapter: name of the LoRA adapter or tuned prefix that answers, one of those that
            ``llm.engine.opening.OpenedModel.adapters`` has loaded; the model alone when not given.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams = SamplingParams()
    choice: int = 0
    priority: int = 0
    client: str = ""
    grammar: "Grammar | GrammarSpec | None" = None
    adapter: str | None = None

    @property
    def max_length(self) -> int:
        """Most tokens that prompt and answer can come to."""
        return len(self.prompt_ids) + self.params.max_new_tokens


def each_of(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    """Return the parameters of each of so many prompts.

    Args:
        params: for all, or one per prompt.
        count: of the prompts.

    Raises:
        UserError: another number of parameters than of prompts.
    """
    each = [params] * count if isinstance(params, SamplingParams) else list(params)
    if len(each) != count:
        raise UserError(f"{count} prompts but {len(each)} sets of parameters")
    return each


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
    each = each_of(params, len(prompts))
    return [Request(prompt, one) for prompt, one in zip(prompts, each, strict=True)]


class Token(NamedTuple):
    """One event out of the engine; the last of a request carries why it ended."""

    token_id: int
    logprob: float  # natural logarithm of the model's own probability, before any warping
    finish_reason: str | None = None  # "stop" at an end token, "length" at the limit
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens likewise, likeliest first
    # Of the first token of an answer: the prompt's from the second on, where they are scored.
    prompt: tuple["Token", ...] = ()

    def ending(self, reason: str | None) -> "Token":
        """Return the token with why its request ends."""
        return self if reason is None else self._replace(finish_reason=reason)


@dataclass
class Completion:
    """All tokens that a request generated, an end token included.

    Args:
        ids: of the tokens.
        logprobs: of each.
        finish_reason: as of :class:`Token`; None until it is finished.
        tops: the likeliest tokens at each, where asked for.
        prompt: the prompt's tokens from the second on with their scores, where asked for.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    prompt: tuple[Token, ...] = ()

    def append(self, token: Token) -> None:
        """Add the next token."""
        self.ids.append(token.token_id)
        self.logprobs.append(token.logprob)
        self.tops.append(token.top)
        self.finish_reason = token.finish_reason
        self.prompt += token.prompt
