"""What holds an answer to a form: ``response_format``, ``guided_*`` and ``structured_outputs``.

OpenAI's field, vLLM's older ones and vLLM's newer one say the same in different words; each becomes
a :class:`llm.engine.request.GrammarSpec`, which the engine compiles.
"""

import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from common.errors import UserError
from llm.engine.request import GrammarSpec
from llm.serving.bodies import Neutral, RequestBody, is_deeper, read_json
from llm.serving.errors import ApiError

MAX_GRAMMAR_BYTES = 64 << 10  # of a schema or another grammar; such a one compiles in 0.2 s
MAX_SCHEMA_DEPTH = 60  # objects and lists within each other; llguidance reads some 128
MAX_CONSTRAINT_CHOICES = 1024

Choices = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(min_length=1, max_length=MAX_CONSTRAINT_CHOICES),
]


class Constraint(NamedTuple):
    """A grammar, and what the request calls it."""

    param: str
    spec: GrammarSpec


class JsonSchemaFormat(RequestBody):
    """``json_schema`` of a ``response_format``; answers obey it whether it is strict or not."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestBody):
    """``response_format`` of OpenAI's API; ``schema`` beside ``json_object`` is llama.cpp's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _what_belongs_to_the_type(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "response_format", 'type "json_schema" and the field json_schema go together'
            )
        if self.schema_ is not None and self.type != "json_object":
            raise PydanticCustomError(
                "response_format",
                'schema goes with type "json_object"; json_schema has a schema of its own',
            )
        return self

    def constraint(self) -> Constraint | None:
        """Return what it asks for, if anything."""
        if self.type == "text":
            return None
        param, schema = "response_format.schema", self.schema_
        if self.json_schema is not None:
            param, schema = "response_format.json_schema.schema", self.json_schema.schema_
        if schema is None:
            return Constraint("response_format", GrammarSpec("json_object"))
        return Constraint(param, GrammarSpec("json_schema", _as_source(schema)))


class StructuredOutputs(RequestBody):
    """``structured_outputs`` of vLLM."""

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Annotated[Any, Neutral()] = None
    disable_fallback: Annotated[Any, Neutral(True, False)] = None
    disable_any_whitespace: Annotated[Any, Neutral(False)] = None
    disable_additional_properties: Annotated[Any, Neutral(False)] = None
    whitespace_pattern: Annotated[Any, Neutral()] = None

    def constraints(self) -> list[Constraint]:
        """Return what it asks for."""
        found = _named("structured_outputs.", self.json_, self.regex, self.choice, self.grammar)
        if self.json_object:
            found.append(Constraint("structured_outputs.json_object", GrammarSpec("json_object")))
        return found


class ConstrainedBody(RequestBody):
    """A body with the fields that hold an answer to a form, of which one may be used."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None

    def constraint(self) -> Constraint | None:
        """Return what holds the answer to a form, if anything does.

        Raises:
            ApiError: 400, several do; or the grammar is too large, too deep, or none.
        """
        found = _named(
            "guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar
        )
        if self.structured_outputs is not None:
            found += self.structured_outputs.constraints()
        if self.response_format is not None and (one := self.response_format.constraint()):
            found.append(one)
        if len(found) > 1:
            raise ApiError(
                f"{found[0].param} and {found[1].param} each hold the answer to a form; send one "
                "of them",
                param=found[1].param,
                code="invalid_value",
            )
        for one in found:
            check_constraint(one)
        return found[0] if found else None


def _named(
    prefix: str,
    schema: str | dict[str, Any] | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
) -> list[Constraint]:
    given = (
        ("json", "json_schema", schema),
        ("regex", "regex", regex),
        ("choice", "choice", choice),
        ("grammar", "gbnf", grammar),
    )
    return [
        Constraint(f"{prefix}{name}", GrammarSpec(kind, _as_source(value)))
        for name, kind, value in given
        if value is not None
    ]


def _as_source(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, list):
        return tuple(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def check_constraint(constraint: Constraint) -> None:
    """Refuse a grammar that no answer could follow, before the request waits in line.

    Raises:
        ApiError: 400; ``param`` is what the request calls it.
    """
    from llm.engine.grammar import check  # loads llguidance

    param, (kind, source) = constraint
    size = len(source) if isinstance(source, str) else sum(map(len, source))
    try:
        if size > MAX_GRAMMAR_BYTES:
            raise UserError(
                f"it has {size} characters, but the limit is {MAX_GRAMMAR_BYTES}; send less"
            )
        if kind == "json_schema":
            check_depth(read_json(str(source)))
        check(kind, source)
    except (UserError, ValueError) as error:
        raise ApiError(f"{param}: {error}", param=param, code="invalid_grammar") from error


def check_depth(value: Any, levels: int = MAX_SCHEMA_DEPTH) -> None:
    """Refuse JSON whose objects and lists lie too deep in each other.

    Raises:
        UserError: names the limit.
    """
    if is_deeper(value, levels):
        raise UserError(
            f"its objects and lists lie more than {MAX_SCHEMA_DEPTH} deep in each other; move "
            "inner parts to $defs"
        )
