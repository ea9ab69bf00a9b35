"""Bodies of OpenAI's chat and completions routes."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from llm.serving.bodies import (
    MAX_CHOICES,
    MAX_STOPS,
    Count,
    MinP,
    Neutral,
    PresencePenalty,
    Priority,
    RepetitionPenalty,
    RequestBody,
    Seed,
    StopList,
    TopP,
    TypicalP,
    Whole,
    as_whole,
)
from llm.serving.openai.messages import Message
from llm.serving.structured import ConstrainedBody
from llm.serving.tools.schema import ToolChoice, Tools

MAX_TOP_LOGPROBS = 20  # OpenAI's limit in chats
MAX_BIASES = 1024
MAX_BAD_WORDS = 128
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")

TopLogprobs = Annotated[Whole | None, Field(ge=0, le=MAX_TOP_LOGPROBS)]
BadWords = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]] | None,
    Field(max_length=MAX_BAD_WORDS),
]


def _by_token_id(value: dict[str, float] | None) -> dict[str, float] | None:
    wrong = next((key for key in value or () if not _TOKEN_ID.fullmatch(key)), None)
    if wrong is not None:
        raise PydanticCustomError(
            "logit_bias", "has the key {key}, which is no token id", {"key": f"{wrong!r:.40}"}
        )
    return value


LogitBias = Annotated[
    Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)]
    | None,
    AfterValidator(_by_token_id),
]


class StreamOptions(RequestBody):
    """``stream_options``: whether the stream ends with a chunk that carries the usage.

    ``continuous_usage_stats`` (vLLM): all chunks carry what it has come to.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[Any, Neutral(False)] = None


class _OpenAIBody(ConstrainedBody):
    """What both OpenAI routes share; what OpenAI's API lacks has vLLM's names."""

    takes_off = True

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: TopP = None
    n: Whole | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: StopList = None
    seed: Seed = None
    frequency_penalty: PresencePenalty = None
    presence_penalty: PresencePenalty = None
    logit_bias: LogitBias = None

    top_k: Whole | None = Field(default=None, ge=-1)
    min_p: MinP = None
    typical_p: TypicalP = None
    repetition_penalty: RepetitionPenalty = None
    bad_words: BadWords = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Whole] | None = Field(default=None, max_length=MAX_STOPS)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: TopLogprobs = None
    return_tokens_as_token_ids: bool | None = None
    priority: Priority = None

    @model_validator(mode="after")
    def _prompt_logprobs_need_the_whole(self) -> "_OpenAIBody":
        if self.prompt_logprobs is not None and self.stream:
            raise PydanticCustomError(
                "prompt_logprobs",
                "prompt_logprobs have no place in a stream; drop stream, or use echo with logprobs "
                "(/v1/completions)",
            )
        return self

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "_OpenAIBody":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options", "stream_options only goes with stream: true"
            )
        return self


class ChatRequest(_OpenAIBody):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_completion_tokens: Count = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise PydanticCustomError(
                "max_tokens",
                "max_tokens={old} and max_completion_tokens={new} contradict each other; send one",
                {"old": old, "new": new},
            )
        return self

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError(
                "top_logprobs", "top_logprobs only goes with logprobs: true; send both"
            )
        return self

    @model_validator(mode="after")
    def _how_the_answer_begins(self) -> "ChatRequest":
        if not self.continue_final_message:
            return self
        if self.add_generation_prompt:
            raise PydanticCustomError(
                "add_generation_prompt",
                "add_generation_prompt begins a new message, continue_final_message goes on with "
                "the last one; send one of them",
            )
        last = self.messages[-1]
        if last.role != "assistant" or not last.text or last.tool_calls:
            raise PydanticCustomError(
                "continue_final_message",
                "continue_final_message needs a last message of the assistant with a text and "
                "without tool_calls",
            )
        return self


def _as_ids(value: Any) -> list[int] | None:
    """Return a list of token ids, if it is one that is not empty."""
    if not isinstance(value, list) or not value:
        return None
    ids = value if all(type(one) is int for one in value) else list(map(as_whole, value))
    return ids if all(type(one) is int for one in ids) else None


def _as_prompt_list(value: Any) -> Any:
    """Bring the four shapes of ``prompt`` to a list of strings or of id lists."""
    ids = _as_ids(value)
    given = [ids or value] if isinstance(value, str) or ids else value
    if not isinstance(given, list) or not given:
        raise PydanticCustomError(
            "prompt",
            "has to be a string, a list of strings, a list of token ids, or a list of "
            "lists of token ids, and not empty",
        )
    if len(given) > MAX_CHOICES:
        raise PydanticCustomError(
            "prompt",
            "has {count} prompts, but the limit is {limit}; send several requests",
            {"count": len(given), "limit": MAX_CHOICES},
        )
    prompts = [one if isinstance(one, str) else _as_ids(one) for one in given]
    if None in prompts:
        raise PydanticCustomError(
            "prompt",
            "item {position} is neither a string nor a list of token ids that is not empty",
            {"position": prompts.index(None)},
        )
    return prompts


class CompletionRequest(_OpenAIBody):
    """Body of ``POST /v1/completions``."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_as_prompt_list)]
    # 0 computes the prompt alone, for its scores or to have it in the cache.
    max_tokens: Annotated[Whole | None, Field(ge=0)] = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    logprobs: TopLogprobs = None
    best_of: Count = None

    @model_validator(mode="after")
    def _combinations(self) -> "CompletionRequest":
        n = self.n or 1
        several = self.best_of or n
        if several < n or (several > n and self.stream):
            why = (
                "are kept; raise it"
                if several < n
                else "are known when all have ended, not in a stream; drop stream"
            )
            raise PydanticCustomError(
                "best_of",
                "best_of={best_of}, but the best n={n} of them {why}, or leave best_of out",
                {"best_of": several, "n": n, "why": why},
            )
        if len(self.prompt) * several > MAX_CHOICES:
            name = "n" if several == n else "best_of"
            raise PydanticCustomError(
                name,
                "{prompts} prompts times {name}={n} make more choices than the limit of {limit}",
                {"prompts": len(self.prompt), "name": name, "n": several, "limit": MAX_CHOICES},
            )
        return self
