"""Bodies of ``/v1/responses``. Names and meanings: OpenAI's API reference, Responses.

This server stores nothing, so that what hangs on earlier responses is refused; and it has the tools
that the request brings, not the provider's own.
"""

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from llm.serving.bodies import Count, Neutral, RequestBody, TopP, fault
from llm.serving.openai.schema import TopLogprobs

LOGPROBS: Final = "message.output_text.logprobs"
_STORED = "this server stores no responses; send the whole conversation as input"


def _stateless(value: Any) -> Any:
    if value is None:
        return value
    raise PydanticCustomError("unsupported_value", _STORED)


def _not_stored(value: Any) -> Any:
    if value in (None, False):
        return value
    raise PydanticCustomError(
        "unsupported_value",
        "this server stores no responses; send store: false, or leave it out",
    )


def _now(value: Any) -> Any:
    if value in (None, False):
        return value
    raise PydanticCustomError(
        "unsupported_value",
        "this server answers at once and stores nothing to be fetched later; send stream: true to "
        "see the answer as it grows",
    )


Stateless = Annotated[Any, PlainValidator(_stateless)]


class TextPart(RequestBody):
    """A piece of text: of the caller, or of an earlier answer."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[Any, Neutral([])] = None
    logprobs: Any = None


def _as_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "input_text", "text": value}]
    for part in value if isinstance(value, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, dict) and kind not in ("input_text", "output_text", "text"):
            raise PydanticCustomError(
                "content_part",
                "has a part of type {kind}, but this model reads text only",
                {"kind": repr(kind)},
            )
    return value


Parts = Annotated[list[TextPart], BeforeValidator(_as_parts)]


class _Item(RequestBody):
    id: Any = None  # of whoever stored it
    status: Annotated[Any, Neutral("completed", "incomplete", "in_progress")] = None


class MessageItem(_Item):
    """A turn of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts
    phase: Annotated[Any, Neutral()] = None


class CallItem(_Item):
    """A call that the assistant has made; ``arguments`` is a JSON object as text."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    namespace: Annotated[Any, Neutral()] = None
    caller: Annotated[Any, Neutral()] = None


class OutputItem(_Item):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: Parts
    caller: Annotated[Any, Neutral()] = None


_ITEMS = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": OutputItem,
}


def _as_item(value: Any) -> Any:
    kind = value.get("type", "message") if isinstance(value, dict) else None
    if kind == "item_reference":
        raise PydanticCustomError("unsupported_value", _STORED)
    if not isinstance(kind, str) or kind not in _ITEMS:
        raise PydanticCustomError(
            "input",
            "has the type {kind}, but items here are {known}",
            {"kind": repr(kind), "known": ", ".join(_ITEMS)},
        )
    return _ITEMS[kind].model_validate(value)


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Item = Annotated[MessageItem | CallItem | OutputItem, PlainValidator(_as_item)]


class FunctionTool(RequestBody):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Annotated[Any, Neutral(False)] = None


def _as_tool(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "custom":
        raise PydanticCustomError(
            "unsupported_value",
            "is a tool of type 'custom', whose input is free text; send one of type function with "
            "a parameter for it",
        )
    if kind != "function":
        raise PydanticCustomError(
            "unsupported_value",
            "is a tool of type {kind}, which the provider runs; this server has tools of type "
            "function, which the caller runs",
            {"kind": repr(kind)},
        )
    return FunctionTool.model_validate(value)


class NamedTool(RequestBody):
    """``tool_choice`` that asks for one function."""

    type: Literal["function"]
    name: str


class AllowedTools(RequestBody):
    """``tool_choice`` that allows some of the functions."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class TextFormat(RequestBody):
    """``text.format``: what the answer obeys."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _a_schema_where_it_belongs(self) -> "TextFormat":
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise PydanticCustomError(
                "schema", 'has to have a schema where its type is "json_schema", and only there'
            )
        return self


class TextOptions(RequestBody):
    """``text``: the form of the answer."""

    format: TextFormat | None = None
    verbosity: Annotated[Any, Neutral("medium")] = None


class StreamOptions(RequestBody):
    """``stream_options``, of which none has an effect."""

    include_obfuscation: Annotated[Any, Neutral(False)] = None


class Reasoning(RequestBody):
    """``reasoning``: the model does not think apart from its answers."""

    effort: Annotated[Any, Neutral("none")] = None
    summary: Annotated[Any, Neutral("auto")] = None
    generate_summary: Annotated[Any, Neutral("auto")] = None
    context: Any = None


class CountRequest(RequestBody):
    """Body of ``POST /v1/responses/input_tokens``: what a prompt is made of."""

    model: str | None = None
    input: Annotated[list[Item], Field(min_length=1, max_length=4096), BeforeValidator(_as_items)]
    instructions: str | None = None
    tools: list[Annotated[FunctionTool, PlainValidator(_as_tool)]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    previous_response_id: Stateless = None
    conversation: Stateless = None
    reasoning: Reasoning | None = None
    truncation: Annotated[Any, Neutral("disabled")] = None


class ResponsesRequest(CountRequest):
    """Body of ``POST /v1/responses``."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: Count = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: TopP = None
    metadata: dict[str, str] | None = None

    store: Annotated[Any, PlainValidator(_not_stored)] = None
    background: Annotated[Any, PlainValidator(_now)] = None
    prompt: Stateless = None
    # Of the thoughts that answers never have: asking for them changes nothing.
    include: list[Literal["reasoning.encrypted_content", LOGPROBS]] | None = None
    top_logprobs: TopLogprobs = None
    max_tool_calls: Count = None  # of the provider's own tools
    context_management: Annotated[Any, Neutral([])] = None
    service_tier: Annotated[Any, Neutral("auto", "default")] = None
    # The provider's bookkeeping.
    user: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None

    @property
    def logprobs(self) -> int | None:
        """How many alternatives to each token are told; None where nothing is of any."""
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None

    @model_validator(mode="after")
    def _scores_of_texts_alone(self) -> "ResponsesRequest":
        if self.top_logprobs and self.logprobs is None:
            raise fault(
                "top_logprobs",
                f'only goes with include: ["{LOGPROBS}"]; send both',
                self.top_logprobs,
            )
        if self.logprobs is not None and self.tools and self.tool_choice != "none":
            raise fault(
                "include",
                f'{LOGPROBS} has no place where tools may be called; send tool_choice: "none", or '
                "leave one of them out",
                self.include,
            )
        return self
