"""Finds calls of tools in an answer while it grows, in the ways in which Llama models write them.

``hermes``: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` amid text (ChatML models).
``llama3_json``: the answer is ``{"name": ..., "parameters": {...}}`` (Llama 3.1, 3.2).
``pythonic``: the answer is ``[name(argument=value), ...]`` (Llama 3.2 and 4).

What may still become a call is held back; what turns out to be none is text. The parts of an answer
do not depend on how it is cut into pieces.
"""

import ast
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from llm.serving.bodies import MAX_DEPTH, is_deeper

PYTHON_TAG = "<|python_tag|>"  # Llama 3.1 begins calls with this control token, or without


@dataclass(frozen=True)
class Text:
    """Text for the reader."""

    text: str


@dataclass(frozen=True)
class Begin:
    """A call begins: its number in the answer, and of which function."""

    number: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of a call's arguments; joined they are a JSON object."""

    number: int
    text: str


Part = Text | Begin | Arguments


class CallParser(ABC):
    """Reads one answer.

    Args:
        names: of the functions there are; calls of others are text.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = "|".join(sorted(map(regex.escape, names), key=len, reverse=True))
        self._buffer = ""
        self._count = 0  # of calls so far
        self._parts: list[Part] = []
        self._state: Callable[[bool], bool] = self._outside

    def push(self, text: str, *, last: bool = False) -> list[Part]:
        """Take more of the answer; return what is known of it.

        Args:
            text: may be empty.
            last: nothing more comes.
        """
        self._buffer += text
        while self._state(last):
            pass
        if last and self._buffer:
            self._show(self._buffer)
        parts, self._parts = self._parts, []
        return parts

    @abstractmethod
    def _outside(self, last: bool) -> bool:
        """Look for a call's beginning; whether another state goes on now. So do all states."""

    def _plain(self, last: bool) -> bool:
        """Nothing more is a call."""
        self._show(self._buffer)
        return False

    def _show(self, text: str) -> None:
        """Give the first characters of the buffer out as text."""
        if text:
            self._parts.append(Text(text))
            self._buffer = self._buffer[len(text) :]

    def _begin(self, name: str) -> None:
        self._parts.append(Begin(self._count, name))
        self._count += 1

    def _argue(self, text: str) -> None:
        if text:
            self._parts.append(Arguments(self._count - 1, text))

    def _go(self, state: Callable[[bool], bool], skip: int = 0) -> bool:
        self._state, self._buffer = state, self._buffer[skip:]
        return True


class _ObjectEnd:
    """Finds where a JSON object ends that arrives in pieces."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False

    def find(self, text: str) -> int | None:
        """Return how many characters belong to it, if the end is among them."""
        for position, character in enumerate(text, 1):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return position
        return None


class _JsonParser(CallParser):
    """Calls that are JSON objects with a name and arguments."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self._head = regex.compile(
            r'\s*(?:\[\s*)?\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?'
            rf'"name"\s*:\s*"({self._names})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)'
        )
        self._known = frozenset(names)
        self._end = _ObjectEnd()

    def _inside(self, last: bool) -> bool:
        """Read up to the arguments."""
        match = self._head.match(self._buffer, partial=not last)
        if match is None:
            return self._go(self._unusual)
        if match.partial:
            return False
        self._begin(match[1])
        self._end = _ObjectEnd()
        return self._go(self._arguments, match.end())

    def _arguments(self, last: bool) -> bool:
        end = self._end.find(self._buffer)
        text = self._buffer if end is None else self._buffer[:end]
        self._argue(text)
        self._buffer = self._buffer[len(text) :]
        return end is not None and self._go(self._behind)

    @abstractmethod
    def _unusual(self, last: bool) -> bool:
        """Read a call whose fields come in another order, or what is none."""

    @abstractmethod
    def _behind(self, last: bool) -> bool:
        """Go on behind a call's arguments."""

    def _calls(self, text: str) -> list[tuple[str, str]] | None:
        """Return names and arguments of whole calls; None where it is something else."""
        decoder, found, position = json.JSONDecoder(), [], 0
        while position < len(text := text.strip()):
            try:
                value, position = decoder.raw_decode(text, position)
            except (ValueError, RecursionError):
                return None
            position += len(regex.match(r"[\s;,\]]*", text, pos=position)[0])
            for one in value if isinstance(value, list) else [value]:
                call = self._call(one)
                if call is None:
                    return None
                found.append(call)
        return found or None

    def _call(self, value: Any) -> tuple[str, str] | None:
        if isinstance(value, dict) and isinstance(value.get("function"), dict):
            value = value["function"]
        if not isinstance(value, dict) or value.get("name") not in self._known:
            return None
        given = next((value[key] for key in ("arguments", "parameters") if key in value), {})
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except (ValueError, RecursionError):
                return None
        if not isinstance(given, dict) or is_deeper(given, MAX_DEPTH):
            return None
        return value["name"], json.dumps(given, ensure_ascii=False)

    def _take(self, calls: Iterable[tuple[str, str]]) -> None:
        for name, arguments in calls:
            self._begin(name)
            self._argue(arguments)


