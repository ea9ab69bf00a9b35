"""Grammars that hold calls of tools to their functions' schemas, in the syntax of each parser.

Where a call is needed the answer is one; where it may be, text is free until a call begins: a lazy
lexeme of llguidance ends with a call's first characters, and what follows is held.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from common.errors import UserError
from llm.engine.request import GrammarSpec
from llm.serving.errors import ApiError
from llm.serving.structured import Constraint
from llm.serving.tools.parsers import PYTHON_TAG
from llm.serving.tools.schema import Function

# What may be a control token of the vocabulary.
MARKS = (PYTHON_TAG, "<tool_call>", "</tool_call>")
_FREE = r"FREE: /(.|\n)*/"
_LINE = "\n"
_NAME = '{"name": "'


def tool_grammar(
    parser: str,
    tools: Mapping[int, Function],
    *,
    needed: bool,
    several: bool,
    otherwise: Constraint | None,
    control: frozenset[str],
) -> GrammarSpec:
    """Return what answers obey that may call tools.

    Args:
        parser: name in ``llm.serving.tools.parsers.PARSERS``.
        tools: functions that may be called, by their number in the request.
        needed: the answer has to be a call.
        several: it may be more than one.
        otherwise: what an answer without a call obeys, where not everything goes.
        control: those of ``MARKS`` that are control tokens.

    Raises:
        ApiError: 400, a schema that cannot be followed.
    """
    schemas = {
        number: _followable(tool, number, strict=needed or bool(tool.strict))
        for number, tool in tools.items()
    }
    if parser == "pythonic":
        rules = [rule for number, one in schemas.items() for rule in _keywords(number, one)]
    else:
        rules = [f"args_{number}: {_json(schema)}" for number, schema in schemas.items()]
    if not needed:
        rules.append(_FREE)
    named = {number: tool.name for number, tool in tools.items()}
    if parser == "hermes":
        rules += _hermes(named, needed, several, otherwise, control)
    else:
        if otherwise is not None:
            raise ApiError(
                f"{otherwise.param} and the calls of this model begin alike, so an answer cannot "
                'be held to both; send tool_choice: "none", or leave one of them out',
                param=otherwise.param,
                code="unsupported_value",
            )
        write = _pythonic if parser == "pythonic" else _llama
        rules += write(named, needed, several, f"{PYTHON_TAG}?" if PYTHON_TAG in control else "")
    return GrammarSpec("lark", "%llguidance {}\n" + "\n".join(rules) + "\n")


def _followable(tool: Function, number: int, *, strict: bool) -> dict[str, Any]:
    """Return the schema of a function's arguments; any object's, where that may be and has to."""
    from llm.engine.grammar import check  # loads llguidance

    try:
        check("json_schema", tool.schema)
    except UserError as error:
        if not strict:
            return {"type": "object"}
        param = f"tools.{number}.function.parameters"
        raise ApiError(
            f"{param}: {error}; without strict, and with tool_choice auto, it would not be held",
            param=param,
            code="invalid_grammar",
        ) from error
    return tool.schema


def _json(schema: Any) -> str:
    from llm.engine.grammar import JSON_OPTIONS

    return "%json " + json.dumps({**schema, "x-guidance": JSON_OPTIONS})


def _hermes(
    names: Mapping[int, str],
    needed: bool,
    several: bool,
    otherwise: Constraint | None,
    control: frozenset[str],
) -> Iterator[str]:
    """Yield the rules of calls between marks, and of text around them."""
    opening, closing = (
        mark if mark in control else json.dumps(mark) for mark in ("<tool_call>", "</tool_call>")
    )
    bodies = _either(
        json.dumps(f'{name}", "arguments": ') + f" args_{n}" for n, name in names.items()
    )
    closed = f'"}}\\n" {closing}'
    yield f"body: {json.dumps(_LINE + _NAME)} {bodies} {closed}"
    lazy = not needed and otherwise is None and opening not in control
    if lazy:
        yield f"begun[lazy]: FREE {opening}"
    yield f"call: {'begun' if lazy else opening} body"
    more = '("\\n"? call)*' if several else ""
    if needed:
        yield f"start: call {more}"
    elif otherwise is not None:
        yield f"start: call {more} | other"
        yield f"other: {_other(otherwise)}"
    elif lazy:
        yield f"start: {'call* FREE' if several else 'call | FREE'}"
    else:
        yield f"start: FREE (call FREE){'*' if several else '?'}"


def _other(constraint: Constraint) -> str:
    """Return a rule's body for an answer that is no call."""
    kind, source = constraint.spec
    if kind == "json_object":
        return _json({"type": "object"})
    if kind == "json_schema":
        return _json(json.loads(str(source)))
    if kind == "choice":
        return _either(map(json.dumps, source))
    raise ApiError(
        f"{constraint.param} does not go with tools, as JSON and choices do; send tool_choice: "
        '"none", or leave one of them out',
        param=constraint.param,
        code="unsupported_value",
    )


