"""Messages of a conversation, as OpenAI's chat route takes them."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from llm.serving.bodies import Neutral, RequestBody, fault
from llm.serving.tools.schema import ToolCall

_CONTENT = 'has to be a string or a list of {"type": "text", ...}'


class TextPart(RequestBody):
    """One part of a message's content; only text."""

    type: Literal["text"]
    text: str


class Message(RequestBody):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: list[TextPart] | None = None
    name: str | None = Field(default=None, min_length=1, max_length=64)
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # What OpenAI's client sends back when a program appends the answer to its list of messages.
    refusal: Annotated[Any, Neutral()] = None
    annotations: Annotated[Any, Neutral([])] = None
    audio: Annotated[Any, Neutral()] = None
    function_call: Annotated[Any, Neutral()] = None
    reasoning_content: Annotated[Any, Neutral("")] = None
    reasoning: Annotated[Any, Neutral("")] = None

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, str):
            return [{"type": "text", "text": value}]
        if not isinstance(value, list) or not value:
            raise PydanticCustomError("content", _CONTENT)
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise PydanticCustomError(
                    "content_part",
                    "has a part of type {kind}, but this model reads text only",
                    {"kind": repr(kind)},
                )
        return value

    @model_validator(mode="after")
    def _what_belongs_to_the_role(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise fault("tool_calls", "only belongs to messages of the assistant", self.role)
        if self.content is None and not self.tool_calls:
            raise fault("content", f"is missing; it {_CONTENT}, and null only with tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise fault(
                "tool_call_id",
                "belongs to every message of role tool, and to no other",
                self.tool_call_id,
            )
        return self

    @property
    def text(self) -> str | None:
        """Its content as one string, if it has any."""
        if self.content is None:
            return None
        return "".join(part.text for part in self.content)

    def as_template_message(self) -> dict[str, Any]:
        """Return the message as chat templates expect it."""
        # "developer" is OpenAI's newer word for the same role; templates know only "system".
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.text}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.as_template_call() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message
