"""Where the answer ends that an engine's tokens spell, and answers to many prompts as texts.

A stop string may straddle tokens, so the end of the text that could still become one is held back
until the next token decides. The result is the same however the text is cut into tokens: it ends
before the stop string that completes first (the longest of several that complete together).
"""

from collections.abc import Callable, Iterable, Sequence

from tqdm import tqdm

from data.tokenization.stream import StreamDecoder
from llm.engine.engine import Engine
from llm.engine.request import Request, Token


class StopScanner:
    """Finds stop strings in a text that arrives in pieces."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._tail = ""  # end of the text so far, as long as a stop string may reach back
        self._length = 0
        self.matched: str | None = None
        self.matched_end = 0  # where the match ends

    def push(self, text: str) -> int:
        """Take more text; return how many characters from the start are safe to show.

        After a match (``matched`` is set) that is where the answer ends.
        """
        start = self._length - len(self._tail)
        window = self._tail + text
        self._length += len(text)
        first: tuple[int, int, str] | None = None
        for stop in self._stops:
            # A match has to end in the new text: whatever ended earlier was found earlier.
            position = window.find(stop, max(0, len(self._tail) - len(stop) + 1))
            if position >= 0:
                candidate = (position + len(stop), position, stop)
                first = candidate if first is None else min(first, candidate)
        if first is not None:
            self.matched = first[2]
            self.matched_end = start + first[0]
            return start + first[1]
        held = self._partial_match(window)
        self._tail = window[max(0, len(window) - self._longest + 1) :] if self._longest else ""
        return self._length - held

    def _partial_match(self, window: str) -> int:
        for length in range(min(self._longest - 1, len(window)), 0, -1):
            end = window[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0


class AnswerText:
    """One answer as it grows, up to its first stop string."""

    def __init__(self, decoder: StreamDecoder, stops: Iterable[str]) -> None:
        self._decoder, self._scanner = decoder, StopScanner(stops)
        self.text = ""

    def push(self, token: Token) -> bool:
        """Take the next token; return whether the answer ends with it."""
        text = "" if token.finish_reason == "stop" else self._decoder.push(token.token_id)
        if token.finish_reason is not None:
            text += self._decoder.finish()
        self.text += text
        end = self._scanner.push(text)
        if self._scanner.matched is not None:
            self.text = self.text[:end]
        return token.finish_reason is not None or self._scanner.matched is not None


def generate_texts(
    engine: Engine,
    requests: Sequence[Request],
    decoders: Sequence[StreamDecoder],
    stops: Sequence[Sequence[str]] | None = None,
    on_answer: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Answer requests together; each ends at its first stop string, which is left out.

    Args:
        engine: with room for every prompt and its answer.
        requests: prompts and how to answer.
        decoders: one for each request.
        stops: texts that end each request's answer; empty ones do not count.
        on_answer: called with a request's number and its answer as soon as that has ended.

    Raises:
        UserError: a request that the engine refuses; raised before any runs. After all others are
            answered, a :class:`BrokenLogitsError` that names requests from 1.
    """
    ends = stops or [()] * len(requests)
    answers = [AnswerText(*pair) for pair in zip(decoders, ends, strict=True)]
    with tqdm(total=len(requests), desc="answers", disable=None, leave=False) as bar:

        def push(number: int, token: Token) -> bool:
            finished = answers[number].push(token)
            bar.update(finished)
            if finished and on_answer is not None:
                on_answer(number, answers[number].text)
            return finished

        engine.generate(requests, push)
    return [answer.text for answer in answers]
