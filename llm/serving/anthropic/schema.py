"""Bodies of ``/v1/messages`` and ``/v1/messages/count_tokens``.

Names and meanings: Anthropic's API reference, Messages. The model reads text, calls tools and reads
what these gave.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from llm.serving.bodies import MAX_STOPS, Count, Neutral, RequestBody, TopP, Whole

_TEXT_BLOCKS = ("text",)
_USER_BLOCKS = ("text", "tool_result")
_ASSISTANT_BLOCKS = ("text", "tool_use")
_UNREADABLE = {
    "image": "the model reads text only; send what it shows as text",
    "document": "the model reads text only; send its text",
    "thinking": "the model does not think apart from its answers; leave the block out",
    "redacted_thinking": "the model does not think apart from its answers; leave the block out",
}


def _blocks(*kinds: str) -> BeforeValidator:
    """Bring a text to a list of one block, and say which kinds of blocks there are."""

    def check(value: Any) -> Any:
        if isinstance(value, str):
            return [{"type": "text", "text": value}]
        for block in value if isinstance(value, list) else ():
            kind = block.get("type") if isinstance(block, dict) else None
            if isinstance(block, dict) and kind not in kinds:
                why = _UNREADABLE.get(str(kind), f"blocks here are {' or '.join(kinds)}")
                raise PydanticCustomError(
                    "content", "has a block of type {kind}: {why}", {"kind": repr(kind), "why": why}
                )
        return value

    return BeforeValidator(check)


class _Block(RequestBody):
    # Beginnings of prompts are always cached; the answer is the same.
    cache_control: Any = None


class TextBlock(_Block):
    """A piece of text."""

    type: Literal["text"]
    text: str
    citations: Annotated[Any, Neutral([])] = None


class ToolUseBlock(_Block):
    """A call that the assistant has made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: Annotated[Any, Neutral({"type": "direct"})] = None  # as answers of newer servers say


class ToolResultBlock(_Block):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[list[TextBlock] | None, _blocks(*_TEXT_BLOCKS)] = None
    is_error: bool | None = None


_Kind = Field(discriminator="type")


class UserMessage(RequestBody):
    """A turn of the user."""

    role: Literal["user"]
    content: Annotated[
        Annotated[list[Annotated[TextBlock | ToolResultBlock, _Kind]], Field(min_length=1)],
        _blocks(*_USER_BLOCKS),
    ]


class SystemMessage(RequestBody):
    """What the operator says amid the conversation."""

    role: Literal["system"]
    content: Annotated[Annotated[list[TextBlock], Field(min_length=1)], _blocks(*_TEXT_BLOCKS)]


class AssistantMessage(RequestBody):
    """A turn of the assistant; as the last one, the beginning of the answer, if there is text."""

    role: Literal["assistant"]
    content: Annotated[
        list[Annotated[TextBlock | ToolUseBlock, _Kind]], _blocks(*_ASSISTANT_BLOCKS)
    ]


class Tool(RequestBody):
    """A function that the model may call; ``input_schema`` is the JSON schema of its input."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: Any = None
    input_examples: Annotated[Any, Neutral([])] = None
    eager_input_streaming: bool | None = None  # input is streamed as it grows in any case
    defer_loading: Annotated[Any, Neutral(False)] = None
    allowed_callers: Annotated[Any, Neutral(["direct"])] = None


class ToolChoice(RequestBody):
    """``any`` is one of the tools, ``tool`` the named one."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(RequestBody):
    """A JSON schema that the answer obeys."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(RequestBody):
    """``output_config``: the form of the answer."""

    format: OutputFormat | None = None
    effort: Annotated[Any, Neutral()] = None


class CountRequest(RequestBody):
    """Body of ``POST /v1/messages/count_tokens``: what a prompt is made of."""

    model: str
    messages: list[
        Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]
    ] = Field(min_length=1, max_length=100_000)
    system: Annotated[list[TextBlock] | None, _blocks(*_TEXT_BLOCKS)] = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # its place in an earlier version
    thinking: Annotated[Any, Neutral({"type": "disabled"})] = None
    cache_control: Any = None
    context_management: Annotated[Any, Neutral({}, {"edits": []})] = None
    mcp_servers: Annotated[Any, Neutral([])] = None
    speed: Annotated[Any, Neutral("standard")] = None
    thread: Any = None  # see llm.serving.anthropic.plan
    # The provider's bookkeeping.
    user_profile_id: Any = None
    workspace_id: Any = None


class MessagesRequest(CountRequest):
    """Body of ``POST /v1/messages``."""

    max_tokens: Annotated[Whole, Field(ge=1)]
    stream: bool | None = None
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=256)]] | None = Field(
        default=None, max_length=MAX_STOPS
    )
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_k: Count = None
    top_p: TopP = None
    # More of the provider's bookkeeping.
    metadata: Any = None
    diagnostics: Any = None
    service_tier: Annotated[Any, Neutral("auto", "standard_only")] = None
    inference_geo: Annotated[Any, Neutral()] = None
    container: Annotated[Any, Neutral()] = None
