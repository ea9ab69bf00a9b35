"""The parts of answers as they grow, texts and calls, for the shapes of every family of routes."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llm.serving.text import Piece
from llm.serving.tools.parsers import PARSERS, Arguments, Begin, CallParser, Part, Text


class Calls(NamedTuple):
    """How answers call tools.

    Args:
        parser: name in ``PARSERS``.
        names: of the functions there are.
        marks: ids of control tokens that the parser has to see, with their texts.
    """

    parser: str
    names: tuple[str, ...]
    marks: tuple[tuple[int, str], ...] = ()


class AnswerParts:
    """Reads one answer.

    Args:
        calls: None where no tools may be called; all is text then.
    """

    def __init__(self, calls: Calls | None) -> None:
        self._parser: CallParser | None = None
        self._marks: dict[int, str] = {}
        if calls is not None:
            self._parser = PARSERS[calls.parser](calls.names)
            self._marks = dict(calls.marks)

    def push(self, pieces: Sequence[Piece], *, last: bool = False) -> list[Part]:
        """Return the parts that further pieces bring; all that is left, with the last ones."""
        text = "".join(piece.text or self._marks.get(piece.token_id, "") for piece in pieces)
        if self._parser is not None:
            return self._parser.push(text, last=last)
        return [Text(text)] if text else []


def new_call_id() -> str:
    """Return what names one call in a conversation."""
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass
class Call:
    """A call of a whole answer."""

    name: str
    arguments: str = ""
    id: str = field(default_factory=new_call_id)


def gather(parts: Sequence[Part]) -> tuple[str, list[Call]]:
    """Return the text and the calls of all parts of an answer."""
    text, calls = "", list[Call]()
    for part in parts:
        if isinstance(part, Text):
            text += part.text
        elif isinstance(part, Begin):
            calls.append(Call(part.name))
        elif isinstance(part, Arguments):
            calls[part.number].arguments += part.text
    return text, calls


def finish_reason(reason: str, has_calls: bool) -> str:
    """Return why an answer ended, in OpenAI's words: ``tool_calls`` where it stopped after some."""
    return "tool_calls" if has_calls and reason == "stop" else reason