def _llama(names: Mapping[int, str], needed: bool, several: bool, tag: str) -> Iterator[str]:
    """Yield the rules of an answer that is JSON objects, or text that begins otherwise."""
    bodies = _either(
        json.dumps(f'{name}", "parameters": ') + f" args_{n}" for n, name in names.items()
    )
    yield f'body: {bodies} "}}"'
    yield f"call: {json.dumps(_NAME)} body"
    more = '("; " call)*' if several else ""
    if needed:
        yield f"start: {tag} call {more}"
        return
    yield r'begun[lazy]: /\s*\{ ?"name" ?: ?"/'
    yield f"start: {tag} begun body {more} | FREE"


def _pythonic(names: Mapping[int, str], needed: bool, several: bool, tag: str) -> Iterator[str]:
    """Yield the rules of an answer that is a list of calls, or text that begins otherwise."""
    yield "call: " + _either(json.dumps(f"{name}(") + f" keywords_{n}" for n, name in names.items())
    more = '(", " call)*' if several else ""
    if needed:
        yield f'start: {tag} "[" call {more} "]"'
        return
    for number, name in names.items():
        yield f"begun_{number}[lazy]: /\\s*\\[{name.replace('.', '[.]')}\\(/"
    yield "first: " + _either(f"begun_{number} keywords_{number}" for number in names)
    yield f'start: {tag} first {more} "]" | FREE'


def _keywords(number: int, schema: dict[str, Any]) -> Iterator[str]:
    """Yield the rules of a function's keywords, in the order of its schema, up to the bracket."""
    properties, needed = schema.get("properties") or {}, schema.get("required", ())
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    for name in properties:
        if not name.isidentifier():
            raise ApiError(
                f"tools.{number}.function.parameters has the property {name!r}, which calls in "
                "Python's syntax (--tool_call_parser pythonic) cannot name; rename it",
                param=f"tools.{number}.function.parameters",
                code="unsupported_value",
            )
    # Rule "n" stands before property n where none has come yet, "n_more" where some have.
    for place, (name, value) in enumerate(properties.items()):
        yield f"value_{number}_{place}: {_json({**_as_object(value), **shared})}"
        for before, behind in (("", ""), (", ", "_more")):
            key = json.dumps(f"{before}{name}=")
            taken = f"{key} value_{number}_{place} k_{number}_{place + 1}_more"
            left_out = "" if name in needed else f" | k_{number}_{place + 1}{behind}"
            yield f"k_{number}_{place}{behind}: {taken}{left_out}"
    for behind in ("", "_more"):
        yield f'k_{number}_{len(properties)}{behind}: ")"'
    yield f"keywords_{number}: k_{number}_0"


def _as_object(schema: Any) -> dict[str, Any]:
    """Return a schema that may be true or false as an object."""
    return schema if isinstance(schema, dict) else ({} if schema else {"not": {}})


def _either(rules: Iterable[str]) -> str:
    return "(" + " | ".join(rules) + ")"
