"""From tokens to the text that a client sees, in pieces; what may become a stop string waits.

The texts of all pieces joined are the answer; :class:`llm.engine.texts.StopScanner` finds its end.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from data.tokenization.stream import StreamDecoder
from llm.engine.request import Token
from llm.engine.texts import StopScanner


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
    top: tuple[tuple[int, float], ...] = ()  # ids and log-probabilities of the likeliest tokens


@dataclass
class Answer:
    """One generation. ``finish_reason``: ``stop``, ``length``, or ``abort`` until it is finished.

    ``last`` is the last token that was generated, also where a stop string swallowed its text;
    ``logprob`` is the sum over all tokens. ``prompt`` has the scores of the prompt's tokens from
    the second on, where they were asked for.
    """

    pieces: list[Piece] = field(default_factory=list)
    finish_reason: str = "abort"
    matched_stop: str | None = None
    num_tokens: int = 0
    last: Piece | None = None
    logprob: float = 0.0
    prompt: tuple[Token, ...] = ()

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


class TextAssembler:
    """Turns the engine's tokens into pieces, released once no stop string can begin in them.

    Args:
        decoder: of the answer.
        stops: strings that end it.
        keep_stop: what ends the answer, a stop string or a token, is part of its text.
        control: texts of control tokens, by id, where these are part of the text.
    """

    def __init__(
        self,
        decoder: StreamDecoder,
        stops: Iterable[str],
        *,
        keep_stop: bool = False,
        control: Mapping[int, str] | None = None,
    ) -> None:
        self._decoder = decoder
        self._keep_stop = keep_stop
        self._control = control or {}
        self._scanner = StopScanner(stops)
        self._held: deque[tuple[int, Piece]] = deque()  # (where its text starts, piece)
        self._decoded = 0
        self.answer = Answer()

    def push(self, token: Token) -> list[Piece]:
        """Take one token; return the pieces that may be shown now.

        Afterwards ``answer.finish_reason`` is no longer ``abort`` when this token was the last one.
        """
        answer = self.answer
        answer.num_tokens += 1
        answer.logprob += token.logprob
        answer.prompt += token.prompt
        answer.last = Piece(token.token_id, "", token.logprob, special=True, top=token.top)
        is_end_token = token.finish_reason == "stop"
        text = "" if is_end_token and not self._keep_stop else self._text(token.token_id)
        safe = self._append(replace(answer.last, text=text, special=is_end_token))
        if self._scanner.matched is None and token.finish_reason is not None:
            safe = self._finish()
            answer.finish_reason = token.finish_reason
        if self._scanner.matched is not None:
            answer.finish_reason, answer.matched_stop = "stop", self._scanner.matched
            self._cut(self._scanner.matched_end if self._keep_stop else safe)
        done = answer.finish_reason != "abort"
        return self._release(None if done else safe)

    def skip(self, token: Token) -> list[Piece]:
        """End without a token: of this one the prompt's scores alone are wanted."""
        self.answer.prompt = token.prompt
        self.answer.finish_reason = "length"
        return []

    def _text(self, token_id: int) -> str:
        """Return what a token adds to the text."""
        if token_id in self._control:
            return self._decoder.finish() + self._control[token_id]
        return self._decoder.push(token_id)

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