class HermesParser(_JsonParser):
    """Calls between ``<tool_call>`` and ``</tool_call>``, anywhere in the text."""

    _opening = regex.compile(r"\s*<tool_call>")
    _closing = "</tool_call>"

    def _outside(self, last: bool) -> bool:
        match = self._opening.search(self._buffer, partial=not last)
        if last and self._count and not self._buffer.strip():
            self._buffer = ""  # a line's end behind the last call
        self._show(self._buffer[: match.start()] if match else self._buffer)
        if match is None or match.partial:
            return False
        self._opened = match[0]
        return self._go(self._inside, len(match[0]))

    def _unusual(self, last: bool) -> bool:
        body, closing, _ = self._buffer.partition(self._closing)
        if not closing and not last:
            return False
        calls = self._calls(body)
        if calls is None:  # what was between the marks is shown with them
            self._buffer = self._opened + self._buffer
            self._show(self._opened + body + closing)
            return self._go(self._outside)
        self._take(calls)
        return self._go(self._outside, len(body) + len(closing))

    def _behind(self, last: bool) -> bool:
        """Up to the closing mark; a list goes on with the next call."""
        match = regex.match(r"[\s}\],]*", self._buffer)
        rest = self._buffer[match.end() :]
        if rest.startswith("{"):
            return self._go(self._inside, match.end())
        if self._closing in rest:
            return self._go(self._outside, self._buffer.index(self._closing) + len(self._closing))
        if last:
            self._buffer = ""
        return False


class LlamaParser(_JsonParser):
    """The whole answer is a call, or several with semicolons between them."""

    _opening = regex.compile(rf"((?:\s*{regex.escape(PYTHON_TAG)})?)\s*(?=[{{\[])")
    _keys = regex.compile(r'\s*(?:\[\s*)?\{\s*"(?:type|id|name|function|parameters|arguments)"\s*:')

    def _outside(self, last: bool) -> bool:
        match = self._opening.match(self._buffer, partial=not last)
        if match is None:
            return self._go(self._plain, len(PYTHON_TAG) * self._buffer.startswith(PYTHON_TAG))
        return not match.partial and self._go(self._inside, match.end(1))

    def _unusual(self, last: bool) -> bool:
        match = self._keys.match(self._buffer, partial=not last)
        if match is None:
            return self._go(self._plain)
        calls = self._calls(self._buffer) if last else None
        if calls is not None:
            self._take(calls)
            self._buffer = ""
        return False

    def _behind(self, last: bool) -> bool:
        match = regex.match(r"[\s}\];,]*", self._buffer)
        rest = self._buffer[match.end() :]
        if rest:
            return self._go(self._inside if rest[0] == "{" else self._plain, match.end())
        if last:
            self._buffer = ""
        return False


class PythonicParser(CallParser):
    """The whole answer is a list of calls in Python's syntax; arguments come one by one."""

    _opening = regex.compile(rf"((?:\s*{regex.escape(PYTHON_TAG)})?)\s*(?=\[)")
    _key = regex.compile(r"\s*,?\s*(?:(\))|([A-Za-z_]\w*)\s*=\s*(?=[^\s=]))")

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self._head = regex.compile(rf"\s*\[?\s*({self._names})\s*\(")
        self._next = regex.compile(r"[\s,]*(?:(\])|(?=[^\s,\]]))")
        self._first = True  # of the call's arguments

    def _outside(self, last: bool) -> bool:
        match = self._opening.match(self._buffer, partial=not last)
        if match is None:
            return self._go(self._plain, len(PYTHON_TAG) * self._buffer.startswith(PYTHON_TAG))
        return not match.partial and self._go(self._name, match.end(1))

    def _name(self, last: bool) -> bool:
        match = self._head.match(self._buffer, partial=not last)
        if match is None:
            return self._go(self._plain)
        if match.partial:
            return False
        self._begin(match[1])
        self._first = True
        return self._go(self._argument, match.end())

    def _argument(self, last: bool) -> bool:
        match = self._key.match(self._buffer, partial=not last)
        if match is None:
            return self._go(self._plain)
        if match.partial:
            return False
        if match[1]:
            self._argue("{}" if self._first else "}")
            return self._go(self._behind, match.end())
        end = _value_end(self._buffer, match.end())
        if end is None:
            if last:
                self._buffer = ""  # half a value
            return False
        value = _as_json(self._buffer[match.end() : end])
        self._argue(("{" if self._first else ", ") + f"{json.dumps(match[2])}: {value}")
        self._first = False
        return self._go(self._argument, end)

    def _behind(self, last: bool) -> bool:
        match = self._next.match(self._buffer, partial=not last)
        if match is None or match.partial:
            if last:
                self._buffer = ""
            return False
        return self._go(self._closed if match[1] else self._name, match.end())

    def _closed(self, last: bool) -> bool:
        """Behind the list, a line's end is no text."""
        if self._buffer.strip():
            return self._go(self._plain)
        if last:
            self._buffer = ""
        return False


def _value_end(text: str, start: int) -> int | None:
    """Return where a Python literal ends: at a comma or bracket of the call around it."""
    depth, quote, position = 0, "", start
    while position < len(text):
        character = text[position]
        if quote:
            if character == "\\":
                position += 1
            elif character == quote:
                quote = ""
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}" and depth:
            depth -= 1
        elif character in ")," and not depth:
            return position
        position += 1
    return None


_JSON_NAMES = {"true": True, "false": False, "null": None}


class _Literals(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Take JSON's words, which models mix in."""
        return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node


def _as_json(source: str) -> str:
    """Return a literal of JSON or Python as JSON; what is neither as a string."""
    try:
        value = json.loads(source)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(_Literals().visit(ast.parse(source.strip(), mode="eval")))
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            value = source.strip()
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, TypeError):  # what JSON or Unicode lacks
        return json.dumps(ascii(source.strip()))
    return text


PARSERS: dict[str, type[CallParser]] = {
    "hermes": HermesParser,
    "llama3_json": LlamaParser,
    "pythonic": PythonicParser,
}
