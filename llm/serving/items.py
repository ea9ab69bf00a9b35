"""What an answer is made of, where texts and calls of tools are items one after the other."""

from collections.abc import Iterable, Iterator

from llm.serving.requests import Event
from llm.serving.tools.parsers import Begin, Part, Text
from llm.serving.tools.stream import AnswerParts, Calls


def read(events: Iterable[Event], calls: Calls | None) -> Iterator[tuple[Event, list[Part]]]:
    """Yield each event of the one answer with the parts that it brings.

    Args:
        events: of a plan with one prompt and one answer.
        calls: how the answer calls tools, if it may.
    """
    parts = AnswerParts(calls)
    for event in events:
        yield event, parts.push(event.pieces, last=event.answer is not None)


def starts_item(part: Part, text_is_open: bool) -> bool:
    """Tell whether a part begins an item: a call does, and a text that goes on from none."""
    return isinstance(part, Begin) or (isinstance(part, Text) and not text_is_open)
