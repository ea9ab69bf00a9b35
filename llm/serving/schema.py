"""Bodies of requests: fields, types and ranges that need no model to be checked.

Three kinds of fields: those that work; those of OpenAI's and TGI's APIs that have no effect here,
which are accepted at the value that means "off" and refused otherwise; and unknown ones, which are
refused. Nothing that would change an answer is ignored.
"""

import difflib
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from llm.config.sampling import RANGES
from llm.serving.errors import ApiError

MAX_CHOICES = 64  # prompts times n of one request
MAX_STOPS = 16
MAX_SEED = 2**63 - 1

_Body = TypeVar("_Body", bound="_RequestBody")


def Neutral(*allowed: Any) -> AfterValidator:  # noqa: N802 - reads as an annotation
    """Annotate a field that is accepted only at null and the values that change nothing."""

    def check(value: Any) -> Any:
        if value is None or value in allowed:
            return value
        raise PydanticCustomError(
            "unsupported_value",
            "is not supported by this server; leave it out or send {allowed}",
            {"allowed": " or ".join(json.dumps(a) for a in (None, *allowed))},
        )

    return AfterValidator(check)


def _as_stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopList = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]] | None,
    Field(max_length=MAX_STOPS),
    BeforeValidator(_as_stop_list),
]
Count = Annotated[int | None, Field(ge=1)]
Seed = Annotated[int | None, Field(ge=0, le=MAX_SEED)]
TopP = Annotated[float | None, Field(gt=RANGES["top_p"].least, le=RANGES["top_p"].most)]
_PENALTY = RANGES["repetition_penalty"]
RepetitionPenalty = Annotated[float | None, Field(ge=_PENALTY.least, le=_PENALTY.most)]


class _RequestBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_RequestBody):
    """``stream_options``: whether the stream ends with a chunk that carries the usage."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Neutral(False)] = None


class _OpenAIBody(_RequestBody):
    """What both OpenAI routes share. ``top_k``, ``repetition_penalty``, ``ignore_eos`` and
    ``stop_token_ids`` are extensions under vLLM's names."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: TopP = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: StopList = None
    seed: Seed = None
    top_k: int | None = Field(default=None, ge=-1)
    repetition_penalty: RepetitionPenalty = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=MAX_STOPS)

    min_p: Annotated[Any, Neutral(0)] = None
    frequency_penalty: Annotated[Any, Neutral(0)] = None
    presence_penalty: Annotated[Any, Neutral(0)] = None
    logit_bias: Annotated[Any, Neutral({})] = None
    # The provider's bookkeeping: never has an effect on the answer, so any value will do.
    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "_OpenAIBody":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options", "stream_options only goes with stream: true"
            )
        return self


class TextPart(_RequestBody):
    """One part of a message's content; only text."""

    type: Literal["text"]
    text: str


class Message(_RequestBody):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[TextPart]
    name: Annotated[Any, Neutral()] = None
    # What OpenAI's client sends back when a program appends the answer to its list of messages.
    refusal: Annotated[Any, Neutral()] = None
    annotations: Annotated[Any, Neutral([])] = None
    audio: Annotated[Any, Neutral()] = None
    tool_calls: Annotated[Any, Neutral([])] = None
    function_call: Annotated[Any, Neutral()] = None

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [{"type": "text", "text": value}]
        if not isinstance(value, list) or not value:
            raise PydanticCustomError(
                "content", 'has to be a string or a list of {"type": "text", ...}'
            )
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise PydanticCustomError(
                    "content_part",
                    "has a part of type {kind}, but this model reads text only",
                    {"kind": repr(kind)},
                )
        return value

    def as_template_message(self) -> dict[str, str]:
        """Return the message as chat templates expect it: a role and one string."""
        # "developer" is OpenAI's newer word for the same role; templates know only "system".
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text for part in self.content)}


