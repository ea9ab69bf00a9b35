"""Response bodies of OpenAI's chat and completions APIs, whole and in chunks.

Field names and the order of stream chunks follow OpenAI's API reference (chat/completions and
completions objects): a chat stream begins with the role, ends with an empty delta that carries the
finish reason, and, when asked, one last chunk without choices that carries the usage.
"""

import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm.engine.request import Token
from llm.serving.openai.logprobs import (
    TokenTexts,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
)
from llm.serving.requests import Event, Plan
from llm.serving.text import Piece
from llm.serving.tools.parsers import Arguments, Begin, Part, Text
from llm.serving.tools.stream import AnswerParts, finish_reason, gather, new_call_id


@dataclass(frozen=True)
class Shape:
    """What a response tells beside the answers.

    Args:
        texts: what tokens are called.
        logprobs: of each token, with so many of those that might have come; None tells none.
        prompt_logprobs: likewise of the prompt, in vLLM's field.
        echo: put the prompt before the answer.
        usage: a stream ends with the usage.
        continuous_usage: all its chunks carry what it has come to.
    """

    texts: TokenTexts
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    usage: bool = False
    continuous_usage: bool = False


class _Format:
    """One response under construction; subclasses know the shapes of a choice."""

    prefix = ""
    object_whole = ""
    object_chunk = ""

    def __init__(self, model_id: str, plan: Plan, shape: Shape) -> None:
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_id,
        }
        self._plan = plan
        self._shape = shape
        self._tokens: Counter[int] = Counter()  # of each choice, and dropped ones with the first
        self._cached: dict[int, int] = {}  # tokens of each prompt that the cache had

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """Return the response that is not streamed."""
        choices = []
        for event in events:
            self._count(event)
            if event.answer is not None:
                choices.append(self._choice(event))
        choices.sort(key=lambda choice: int(choice["index"]))  # they end in any order
        head = {**self._head, "object": self.object_whole}
        return {**head, "choices": choices, "usage": self._usage()}

    def chunks(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a stream."""
        opened = set()
        for event in events:
            self._count(event)
            if event.index not in opened:
                opened.add(event.index)
                yield from map(self._chunk, self._opening(event))
            yield from map(self._chunk, self._deltas(event))
            if event.answer is not None:
                yield self._chunk(self._closing(event))
        if self._shape.usage:
            yield {**self._chunk(), "usage": self._usage()}

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head, "object": self.object_chunk, "choices": list(choices)}
        if not self._shape.usage:
            return chunk
        return {**chunk, "usage": self._usage() if self._shape.continuous_usage else None}

    def _count(self, event: Event) -> None:
        self._tokens[event.index] = event.num_tokens + event.num_dropped
        # A prompt counts once, as its tokens do: as its first answer has found it.
        number, choice = divmod(event.index, self._plan.n)
        if choice == 0:
            self._cached[number] = event.num_cached

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self._plan.num_prompt_tokens, self._tokens.total()
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }

    def _with_prompt(self, place: dict[str, Any], scores: Sequence[Token]) -> dict[str, Any]:
        """Add the prompt's scores where they are asked for."""
        count = self._shape.prompt_logprobs
        if count is None:
            return place
        return {**place, "prompt_logprobs": prompt_logprobs(scores, self._shape.texts, count)}

    def _choice(self, event: Event) -> dict[str, Any]:
        raise NotImplementedError

    def _opening(self, event: Event) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def _deltas(self, event: Event) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def _closing(self, event: Event) -> dict[str, Any]:
        raise NotImplementedError


class ChatFormat(_Format):
    """``chat.completion`` and ``chat.completion.chunk``."""

    prefix = "chatcmpl"
    object_whole = "chat.completion"
    object_chunk = "chat.completion.chunk"

    def __init__(self, model_id: str, plan: Plan, shape: Shape) -> None:
        super().__init__(model_id, plan, shape)
        self._readers: dict[int, AnswerParts] = {}  # of the choices of a stream
        self._calling: set[int] = set()
        self._scores: tuple[Token, ...] = ()  # of the one prompt

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """Return the response that is not streamed."""
        return self._with_prompt(super().whole(events), self._scores)

    def _choice(self, event: Event) -> dict[str, Any]:
        assert event.answer is not None
        self._scores = event.prompt
        pieces = event.answer.pieces
        text, calls = gather(AnswerParts(self._plan.calls).push(pieces, last=True))
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["content"] = text or None
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in calls
            ]
        return {
            "index": event.index,
            "message": message,
            "logprobs": self._token_logprobs(pieces),
            "finish_reason": finish_reason(event.answer.finish_reason, bool(calls)),
        }

    def _opening(self, event: Event) -> Iterator[dict[str, Any]]:
        self._readers[event.index] = AnswerParts(self._plan.calls)
        yield self._part(event.index, {"role": "assistant", "content": ""})

    def _deltas(self, event: Event) -> Iterator[dict[str, Any]]:
        last = event.answer is not None
        parts = self._readers[event.index].push(event.pieces, last=last)
        logprobs = self._token_logprobs(event.pieces) if event.pieces else None
        for part in parts:
            yield self._part(event.index, self._delta(event.index, part), logprobs=logprobs)
            logprobs = None
        if logprobs is not None:  # of tokens whose text waits, or is none
            yield self._part(event.index, {"content": ""}, logprobs=logprobs)

    def _delta(self, index: int, part: Part) -> dict[str, Any]:
        if isinstance(part, Text):
            return {"content": part.text}
        call: dict[str, Any] = {"index": part.number}
        if isinstance(part, Begin):
            self._calling.add(index)
            call |= {"id": new_call_id(), "type": "function"}
            call["function"] = {"name": part.name, "arguments": ""}
        if isinstance(part, Arguments):
            call["function"] = {"arguments": part.text}
        return {"tool_calls": [call]}

    def _closing(self, event: Event) -> dict[str, Any]:
        assert event.answer is not None
        has_calls = event.index in self._calling
        return self._part(event.index, {}, finish_reason(event.answer.finish_reason, has_calls))

    def _part(
        self,
        index: int,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def _token_logprobs(self, pieces: list[Piece]) -> dict[str, Any] | None:
        if self._shape.logprobs is None:
            return None
        shown = (piece for piece in pieces if not piece.special)
        return chat_logprobs(shown, self._shape.texts, self._shape.logprobs)


class CompletionFormat(_Format):
    """``text_completion``, whole and chunked."""

    prefix = "cmpl"
    object_whole = "text_completion"
    object_chunk = "text_completion"

    def __init__(self, model_id: str, plan: Plan, shape: Shape) -> None:
        super().__init__(model_id, plan, shape)
        self._offsets: Counter[int] = Counter()  # of each choice, what its text has come to

    def _choice(self, event: Event) -> dict[str, Any]:
        assert event.answer is not None
        pieces = [*self._prompt_pieces(event), *event.answer.pieces]
        text = self._prompt_text(event.index) + event.answer.text
        choice = self._part(event.index, text, pieces, event.answer.finish_reason)
        return self._with_prompt(choice, event.prompt)

    def _opening(self, event: Event) -> Iterator[dict[str, Any]]:
        if self._shape.echo:
            text = self._prompt_text(event.index)
            yield self._part(event.index, text, self._prompt_pieces(event))

    def _deltas(self, event: Event) -> Iterator[dict[str, Any]]:
        text = "".join(piece.text for piece in event.pieces)
        if text or (event.pieces and self._shape.logprobs is not None):
            yield self._part(event.index, text, event.pieces)

    def _closing(self, event: Event) -> dict[str, Any]:
        assert event.answer is not None
        return self._part(event.index, "", None, event.answer.finish_reason)

    def _prompt_text(self, index: int) -> str:
        prompt = self._plan.prompts[index // self._plan.n]
        return (prompt.text or "") if self._shape.echo else ""

    def _prompt_pieces(self, event: Event) -> list[Piece]:
        if not self._shape.echo or self._shape.logprobs is None:
            return []
        ids = self._plan.prompts[event.index // self._plan.n].ids
        return self._shape.texts.pieces_of(ids, event.prompt)

    def _part(
        self,
        index: int,
        text: str,
        pieces: list[Piece] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        logprobs, count = None, self._shape.logprobs
        if count is not None and pieces is not None:
            texts, offset = self._shape.texts, self._offsets[index]
            logprobs, self._offsets[index] = completion_logprobs(pieces, texts, count, offset)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
