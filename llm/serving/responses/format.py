"""Response bodies of OpenAI's Responses API, whole and in events.

Order and shapes of the events follow OpenAI's reference (streaming events): items of the output
come one after the other; each is added, grows by deltas, and is done.
"""

import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from llm.serving.errors import ApiError
from llm.serving.items import read, starts_item
from llm.serving.openai.logprobs import TokenTexts, chat_logprobs
from llm.serving.requests import Event, Plan
from llm.serving.responses.schema import ResponsesRequest
from llm.serving.text import Piece
from llm.serving.tools.parsers import Arguments, Begin, Part, Text


class ResponseFormat:
    """``response``, whole and as events.

    Args:
        model_id: what the answer says of the model.
        body: of the request, of which the answer repeats the settings.
        plan: what is generated.
        texts: what tokens are called, where the body asks for their scores.
    """

    def __init__(
        self, model_id: str, body: ResponsesRequest, plan: Plan, texts: TokenTexts
    ) -> None:
        self._plan, self._texts, self._alternatives = plan, texts, body.logprobs
        self._scores: list[dict[str, Any]] = []  # of tokens whose text has not been told
        self._number = 0  # of events so far
        self._items: list[dict[str, Any]] = []
        form = body.text.format if body.text is not None else None
        shown = {"type": "text"} if form is None else form.model_dump(by_alias=True)
        choice = body.tool_choice
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": model_id,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "background": False,
            "temperature": plan.sampling["temperature"],
            "text": {"format": shown},
            "tool_choice": choice if isinstance(choice, str) else _dumped(choice) or "auto",
            "tools": [tool.model_dump(exclude={"defer_loading"}) for tool in body.tools or []],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": plan.sampling["top_p"],
            "truncation": "disabled",
            "metadata": body.metadata or {},
        }

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """Return the response that is not streamed: the one that a stream ends with."""
        response: dict[str, Any] = {}
        for event in self._events(events):
            response = event.get("response", response)
        return response

    def chunks(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """Yield the events of a stream; an error is one of them."""
        try:
            for event in self._events(events):
                yield self._numbered(event)
        except ApiError as error:
            fault = {"code": error.code, "message": error.message, "param": error.param}
            yield self._numbered({"type": "error", **fault})

    def _numbered(self, event: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        return {**event, "sequence_number": self._number - 1}

    def _events(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        begun = {**self._head, "status": "in_progress", "incomplete_details": None}
        for name in ("created", "in_progress"):
            response = {**begun, "output": [], "usage": None}
            yield {"type": f"response.{name}", "response": response}
        last: Event | None = None
        for event, parts in read(events, self._plan.calls):
            last = event
            self._score(event.pieces)
            for part in parts:
                yield from self._part(part)
        assert last is not None and last.answer is not None
        cut = last.answer.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        yield from self._end_item(status)
        why = {"reason": "max_output_tokens"} if cut else None
        response = {
            **self._head,
            "status": status,
            "incomplete_details": why,
            "output": self._items,
            "usage": self._usage(last),
        }
        yield {"type": f"response.{status}", "response": response}

    def _score(self, pieces: list[Piece]) -> None:
        if self._alternatives is not None:
            shown = (piece for piece in pieces if not piece.special)
            self._scores += chat_logprobs(shown, self._texts, self._alternatives)["content"]

    def _part(self, part: Part) -> Iterator[dict[str, Any]]:
        if starts_item(part, bool(self._items) and self._items[-1]["type"] == "message"):
            yield from self._end_item("completed")
            yield from self._begin_item(part)
        item, place = self._items[-1], self._place()
        if isinstance(part, Text):
            scores, self._scores = self._scores, []
            item["content"][0]["text"] += part.text
            item["content"][0]["logprobs"] += scores
            delta = {"content_index": 0, "delta": part.text, "logprobs": scores}
            yield {"type": "response.output_text.delta", **place, **delta}
        elif isinstance(part, Arguments):
            item["arguments"] += part.text
            kind = "response.function_call_arguments.delta"
            yield {"type": kind, **place, "delta": part.text}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _begin_item(self, part: Part) -> Iterator[dict[str, Any]]:
        item = _item(part)
        self._items.append(item)
        shown = {**item, "content": []} if item["type"] == "message" else dict(item)
        index = len(self._items) - 1
        yield {"type": "response.output_item.added", "output_index": index, "item": shown}
        if item["type"] == "message":
            place = {**self._place(), "content_index": 0}
            yield {"type": "response.content_part.added", **place, "part": dict(item["content"][0])}

    def _end_item(self, status: str) -> Iterator[dict[str, Any]]:
        """End the item that grows, if one does."""
        if not self._items:
            return
        item, place = self._items[-1], self._place()
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            part["logprobs"] += self._scores  # of tokens that ended without a text
            self._scores = []
            place = {**place, "content_index": 0}
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            yield {"type": "response.output_text.done", **place, **text}
            yield {"type": "response.content_part.done", **place, "part": part}
        else:
            said = {"name": item["name"], "arguments": item["arguments"]}
            yield {"type": "response.function_call_arguments.done", **place, **said}
        index = len(self._items) - 1
        yield {"type": "response.output_item.done", "output_index": index, "item": item}

    def _usage(self, event: Event) -> dict[str, Any]:
        prompt, answer = self._plan.num_prompt_tokens, event.num_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": event.num_cached},
            "output_tokens": answer,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + answer,
        }


def _item(part: Part) -> dict[str, Any]:
    if isinstance(part, Begin):
        return {
            "type": "function_call",
            "id": f"fc_{uuid.uuid4().hex}",
            "call_id": f"call_{uuid.uuid4().hex[:24]}",
            "name": part.name,
            "arguments": "",
            "status": "in_progress",
        }
    text: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {
        "type": "message",
        "id": f"msg_{uuid.uuid4().hex}",
        "role": "assistant",
        "status": "in_progress",
        "content": [text],
    }


def _dumped(choice: Any) -> dict[str, Any] | None:
    return None if choice is None else choice.model_dump()
