"""Response bodies of text-generation-inference's ``/generate``, whole and streamed."""

from collections.abc import Iterable, Iterator
from typing import Any

from llm.serving.requests import Event, Plan
from llm.serving.text import Answer, Piece


class GenerateFormat:
    """One ``/generate`` response.

    Args:
        plan: what is generated.
        details: add ids and log-probabilities of the tokens.
        return_full_text: put the input before the answer.
    """

    def __init__(self, plan: Plan, *, details: bool, return_full_text: bool) -> None:
        self._plan = plan
        self._details = details
        self._prefix = (plan.prompts[0].text or "") if return_full_text else ""

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """Return the response that is not streamed."""
        answer = [event.answer for event in events if event.answer is not None][-1]
        body: dict[str, Any] = {"generated_text": self._prefix + answer.text}
        if self._details:
            tokens = [self._token(piece) for piece in answer.pieces]
            body["details"] = {**self._summary(answer), "prefill": [], "tokens": tokens}
        return body

    def chunks(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """Yield one event per token; the last one carries the whole text and the details."""
        index = 0
        for event in events:
            for position, piece in enumerate(event.pieces):
                index += 1
                is_last = event.answer is not None and position == len(event.pieces) - 1
                yield self._event(index, piece, event.answer if is_last else None)
            if event.answer is not None and not event.pieces:
                # A stop string swallowed the last tokens: an event without text ends the stream.
                yield self._event(index + 1, event.answer.last, event.answer)

    def _event(self, index: int, piece: Piece, answer: Answer | None) -> dict[str, Any]:
        return {
            "index": index,
            "token": self._token(piece),
            "generated_text": None if answer is None else self._prefix + answer.text,
            "details": None if answer is None else self._summary(answer),
        }

    def _token(self, piece: Piece) -> dict[str, Any]:
        return {
            "id": piece.token_id,
            "text": piece.text,
            "logprob": piece.logprob,
            "special": piece.special,
        }

    def _summary(self, answer: Answer) -> dict[str, Any]:
        reason = "length" if answer.finish_reason == "length" else "eos_token"
        return {
            "finish_reason": "stop_sequence" if answer.matched_stop is not None else reason,
            "generated_tokens": answer.num_tokens,
            "input_length": self._plan.num_prompt_tokens,
            "seed": self._plan.sampling["seed"],
        }