class ChatRequest(_OpenAIBody):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_completion_tokens: Count = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Any, Neutral(0)] = None

    tools: Annotated[Any, Neutral([])] = None
    tool_choice: Annotated[Any, Neutral("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, Neutral(True, False)] = None
    functions: Annotated[Any, Neutral([])] = None
    function_call: Annotated[Any, Neutral("none", "auto")] = None
    response_format: Annotated[Any, Neutral({"type": "text"})] = None
    modalities: Annotated[Any, Neutral(["text"])] = None
    reasoning_effort: Annotated[Any, Neutral()] = None
    verbosity: Annotated[Any, Neutral("medium")] = None
    audio: Annotated[Any, Neutral()] = None
    prediction: Annotated[Any, Neutral()] = None
    web_search_options: Annotated[Any, Neutral()] = None
    service_tier: Annotated[Any, Neutral("auto", "default")] = None
    store: Annotated[Any, Neutral(False)] = None

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


def _as_prompt_list(value: Any) -> Any:
    """Bring the four shapes of ``prompt`` to a list of strings or of id lists."""
    is_ids = isinstance(value, list) and value and all(type(v) is int for v in value)
    prompts = [value] if isinstance(value, str) or is_ids else value
    if not isinstance(prompts, list) or not prompts:
        raise PydanticCustomError(
            "prompt",
            "has to be a string, a list of strings, a list of token ids, or a list of "
            "lists of token ids, and not empty",
        )
    if len(prompts) > MAX_CHOICES:
        raise PydanticCustomError(
            "prompt",
            "has {count} prompts, but the limit is {limit}; send several requests",
            {"count": len(prompts), "limit": MAX_CHOICES},
        )
    for position, prompt in enumerate(prompts):
        is_ids = isinstance(prompt, list) and prompt and all(type(v) is int for v in prompt)
        if not isinstance(prompt, str) and not is_ids:
            raise PydanticCustomError(
                "prompt",
                "item {position} is neither a string nor a list of token ids that is not empty",
                {"position": position},
            )
    return prompts


class CompletionRequest(_OpenAIBody):
    """Body of ``POST /v1/completions``."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_as_prompt_list)]
    echo: bool | None = None
    logprobs: Annotated[Any, Neutral(0)] = None
    suffix: Annotated[Any, Neutral("")] = None
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
        if self.echo and self.logprobs is not None:
            raise PydanticCustomError(
                "echo", "echo with logprobs is not supported: prompts are not scored; drop one"
            )
        if len(self.prompt) * several > MAX_CHOICES:
            name = "n" if several == n else "best_of"
            raise PydanticCustomError(
                name,
                "{prompts} prompts times {name}={n} make more choices than the limit of {limit}",
                {"prompts": len(self.prompt), "name": name, "n": several, "limit": MAX_CHOICES},
            )
        return self


class GenerateParameters(_RequestBody):
    """``parameters`` of text-generation-inference."""

    max_new_tokens: Count = None
    do_sample: bool | None = None
    temperature: float | None = Field(default=None, gt=0, le=RANGES["temperature"].most)
    top_k: int | None = Field(default=None, ge=1)
    top_p: TopP = None
    repetition_penalty: RepetitionPenalty = None
    seed: Seed = None
    stop: StopList = None
    return_full_text: bool | None = None
    details: bool | None = None
    truncate: Count = None

    best_of: Annotated[Any, Neutral(1)] = None
    decoder_input_details: Annotated[Any, Neutral(False)] = None
    frequency_penalty: Annotated[Any, Neutral(0)] = None
    grammar: Annotated[Any, Neutral()] = None
    adapter_id: Annotated[Any, Neutral()] = None
    top_n_tokens: Annotated[Any, Neutral(0)] = None
    typical_p: Annotated[Any, Neutral(1)] = None
    watermark: Annotated[Any, Neutral(False)] = None


class GenerateRequest(_RequestBody):
    """Body of ``POST /generate``."""

    inputs: str
    stream: bool | None = None
    parameters: GenerateParameters | None = None


def parse_body(kind: type[_Body], body: bytes) -> _Body:
    """Turn a request's bytes into a checked body.

    Raises:
        ApiError: 400; ``param`` names the field at fault.
    """
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        if b"\\u" in body:  # half a surrogate pair is a valid JSON escape but not a character
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ApiError(
            f"the request body is not valid JSON: {error}", code="invalid_json"
        ) from None
    if not isinstance(content, dict):
        raise ApiError(
            f"the request body has to be a JSON object, not {type(content).__name__}",
            code="invalid_json",
        )
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _as_api_error(kind, error) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _as_api_error(kind: type[BaseModel], error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    location = [str(part) for part in first["loc"]]
    param = ".".join(location) or None
    if first["type"] == "missing":
        return ApiError(f"{param} is missing; it is required", param=param, code="missing")
    if first["type"] == "extra_forbidden":
        near = _near_field(kind, location)
        hint = f"did you mean {near}?" if near else "docs/serving.md lists what there is"
        return ApiError(f"unknown field {param!r}; {hint}", param=param, code="unknown_parameter")
    if param is None:
        return ApiError(first["msg"], param=first["type"], code="invalid_value")
    code = "unsupported_value" if first["type"] == "unsupported_value" else "invalid_value"
    shown = repr(first["input"])
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    message = first["msg"][0].lower() + first["msg"][1:]
    return ApiError(f"{param}={shown}: {message}", param=param, code=code)


# Bodies within bodies, by the name of their field.
_INNER: dict[str, type[BaseModel]] = {
    "stream_options": StreamOptions,
    "messages": Message,
    "parameters": GenerateParameters,
}


def _near_field(kind: type[BaseModel], location: list[str]) -> str | None:
    """Return the field of this route that is spelled nearly so: there, or at another place."""
    here, given = location[0] if len(location) > 1 else "", location[-1]
    places = {"": kind} | {name: _INNER[name] for name in kind.model_fields if name in _INNER}
    for place in sorted(places, key=lambda name: name != here):
        known = [name for name in places[place].model_fields if (place, name) != (here, given)]
        if near := difflib.get_close_matches(given, known, n=1, cutoff=0.8):
            if place == here:
                return repr(near[0])
            return repr(f"{place}.{near[0]}") if place else f"{near[0]!r} of the body itself"
    return None
