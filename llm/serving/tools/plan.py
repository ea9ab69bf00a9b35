"""What a request's tools ask of the engine: how answers call them, and the grammar they obey."""

from typing import Protocol

from data.tokenizer import Tokenizer
from llm.engine.request import GrammarSpec
from llm.serving.errors import ApiError
from llm.serving.structured import Constraint
from llm.serving.tools.dialect import dialect_of
from llm.serving.tools.grammar import MARKS, tool_grammar
from llm.serving.tools.schema import AllowedChoice, NamedChoice, Tool
from llm.serving.tools.stream import Calls


class ToolBody(Protocol):
    """A body with the fields of tools."""

    tools: list[Tool] | None
    tool_choice: str | NamedChoice | AllowedChoice | None
    parallel_tool_calls: bool | None

    def constraint(self) -> Constraint | None:
        """Return what else holds the answer to a form."""


def plan_tools(
    body: ToolBody, tokenizer: Tokenizer, parser: str
) -> tuple[Calls | None, GrammarSpec | None]:
    """Return how answers call tools, where they may, and what they have to obey.

    Args:
        body: the request.
        tokenizer: of the model.
        parser: of calls, as the operator names it.

    Raises:
        ApiError: 400, a choice that does not go with the tools, or a schema that nothing follows.
    """
    constraint, choice = body.constraint(), body.tool_choice
    names = [tool.function.name for tool in body.tools or ()]
    named = isinstance(choice, NamedChoice)
    wanted = names
    if isinstance(choice, NamedChoice):
        wanted, choice = [choice.function.name], "required"
    elif isinstance(choice, AllowedChoice):
        wanted = [tool.function.name for tool in choice.allowed_tools.tools]
        choice = choice.allowed_tools.mode
    if missing := [name for name in wanted if name not in names]:
        raise ApiError(
            f"tool_choice names {missing[0]!r:.80}, which is not among the tools "
            f"({', '.join(names) or 'there are none'})",
            param="tool_choice",
            code="invalid_value",
        )
    if choice == "required" and not names:
        raise ApiError(
            'tool_choice="required" needs tools; send some', param="tools", code="missing"
        )
    if not body.tools or choice == "none":
        return None, None if constraint is None else constraint.spec
    if constraint is not None and choice not in (None, "auto"):
        raise ApiError(
            f"{constraint.param} and tool_choice each hold the answer to a form; send one of them",
            param="tool_choice",
            code="invalid_value",
        )
    tools = {
        number: tool.function
        for number, tool in enumerate(body.tools)
        if tool.function.name in wanted
    }
    dialect = dialect_of(tokenizer, parser).parser
    ids = tokenizer.special.ids
    marks = tuple((ids[text], text) for text in MARKS if text in ids)
    spec = tool_grammar(
        dialect,
        tools,
        needed=choice not in (None, "auto"),
        several=body.parallel_tool_calls is not False and not named,
        otherwise=constraint,
        control=frozenset(text for _, text in marks),
    )
    return Calls(dialect, tuple(tool.name for tool in tools.values()), marks), spec
