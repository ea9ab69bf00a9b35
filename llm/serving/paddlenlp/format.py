"""What PaddleNLP's flask servers answer: events with whole messages, or lines of utterances."""

import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from llm.serving.errors import ApiError
from llm.serving.requests import Event
from llm.serving.web import Wire, as_json

# Of the older server, `/api/chat`.
LINES = Wire(
    lambda chunk: as_json(chunk) + "\n", content_type="application/x-ndjson; charset=utf-8"
)


class MessageFormat:
    """``/v1/chat/completions``: each event has a message, what is new of it."""

    def __init__(self, model_id: str) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model_id,
        }

    def chunks(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """Yield an event for each piece of text; the last one says why the answer ended."""
        for event in events:
            text = "".join(piece.text for piece in event.pieces)
            reason = None if event.answer is None else event.answer.finish_reason
            if text or reason is not None:
                message = {"role": "assistant", "content": text}
                choice = {"index": 0, "message": message, "finish_reason": reason}
                yield {**self._head, "choices": [choice]}


class UtteranceFormat:
    """``/api/chat``: each line is an utterance of the bot, what is new of it."""

    def chunks(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """Yield a line for each piece of text."""
        for event in events:
            if text := "".join(piece.text for piece in event.pieces):
                response = {"role": "bot", "utterance": text}
                result = {"response": response}
                yield {"error_code": 0, "error_msg": "Success", "result": result}


def error_line(error: ApiError) -> dict[str, Any]:
    """Return an error as ``/api/chat`` says it."""
    return {"error_code": 1, "error_msg": error.message}
