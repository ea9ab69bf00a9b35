"""Response bodies of OpenAI's chat and completions APIs, whole and in chunks.

Field names and the order of stream chunks follow OpenAI's API reference (chat/completions and
completions objects): a chat stream begins with the role, ends with an empty delta that carries the
finish reason, and, when asked, one last chunk without choices that carries the usage.
"""

import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from llm.serving.requests import Event, Plan
from llm.serving.text import Answer, Piece


class _Format:
    """One response under construction; subclasses know the shapes of a choice."""

    prefix = ""
    object_whole = ""
    object_chunk = ""

    def __init__(self, model_id: str, plan: Plan, *, include_usage: bool, logprobs: bool) -> None:
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_id,
        }
        self._plan = plan
        self._include_usage = include_usage
        self._logprobs = logprobs
        self._completion_tokens = 0
        self._cached_tokens = 0

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """Return the response that is not streamed."""
        choices = []
        for event in events:
            if event.answer is not None:
                self._count(event, event.answer)
                choices.append(self._choice(event.index, event.answer))
        head = {**self._head, "object": self.object_whole}
        choices.sort(key=lambda choice: int(choice["index"]))  # they end in any order
        return {**head, "choices": choices, "usage": self._usage()}

    def chunks(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a stream."""
        opened = set()
        for event in events:
            index = event.index
            if index not in opened:
                opened.add(index)
                yield from self._opening(index)
            if any(piece.text for piece in event.pieces) or (event.pieces and self._logprobs):
                yield self._chunk(self._delta(index, event.pieces))
            if event.answer is not None:
                self._count(event, event.answer)
                yield self._chunk(self._closing(index, event.answer))
        if self._include_usage:
            yield {**self._chunk(), "usage": self._usage()}

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head, "object": self.object_chunk, "choices": list(choices)}
        return {**chunk, "usage": None} if self._include_usage else chunk

    def _count(self, event: Event, answer: Answer) -> None:
        self._completion_tokens += answer.num_tokens + event.num_dropped
        if event.index % self._plan.n == 0:  # a prompt counts once, as its tokens do
            self._cached_tokens += event.num_cached

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self._plan.num_prompt_tokens, self._completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def _opening(self, index: int) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def _delta(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        raise NotImplementedError

    def _closing(self, index: int, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError


class ChatFormat(_Format):
    """``chat.completion`` and ``chat.completion.chunk``."""

    prefix = "chatcmpl"
    object_whole = "chat.completion"
    object_chunk = "chat.completion.chunk"

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._token_logprobs(answer.pieces),
            "finish_reason": answer.finish_reason,
        }

    def _opening(self, index: int) -> Iterator[dict[str, Any]]:
        yield self._chunk(self._part(index, {"role": "assistant", "content": ""}))

    def _delta(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        return self._part(index, {"content": text}, logprobs=self._token_logprobs(pieces))

    def _closing(self, index: int, answer: Answer) -> dict[str, Any]:
        return self._part(index, {}, finish_reason=answer.finish_reason)

    def _part(
        self,
        index: int,
        delta: dict[str, str],
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
        if not self._logprobs:
            return None
        content = [
            {
                "token": piece.text,
                "logprob": piece.logprob,
                "bytes": list(piece.text.encode("utf-8")),
                "top_logprobs": [],
            }
            for piece in pieces
            if not piece.special
        ]
        return {"content": content, "refusal": None}


class CompletionFormat(_Format):
    """``text_completion``, whole and chunked; ``echo`` puts the prompt before the answer."""

    prefix = "cmpl"
    object_whole = "text_completion"
    object_chunk = "text_completion"

    def __init__(self, *args: Any, echo: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self._echo = echo
        self._offsets: Counter[int] = Counter()  # of each choice, what its text has come to

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        text = self._prompt_text(index) + answer.text
        return self._part(index, text, answer.finish_reason, answer.pieces)

    def _opening(self, index: int) -> Iterator[dict[str, Any]]:
        if self._echo:
            yield self._chunk(self._part(index, self._prompt_text(index)))

    def _delta(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        return self._part(index, "".join(piece.text for piece in pieces), None, pieces)

    def _closing(self, index: int, answer: Answer) -> dict[str, Any]:
        return self._part(index, "", answer.finish_reason)

    def _prompt_text(self, index: int) -> str:
        return self._plan.prompts[index // self._plan.n].text if self._echo else ""

    def _part(
        self,
        index: int,
        text: str,
        finish_reason: str | None = None,
        pieces: list[Piece] | None = None,
    ) -> dict[str, Any]:
        logprobs = None
        if self._logprobs and pieces is not None:
            shown = [piece for piece in pieces if not piece.special]
            logprobs = self._token_logprobs(index, shown)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def _token_logprobs(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        offsets = []
        for piece in pieces:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(piece.text)
        return {
            "tokens": [piece.text for piece in pieces],
            "token_logprobs": [piece.logprob for piece in pieces],
            "top_logprobs": None,
            "text_offset": offsets,
        }
