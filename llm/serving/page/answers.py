"""An answer as the page's browser hears of it: what left the context, text with its HTML as it
grows, how it ended.

Each event is a JSON object with a `type`. ``left_out``: how many `messages` the model no longer
sees. ``text``: the new `text`, the HTML of the blocks `from` a number on, and log-probabilities
and parts of tool calls where they were asked for. ``end``: `finish` (the API's finish reason).
Both: `usage`, seconds to the `first` token and `seconds` in all, so far. ``error``: `message`,
`code`, `status`.
"""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import anyio

from llm.serving.page.client import ApiClient, ApiError, Headers
from llm.serving.page.rendering import GrowingAnswer

# A browser keeps up with ten redraws a second of a long answer, not with one for every token; and
# drawing may not take the time that reading needs.
_UPDATE_SECONDS = 0.1
_DRAWING_SHARE = 4
# Less room than this share of the context is no room for an answer.
_LEAST_ROOM = 4

Event = dict[str, Any]
# An answer that is stopped has an end nobody hears of: its figures come with its text.
_ALL_FIGURES = {"include_usage": True, "continuous_usage_stats": True}
_ROUTES = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


@dataclass
class Asked:
    """What the browser asks for.

    Args:
        route: ``chat`` or ``completions``.
        body: fields of that route.
        context: tokens of prompt and answer that the model takes.
        prefix: what stands before the answer, where it goes on.
    """

    route: str
    body: dict[str, Any]
    context: int
    prefix: str = ""


@dataclass
class _Unsaid:
    """What has come and the browser has not heard."""

    text: str = ""
    tokens: list[Any] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)

    def take(self, chunk: dict[str, Any]) -> str | None:
        """Take in a chunk; return its finish reason."""
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            self.text += choice.get("text") or delta.get("content") or ""
            self.calls += delta.get("tool_calls") or ()
            self.tokens += _tokens(choice.get("logprobs") or {})
            if choice.get("finish_reason"):
                return str(choice["finish_reason"])
        return None


def _tokens(logprobs: dict[str, Any]) -> list[Any]:
    """Return text, log-probability and alternatives of tokens, from either route's form."""
    if "content" in logprobs:
        return [
            [
                token["token"],
                token["logprob"],
                [[other["token"], other["logprob"]] for other in token.get("top_logprobs") or ()],
            ]
            for token in logprobs["content"] or ()
        ]
    tops = logprobs.get("top_logprobs") or []
    return [
        [text, value, list((tops[place] or {}).items()) if place < len(tops) else []]
        for place, (text, value) in enumerate(
            zip(logprobs.get("tokens") or (), logprobs.get("token_logprobs") or (), strict=True)
        )
    ]


async def answer(client: ApiClient, asked: Asked, headers: Headers) -> AsyncGenerator[Event]:
    """Yield the events of one answer. Closing the iterator ends it at the server, too."""
    try:
        async for event in _answer(client, asked, headers):
            yield event
    except ApiError as error:
        yield {
            "type": "error",
            "message": error.message,
            "code": error.code,
            "status": error.status,
        }


async def _answer(client: ApiClient, asked: Asked, headers: Headers) -> AsyncIterator[Event]:
    body = {**asked.body, "stream": True, "stream_options": _ALL_FIGURES}
    begin = time.monotonic()
    left_out = 0
    while True:
        try:
            async with client.stream(_ROUTES[asked.route], body, headers) as chunks:
                if left_out:
                    yield {"type": "left_out", "messages": left_out}
                async for event in _events(chunks, GrowingAnswer(asked.prefix), begin):
                    yield event
            return
        except ApiError as error:
            if error.code != "context_length_exceeded":
                raise
            left_out += _make_room(body, error, asked.context)


def _make_room(body: dict[str, Any], error: ApiError, context: int) -> int:
    """Shorten the answer or leave out the oldest turn; return how many messages left.

    Raises:
        ApiError: the one given, where nothing can go.
    """
    found = re.search(r"ask for at most (\d+)", error.message)
    room = int(found[1]) if found else 0
    messages = body.get("messages", [])
    first = 1 if messages and messages[0]["role"] == "system" else 0
    turns = [n for n, message in enumerate(messages) if message["role"] == "user"]
    if room >= max(1, context // _LEAST_ROOM) or (room and len(turns) < 2):
        body["max_tokens"] = room
        return 0
    if len(turns) < 2:
        raise error
    body["messages"] = messages[:first] + messages[turns[1] :]
    return turns[1] - first


async def _events(
    chunks: AsyncIterator[dict[str, Any]], growing: GrowingAnswer, begin: float
) -> AsyncIterator[Event]:
    """Yield what chunks say, several of them at once where they come fast."""
    unsaid, news = _Unsaid(), asyncio.Event()
    ended: Event = {"type": "end", "finish": None, "usage": None, "first": None}

    async def read() -> None:
        try:
            async for chunk in chunks:
                ended["finish"] = unsaid.take(chunk) or ended["finish"]
                ended["usage"] = chunk.get("usage") or ended["usage"]
                if ended["first"] is None and (unsaid.text or unsaid.calls):
                    ended["first"] = time.monotonic() - begin
                news.set()
            ended["seconds"] = time.monotonic() - begin
        finally:
            news.set()

    def so_far() -> Event:
        return {
            "usage": ended["usage"],
            "first": ended["first"],
            "seconds": ended.get("seconds", time.monotonic() - begin),
        }

    reader = asyncio.create_task(read())
    try:
        while not reader.done():
            await news.wait()
            news.clear()
            if unsaid.text or unsaid.calls:
                said, unsaid.text = unsaid.text, ""
                drawn = time.monotonic()
                first, blocks = await asyncio.to_thread(growing.push, said)
                event = {"type": "text", "text": said, "from": first, "html": blocks}
                event |= {"tokens": unsaid.tokens, "calls": unsaid.calls, **so_far()}
                unsaid.tokens, unsaid.calls = [], []
                yield event
                pause = (time.monotonic() - drawn) * _DRAWING_SHARE
                await asyncio.wait((reader,), timeout=max(_UPDATE_SECONDS, pause))
        if unsaid.text or unsaid.calls or unsaid.tokens:
            first, blocks = await asyncio.to_thread(growing.push, unsaid.text)
            yield {"type": "text", "from": first, "html": blocks, **vars(unsaid), **so_far()}
        await reader  # raises what the API said in place of the rest
        first, blocks = await asyncio.to_thread(growing.finish)
        yield {**ended, "from": first, "html": blocks}
    finally:
        reader.cancel()
        # A second cancellation would interrupt it while it closes its connection.
        with anyio.CancelScope(shield=True):
            await asyncio.wait((reader,))
        if not reader.cancelled():
            reader.exception()  # it has been raised above, or nobody is there any more
