"""From token ids to the text that a client sees: detokenising, stop strings, held-back ends.

A stop string may straddle tokens, so the end of the text that could still become one is held back
until the next token decides. The result is the same however the text is cut into tokens: it ends
before the stop string that completes first (the longest of several that complete together).
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from llm.engine.sequence import Step


class Decoder(Protocol):
    """Incremental detokeniser (``data.tokenizer.StreamDecoder``)."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


@dataclass
class Piece:
    """One generated token with the text it added.

    The texts of all pieces joined are exactly the answer. A token that only begins a character has
    an empty text, and the token that completes it has the whole character.
    """

    token_id: int
    text: str
    logprob: float
    special: bool = False


@dataclass
class Answer:
    """One generation. ``finish_reason``: ``stop``, ``length``, or ``abort`` until it is finished.

    ``last`` is the last token that was generated, also where a stop string swallowed its text.
    """

    pieces: list[Piece] = field(default_factory=list)
    finish_reason: str = "abort"
    matched_stop: str | None = None
    num_tokens: int = 0
    last: Piece | None = None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


class StopScanner:
    """Finds stop strings in a text that arrives in pieces."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._tail = ""  # end of the text so far, as long as a stop string may reach back
        self._length = 0
        self.matched: str | None = None

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


class TextAssembler:
    """Turns engine steps into pieces, released once no stop string can begin in them."""

    def __init__(self, decoder: Decoder, stops: Iterable[str]) -> None:
        self._decoder = decoder
        self._scanner = StopScanner(stops)
        self._held: deque[tuple[int, Piece]] = deque()  # (where its text starts, piece)
        self._decoded = 0
        self.answer = Answer()

    def push(self, step: Step) -> list[Piece]:
        """Take one step; return the pieces that may be shown now.

        Afterwards ``answer.finish_reason`` is no longer ``abort`` when this step was the last one.
        """
        answer = self.answer
        answer.num_tokens += 1
        answer.last = Piece(step.token_id, "", step.logprob, special=True)
        is_end_token = step.finish_reason == "stop"
        text = "" if is_end_token else self._decoder.push(step.token_id)
        safe = self._append(Piece(step.token_id, text, step.logprob, special=is_end_token))
        if self._scanner.matched is None and step.finish_reason is not None:
            safe = self._finish()
            answer.finish_reason = step.finish_reason
        if self._scanner.matched is not None:
            answer.finish_reason, answer.matched_stop = "stop", self._scanner.matched
            self._cut(safe)
        done = answer.finish_reason != "abort"
        return self._release(None if done else safe)

    def _append(self, piece: Piece) -> int:
        self._held.append((self._decoded, piece))
        self._decoded += len(piece.text)
        return self._scanner.push(piece.text)

    def _finish(self) -> int:
        """Flush an unfinished character into the last token that is text."""
        rest = self._decoder.finish()
        if not rest:
            return self._decoded
        for _, piece in reversed(self._held):
            if not piece.special:
                piece.text += rest
                break
        else:
            self._held[-1][1].text += rest
        self._decoded += len(rest)
        return self._scanner.push(rest)

    def _cut(self, end: int) -> None:
        """Drop what lies behind ``end``; a token that straddles it keeps its front part."""
        kept = deque()
        for start, piece in self._held:
            if start < end or (start == end and not piece.text):
                piece.text = piece.text[: end - start]
                kept.append((start, piece))
        self._held = kept

    def _release(self, safe: int | None) -> list[Piece]:
        released = []
        while self._held:
            start, piece = self._held[0]
            if safe is not None and start + len(piece.text) > safe:
                break
            released.append(self._held.popleft()[1])
        self.answer.pieces += released
        return released
