"""Fields about tools: what there is, which have to be called, and calls of earlier turns."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator, field_validator
from pydantic_core import PydanticCustomError

from common.errors import UserError
from llm.serving.bodies import Neutral, RequestBody, is_deeper
from llm.serving.structured import MAX_GRAMMAR_BYTES, MAX_SCHEMA_DEPTH, check_depth

MAX_TOOLS = 128
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(RequestBody):
    """A function that the model may call; ``parameters`` is the JSON schema of its arguments.

    Left out, there are none: https://platform.openai.com/docs/api-reference/chat/create
    """

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value and value.get("type", "object") != "object":
            raise PydanticCustomError(
                "parameters", 'has to be the schema of an object: {"type": "object", ...}'
            )
        return value

    @property
    def schema(self) -> dict[str, Any]:
        """Of the arguments."""
        if self.parameters is None:
            return {**_NO_ARGUMENTS, "additionalProperties": False}
        return {**_NO_ARGUMENTS, **self.parameters}


class Tool(RequestBody):
    """One of ``tools``."""

    type: Literal["function"]
    function: Function

    def as_template_tool(self) -> dict[str, Any]:
        """Return the tool as chat templates expect it: many read its properties unasked."""
        found = self.model_dump(exclude_none=True)
        given = found["function"].get("parameters", {})
        found["function"]["parameters"] = given | {
            key: value for key, value in _NO_ARGUMENTS.items() if key not in given
        }
        return found


def _together(tools: list[Tool] | None) -> list[Tool] | None:
    """Check what no tool can be checked for alone."""
    if not tools:
        return None
    names = [tool.function.name for tool in tools]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PydanticCustomError(
            "tools", "has two tools called {name}; rename one", {"name": repr(twice[0])}
        )
    schemas = [tool.function.schema for tool in tools]
    size = len(json.dumps(schemas, ensure_ascii=False))
    if size > MAX_GRAMMAR_BYTES:
        raise PydanticCustomError(
            "tools",
            "has parameters of {size} characters, but the limit is {limit}; send fewer tools",
            {"size": size, "limit": MAX_GRAMMAR_BYTES},
        )
    try:
        check_depth(schemas, MAX_SCHEMA_DEPTH + 1)
    except UserError as error:
        raise PydanticCustomError("tools", "{why}", {"why": str(error)}) from error
    return tools


class NamedFunction(RequestBody):
    """A function by its name."""

    name: str


class NamedChoice(RequestBody):
    """``tool_choice`` that asks for one function."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTool(RequestBody):
    """One of the functions that a choice allows."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(RequestBody):
    """``allowed_tools``: those among the tools that may be called, or of which one has to be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedChoice(RequestBody):
    """``tool_choice`` that allows some of the tools; the model is told of all."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


_WORDS = ("none", "auto", "required")
_CHOICES = {"function": NamedChoice, "allowed_tools": AllowedChoice}


def _as_choice(value: Any) -> Any:
    if value is None or value in _WORDS:
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind in _CHOICES:
        return _CHOICES[kind].model_validate(value)
    raise PydanticCustomError(
        "tool_choice",
        "has to be one of {words}, or {forms}",
        {
            "words": ", ".join(map(json.dumps, _WORDS)),
            "forms": '{"type": "function", "function": {"name": ...}} or {"type": "allowed_tools", '
            '"allowed_tools": {"mode": "auto" or "required", "tools": [...]}}',
        },
    )


Tools = Annotated[
    Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None, AfterValidator(_together)
]
ToolChoice = Annotated[str | NamedChoice | AllowedChoice | None, PlainValidator(_as_choice)]


class CalledFunction(RequestBody):
    """What an earlier answer has called; ``arguments`` is a JSON object as text."""

    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _an_object(cls, value: str) -> str:
        try:
            found = json.loads(value or "{}")
        except (ValueError, RecursionError) as error:
            raise PydanticCustomError(
                "arguments", "is no JSON: {why}", {"why": str(error)}
            ) from error
        if not isinstance(found, dict):
            raise PydanticCustomError("arguments", "has to be a JSON object as text")
        if is_deeper(found, MAX_SCHEMA_DEPTH):
            raise PydanticCustomError(
                "arguments",
                "has objects and lists more than {levels} deep in each other; flatten them",
                {"levels": MAX_SCHEMA_DEPTH},
            )
        return value or "{}"


class ToolCall(RequestBody):
    """A call of an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Annotated[Any, Neutral(*range(MAX_TOOLS))] = None  # of who joined a stream's chunks

    def as_template_call(self) -> dict[str, Any]:
        """Return the call as chat templates expect it: the arguments as an object."""
        arguments = json.loads(self.function.arguments)
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}
