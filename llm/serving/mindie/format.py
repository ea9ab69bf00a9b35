"""Response bodies of MindIE's own routes, whole and streamed."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from llm.serving.requests import Event, Plan
from llm.serving.text import Answer
from llm.serving.tgi.format import finish_reason, paired
from llm.serving.web import Wire, as_json

# As vLLM's demonstration server ends its chunks, which MindIE has taken over.
NULS = Wire(lambda chunk: as_json(chunk) + "\0", content_type="application/json; charset=utf-8")


class InferFormat:
    """MindIE's ``/infer``: what TGI says in fewer words, and how long each token took."""

    def __init__(self, plan: Plan, *, details: bool) -> None:
        self._plan = plan
        self._details = details
        self._last = time.monotonic()

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """Return the response that is not streamed."""
        answer = [event.answer for event in events if event.answer is not None][-1]
        body: dict[str, Any] = {"generated_text": answer.text}
        return {**body, "details": self._summary(answer)} if self._details else body

    def chunks(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """Yield one event per token; the last one carries the whole text and the details."""
        for index, (piece, answer) in enumerate(paired(events)):
            now = time.monotonic()
            took, self._last = round((now - self._last) * 1000, 2), now
            chunk: dict[str, Any] = {
                "prefill_time": None if index else took,
                "decode_time": took if index else None,
                "token": {"id": [piece.token_id], "text": piece.text},
            }
            if answer is not None:
                chunk["generated_text"] = answer.text
                if self._details:
                    chunk["details"] = self._summary(answer)
            yield chunk

    def _summary(self, answer: Answer) -> dict[str, Any]:
        return {
            "finish_reason": finish_reason(answer),
            "generated_tokens": answer.num_tokens,
            "seed": self._plan.sampling["seed"],
        }


class TextsFormat:
    """``/generate`` in vLLM's form: the texts of all answers, behind the prompt where whole."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """Return the response that is not streamed."""
        ended = {event.index: event.answer for event in events if event.answer is not None}
        prompt = self._plan.prompts[0].text or ""
        return {"text": [prompt + ended[index].text for index in sorted(ended)]}

    def chunks(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """Yield what is new; of several answers, each at its place."""
        for event in events:
            if text := "".join(piece.text for piece in event.pieces):
                texts = [""] * self._plan.n
                texts[event.index] = text
                yield {"text": texts}
