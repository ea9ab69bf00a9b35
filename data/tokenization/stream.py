"""Decoders that take ids one by one and never give out half a character."""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol


class StreamDecoder(ABC):
    """Ids in, text out. The texts joined are `Tokenizer.decode` of all the ids."""

    @abstractmethod
    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a character is still incomplete."""

    def settle(self) -> None:
        """Let all that is complete count as given; for ids before those whose text is wanted."""
        return

    @abstractmethod
    def finish(self) -> str:
        """What is left at the end: U+FFFD for bytes that never became a character."""


def _one_mark_per_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


# sentencepiece writes one U+FFFD for each byte that is not UTF-8, Python's "replace" (which
# tiktoken uses) one for each broken sequence.
PER_BYTE = "data.one_mark_per_byte"
codecs.register_error(PER_BYTE, _one_mark_per_byte)


class ByteStreamDecoder(StreamDecoder):
    """For tokenizers whose tokens are byte strings.

    Args:
        token_bytes: bytes of an id, b"" for a control token.
        errors: the codec error handler for bytes that are not UTF-8.
        first_bytes: what to use instead for the first token that has any, because the encoder
            puts a space before a text.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        *,
        errors: str = "replace",
        first_bytes: Callable[[int], bytes] | None = None,
    ) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._first_bytes = first_bytes

    def push(self, token_id: int) -> str:
        content = self._token_bytes(token_id)
        if content and self._first_bytes is not None:
            content = self._first_bytes(token_id)
            self._first_bytes = None
        return self._decoder.decode(content)

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Decodes(Protocol):
    @property
    def special_text(self) -> dict[int, str]: ...

    def check_id(self, token_id: int) -> None: ...

    def decode_tokens(self, ids: list[int]) -> str: ...


class WindowStreamDecoder(StreamDecoder):
    """For any tokenizer: decodes a short window of ids again for each new one.

    The window begins some ids before the first one whose text is still unknown, because a
    decoder may treat the beginning of a text differently from its middle.

    Args:
        tokenizer: decodes.
        is_byte: says of an id whether it is a byte that is decoded together with the bytes around
            it, so that its text is known only when another token comes.
    """

    def __init__(self, tokenizer: _Decodes, is_byte: Callable[[int], bool] | None = None) -> None:
        self._tokenizer = tokenizer
        self._is_byte = is_byte
        self._window: list[int] = []
        self._known = 0  # how many ids of the window have given their text already

    def push(self, token_id: int) -> str:
        self._tokenizer.check_id(token_id)
        if token_id in self._tokenizer.special_text:
            return ""
        self._window.append(token_id)
        if self._is_byte is not None and self._is_byte(token_id):
            return ""
        text = self._tokenizer.decode_tokens(self._window)
        if text.endswith("\ufffd"):
            return ""
        return self._advance(text)

    def settle(self) -> None:
        if self._known == len(self._window):
            return  # to go on from nothing would take the next text for the beginning of one
        text = self._tokenizer.decode_tokens(self._window)
        if not text.endswith("\ufffd"):
            self._advance(text)

    def finish(self) -> str:
        return self._advance(self._tokenizer.decode_tokens(self._window))

    def _advance(self, text: str) -> str:
        known = self._tokenizer.decode_tokens(self._window[: self._known])
        self._window = self._window[self._known :]
        self._known = len(self._window)
        return text[len(known) :]
