"""Response bodies in text-generation-inference's form, whole and streamed."""

from collections.abc import Iterable, Iterator
from typing import Any

from llm.engine.opening import OpenedModel
from llm.serving.openai.logprobs import TokenTexts
from llm.serving.requests import Event, Plan
from llm.serving.text import Answer, Piece


def finish_reason(answer: Answer) -> str:
    """Return why an answer ended, in TGI's words."""
    if answer.matched_stop is not None:
        return "stop_sequence"
    return "length" if answer.finish_reason == "length" else "eos_token"


def paired(events: Iterable[Event]) -> Iterator[tuple[Piece, Answer | None]]:
    """Yield the tokens of the one answer; its last one comes with the answer."""
    for event in events:
        for position, piece in enumerate(event.pieces):
            is_last = event.answer is not None and position == len(event.pieces) - 1
            yield piece, event.answer if is_last else None
        if event.answer is not None and not event.pieces:
            # A stop string swallowed the last tokens: one without text ends the stream.
            assert event.answer.last is not None
            yield event.answer.last, event.answer


class GenerateFormat:
    """One response.

    Args:
        plan: what is generated.
        model: whose tokens these are.
        details: add ids and log-probabilities of the tokens.
        prefill: the prompt's among them.
        return_full_text: put the input before the answer.
        as_list: a whole response is a list of one, as ``/`` has it.
    """

    def __init__(
        self,
        plan: Plan,
        model: OpenedModel,
        *,
        details: bool,
        prefill: bool = False,
        return_full_text: bool = False,
        as_list: bool = False,
    ) -> None:
        self._plan = plan
        self._texts = TokenTexts(model)
        self._control = model.tokenizer.special_text
        self._details = details
        self._prefill = prefill
        self._as_list = as_list
        self._prefix = (plan.prompts[0].text or "") if return_full_text else ""

    def whole(self, events: Iterable[Event]) -> Any:
        """Return the response that is not streamed."""
        ended = [event for event in events if event.answer is not None]
        ended.sort(key=lambda event: (-_mean_logprob(event), event.index))
        best, *others = ended
        body: dict[str, Any] = {"generated_text": self._text(best)}
        if self._details:
            body["details"] = self._answer_details(best)
            if others:
                body["details"]["best_of_sequences"] = [
                    {"generated_text": self._text(one), **self._answer_details(one)}
                    for one in others
                ]
        return [body] if self._as_list else body

    def _text(self, event: Event) -> str:
        assert event.answer is not None
        return self._prefix + event.answer.text

    def _answer_details(self, event: Event) -> dict[str, Any]:
        answer = event.answer
        assert answer is not None
        prefill = []
        if self._prefill:
            pieces = self._texts.pieces_of(self._plan.prompts[0].ids, event.prompt)
            prefill = [self._prompt_token(piece) for piece in pieces]
        found = {
            **self._summary(answer),
            "prefill": prefill,
            "tokens": [self._token(piece) for piece in answer.pieces],
        }
        if self._plan.sampling["logprobs"]:
            found["top_tokens"] = [self._top(piece) for piece in answer.pieces]
        return found

    def chunks(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """Yield one event per token; the last one carries the whole text and the details."""
        for index, (piece, answer) in enumerate(paired(events), 1):
            chunk = {
                "index": index,
                "token": self._token(piece),
                "generated_text": None if answer is None else self._prefix + answer.text,
                "details": None if answer is None else self._summary(answer),
            }
            if self._plan.sampling["logprobs"]:
                chunk["top_tokens"] = self._top(piece)
            yield chunk

    def _token(self, piece: Piece) -> dict[str, Any]:
        return {
            "id": piece.token_id,
            "text": piece.text,
            "logprob": piece.logprob,
            "special": piece.special,
        }

    def _prompt_token(self, piece: Piece) -> dict[str, Any]:
        scored = piece.logprob == piece.logprob  # nothing comes before the first
        return {
            "id": piece.token_id,
            "text": self._texts.chosen(piece),
            "logprob": piece.logprob if scored else None,
        }

    def _top(self, piece: Piece) -> list[dict[str, Any]]:
        return [
            {
                "id": token_id,
                "text": piece.text if token_id == piece.token_id else self._texts.own(token_id),
                "logprob": logprob,
                "special": token_id in self._control,
            }
            for token_id, logprob in piece.top
        ]

    def _summary(self, answer: Answer) -> dict[str, Any]:
        num_prompt_tokens = self._plan.num_prompt_tokens
        return {
            "finish_reason": finish_reason(answer),
            "generated_tokens": answer.num_tokens,
            "input_length": num_prompt_tokens,
            "prompt_tokens": num_prompt_tokens,  # MindIE's name for it
            "seed": self._plan.sampling["seed"],
        }


def _mean_logprob(event: Event) -> float:
    assert event.answer is not None
    return event.answer.logprob / max(event.answer.num_tokens, 1)
