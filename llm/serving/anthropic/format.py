"""Response bodies of Anthropic's Messages API, whole and in events.

Order and shapes of the events follow Anthropic's reference (streaming messages): blocks of content
come one after the other, each with its start, deltas and stop.
"""

import json
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from llm.serving.anthropic.plan import NO_THREADS
from llm.serving.errors import ApiError
from llm.serving.items import read, starts_item
from llm.serving.requests import Event, Plan
from llm.serving.tools.parsers import Arguments, Begin, Part, Text

_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: ApiError) -> dict[str, Any]:
    """Return an error as Anthropic's API sends it, whole and in streams."""
    kind = _ERRORS.get(error.status) or (
        "invalid_request_error" if error.status < 500 else "api_error"
    )
    said: dict[str, Any] = {"type": kind, "message": error.message}
    if error.code == NO_THREADS:
        said["details"] = {"error_code": error.code, "unsupported": ["thread"]}
    return {"type": "error", "error": said}


class MessageFormat:
    """``message``, whole and as events.

    Args:
        model_id: what the answer says of the model.
        plan: what is generated.
        caches: tell what the cache had of the prompt: the request has marked what to keep there.
    """

    def __init__(self, model_id: str, plan: Plan, *, caches: bool) -> None:
        self._head = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model_id,
        }
        self._plan = plan
        self._caches = caches

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """Return the response that is not streamed."""
        blocks: list[dict[str, Any]] = []
        for event, parts in read(events, self._plan.calls):
            for part in parts:
                if starts_item(part, bool(blocks) and blocks[-1]["type"] == "text"):
                    blocks.append(_block(part))
                if isinstance(part, Text):
                    blocks[-1]["text"] += part.text
                elif isinstance(part, Arguments):
                    blocks[-1]["input"] += part.text
            last = event
        for block in blocks:
            if block["type"] == "tool_use":
                block["input"] = _object(block["input"])
        called = any(block["type"] == "tool_use" for block in blocks)
        return {
            **self._head,
            "content": blocks,
            **self._end(last, called),
            "usage": self._usage(last),
        }

    def chunks(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """Yield the events of a stream."""
        index, kind, called = -1, "", False
        last = None
        for event, parts in read(events, self._plan.calls):
            if last is None:
                usage = {**self._usage(event), "output_tokens": 0}
                ends = {"stop_reason": None, "stop_sequence": None}
                message = {**self._head, "content": [], **ends, "usage": usage}
                yield {"type": "message_start", "message": message}
            last = event
            for part in parts:
                if starts_item(part, kind == "text"):
                    if index >= 0:
                        yield {"type": "content_block_stop", "index": index}
                    index += 1
                    block = _block(part)
                    kind = block["type"]
                    called = called or kind == "tool_use"
                    if kind == "tool_use":
                        block["input"] = {}
                    yield {"type": "content_block_start", "index": index, "content_block": block}
                if not isinstance(part, Begin):
                    yield {"type": "content_block_delta", "index": index, "delta": _delta(part)}
        if index >= 0:
            yield {"type": "content_block_stop", "index": index}
        assert last is not None
        yield {
            "type": "message_delta",
            "delta": self._end(last, called),
            "usage": self._usage(last),
        }
        yield {"type": "message_stop"}

    def _end(self, event: Event, called: bool) -> dict[str, Any]:
        answer = event.answer
        assert answer is not None
        if answer.finish_reason == "length":
            reason = "max_tokens"
        elif called:
            reason = "tool_use"
        else:
            reason = "end_turn" if answer.matched_stop is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": answer.matched_stop}

    def _usage(self, event: Event) -> dict[str, Any]:
        """Return tokens; those that the cache had are counted apart, where it is asked for."""
        cached = event.num_cached if self._caches else 0
        return {
            "input_tokens": self._plan.num_prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": event.num_tokens,
        }


def _block(part: Part) -> dict[str, Any]:
    if isinstance(part, Begin):
        call = f"toolu_{uuid.uuid4().hex[:24]}"
        return {"type": "tool_use", "id": call, "name": part.name, "input": ""}
    return {"type": "text", "text": ""}


def _delta(part: Text | Arguments) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text_delta", "text": part.text}
    return {"type": "input_json_delta", "partial_json": part.text}


def _object(arguments: str) -> dict[str, Any]:
    """Return a call's input; of one that the limit of tokens has cut there is none."""
    try:
        found = json.loads(arguments or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
