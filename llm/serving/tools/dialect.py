"""How a model is told of tools and writes calls: by its chat template, or in words of our own.

A template that has no place for tools, calls or results would drop them without a word. What it has
a place for is tried once, with a tool, a call and a result that nobody would write by chance.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from common.errors import UserError
from data.tokenizer import Tokenizer
from llm.serving.tools.parsers import PYTHON_TAG

Message = dict[str, Any]
AUTO = "auto"

_MARK = "zq7tool"
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": _MARK,
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    },
}
_PROBE_CALL = {
    "id": "call00000",
    "type": "function",
    "function": {"name": _MARK, "arguments": {"a": "b"}},
}
_ASK: Message = {"role": "user", "content": "x"}
_CALLS: Message = {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]}
_RESULT: Message = {"role": "tool", "content": _MARK, "tool_call_id": "call00000", "name": "f"}


@dataclass(frozen=True)
class Dialect:
    """How one model's calls are written.

    Args:
        parser: name in ``PARSERS``.
        takes_tools: the template tells of tools itself.
        takes_calls: it writes the calls of earlier answers.
        takes_results: it has a place for messages of tools.
        takes_null: it writes nothing for content that is null.
    """

    parser: str
    takes_tools: bool
    takes_calls: bool
    takes_results: bool
    takes_null: bool = True


@lru_cache(maxsize=8)
def dialect_of(tokenizer: Tokenizer, parser: str = AUTO) -> Dialect:
    """Return how a model is told of tools and writes calls.

    Args:
        tokenizer: with a chat template.
        parser: name in ``PARSERS``; the one that fits the template where it is "auto".
    """
    try:
        template = tokenizer.require_template(tools=True)
    except UserError:
        template = ""
    name = parser if parser != AUTO else _fitting(template)

    def shows(*messages: Message, tools: list[dict[str, Any]] | None = None) -> bool:
        try:
            return _MARK in tokenizer.render_chat(messages, tools=tools)
        except UserError:
            return False

    calls = shows(_ASK, _CALLS)
    before = _CALLS if calls else {"role": "assistant", "content": "y"}
    null = {**_CALLS, "content": None}
    return Dialect(
        name,
        takes_tools=shows(_ASK, tools=[_PROBE_TOOL]),
        takes_calls=calls,
        takes_results=shows(_ASK, before, _RESULT),
        takes_null=shows(_ASK, null) and "None" not in tokenizer.render_chat([_ASK, null]),
    )


def _fitting(template: str) -> str:
    """Return the parser for what a template writes."""
    if "<tool_call>" in template:
        return "hermes"
    if PYTHON_TAG in template or "<|start_header_id|>" in template:
        return "llama3_json"
    return "hermes"


def with_tools(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]], dialect: Dialect
) -> tuple[list[Message], dict[str, Any]]:
    """Return the messages and variables of a template that tell the model all there is.

    Args:
        messages: as templates take them.
        tools: that may be called now.
        dialect: of the model.
    """
    found = _with_names(messages)
    if not dialect.takes_null:
        found = [{**message, "content": message["content"] or ""} for message in found]
    if not dialect.takes_calls:
        found = [_calls_as_text(message, dialect.parser) for message in found]
    if not dialect.takes_results:
        found = _results_as_users(found)
    if not tools:
        return found, {}
    if dialect.takes_tools:
        return found, {"tools": list(tools)}
    told = _instructions(tools, dialect.parser)
    if found and found[0]["role"] == "system":
        first = {**found[0], "content": f"{found[0]['content']}\n\n{told}"}
        return [first, *found[1:]], {}
    return [{"role": "system", "content": told}, *found], {}


def _with_names(messages: Sequence[Message]) -> list[Message]:
    """Tell of results whose they are: some templates write the function's name."""
    names: dict[str, str] = {}
    found = []
    for message in messages:
        for call in message.get("tool_calls", ()):
            names[str(call.get("id"))] = call["function"]["name"]
        name = names.get(str(message.get("tool_call_id")))
        unnamed = message["role"] == "tool" and "name" not in message and name is not None
        found.append({**message, "name": name} if unnamed else message)
    return found


def _calls_as_text(message: Message, parser: str) -> Message:
    if not (calls := message.get("tool_calls")):
        return message
    said = [message["content"]] if message["content"] else []
    pairs = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    text = "\n".join([*said, write_calls(parser, pairs)])
    return {"role": message["role"], "content": text}


def _results_as_users(messages: Sequence[Message]) -> list[Message]:
    """Let the user tell what tools have answered; results that follow each other are one turn."""
    found: list[Message] = []
    joins = False
    for message in messages:
        if message["role"] != "tool":
            found.append(message)
            joins = False
            continue
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        if joins:
            text = f"{found.pop()['content']}\n{text}"
        found.append({"role": "user", "content": text})
        joins = True
    return found


def write_calls(parser: str, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Return calls as a model writes them that a parser reads."""
    if parser == "pythonic":
        shown = [
            f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
            for name, arguments in calls
        ]
        return f"[{', '.join(shown)}]"
    key = "arguments" if parser == "hermes" else "parameters"
    objects = [
        json.dumps({"name": name, key: arguments}, ensure_ascii=False) for name, arguments in calls
    ]
    if parser == "hermes":
        return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)
    return "; ".join(objects)


_FORMS = {
    "hermes": "write, for each call, a JSON object between <tool_call> and </tool_call>:\n"
    '<tool_call>\n{"name": "the function", "arguments": {"an argument": "its value"}}\n'
    "</tool_call>",
    "llama3_json": "answer with nothing but a JSON object like this:\n"
    '{"name": "the function", "parameters": {"an argument": "its value"}}',
    "pythonic": "answer with nothing but a list of calls like this:\n"
    '[the_function(an_argument="its value")]',
}


def _instructions(tools: Sequence[dict[str, Any]], parser: str) -> str:
    """Return what a system message says of tools where the template has no place for them."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        "You can call functions. These are there, each with the JSON schema of its arguments:\n"
        f"<tools>\n{listed}\n</tools>\n"
        f"To call one, {_FORMS[parser]}"
    )
