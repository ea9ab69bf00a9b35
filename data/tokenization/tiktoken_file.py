"""Llama 3.x: a file of base64 tokens and ranks, as Meta publishes it."""

import base64
import binascii
import string
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import tiktoken
from numpy.typing import DTypeLike, NDArray

from common.errors import DataError
from data.tokenization.base import SpecialTokens, Tokenizer
from data.tokenization.model_files import Declared, merge_eos
from data.tokenization.packed import (
    NEWLINE,
    SPACE,
    CutRule,
    PackedEncoder,
    SpaceRuns,
    WordEncoder,
)
from data.tokenization.stream import ByteStreamDecoder, StreamDecoder
from data.tokenization.word_table import Bytes, Encoded, Ints, Ranges

# How Llama 3 cuts a text before byte pair encoding (Meta's llama3/tokenizer.py).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_COUNT = 256
# Offsets from the first control token; the rest are reserved, numbered in order.
NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


class TiktokenTokenizer(Tokenizer):
    """Ids exactly as tiktoken gives them with Llama 3's pattern and 256 control tokens."""

    def __init__(
        self, path: Path, content: bytes, declared: Declared, chat_template: str | None
    ) -> None:
        ranks = read_ranks(path, content)
        ids = special_ids(len(ranks), declared.added)
        names = {text: token_id for token_id, text in ids.items()}
        self._content = content
        self._ranks = ranks
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=names
        )
        super().__init__(
            name=f"tiktoken file {path}",
            vocab_size=max(ids) + 1,
            special=SpecialTokens(
                ids=names,
                bos_id=names.get(declared.bos or NAMED[0], declared.bos_id),
                eos_ids=_eos_ids(names, declared),
                pad_id=names.get(declared.pad or NAMED[4], declared.pad_id),
            ),
            content=content,
            chat_template=chat_template,
            source=path,
        )

    def encode_plain(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_plain_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        if threads == 1:
            return list(map(self._encoding.encode_ordinary, texts))
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=threads)

    def decode_plain(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids))

    def packed_encoder(self, dtype: DTypeLike) -> PackedEncoder:
        return WordEncoder(_PatternRule(self, self._ranks), np.dtype(dtype))

    def stream(self) -> StreamDecoder:
        return ByteStreamDecoder(self._token_bytes)

    def _token_bytes(self, token_id: int) -> bytes:
        self.check_id(token_id)
        if token_id in self.special_text:
            return b""
        return self._encoding.decode_single_token_bytes(token_id)

    def vocabulary_file(self) -> tuple[str, bytes]:
        return "tokenizer.model", self._content


def _among(characters: str) -> NDArray[np.bool_]:
    """[256] whether a byte is one of these ASCII characters."""
    return np.isin(np.arange(256), [ord(character) for character in characters])


_LETTER = _among(string.ascii_letters)
_DIGIT = _among(string.digits)
_WHITE = _among(" \t\n\r\v\f")
# ASCII characters that are not white space; what a byte of another character is, takes more
# than the byte to tell.
_SOLID = (np.arange(256) < 0x80) & ~_WHITE
_OTHER = _SOLID & ~_LETTER & ~_DIGIT
# White space that is not ASCII begins with C2, E1, E2 or E3.
_SOLID_BEGIN = _SOLID | ((np.arange(256) >= 0xC3) & (np.arange(256) < 0xF5))
_SOLID_BEGIN[0xE1:0xE4] = False


def _pairs(*kinds: tuple[NDArray[np.bool_], NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """[65536] pairs of a byte of the one kind and one of the other."""
    pairs = np.zeros((256, 256), bool)
    for before, after in kinds:
        pairs |= before[:, None] & after[None, :]
    return pairs.reshape(-1)


# What to put between two parts so that each is matched as if it stood alone: the space ends the
# one before (white space at its end is matched up to there), and the line break, or the
# letter where it is left out before white space, is not taken up by the one after.
_BREAK = b" a\n"


class _PatternRule(CutRule):
    """Cuts where the pattern `SPLIT` surely begins a new match, whatever stands around.

    - Between letters, digits and other characters, except before letters, which may have one
      other character with them. (Letters and digits that are not ASCII are left whole.)
    - Before a space after a character that is not white space: no alternative goes on with one.
    - Before the last space of a run, if no white space follows: `\\s+(?!\\S)` leaves that
      space, and `\\s*[\\r\\n]+` ends at a line break.
    - After a line break, if only spaces stand between it and such a character: nothing
      goes on after the last line break of a run of white space.
    - Before a line break after a letter or digit: only other characters take it with them.
    """

    prefix = b""
    pairs = _pairs(
        (_LETTER, _OTHER | _DIGIT),
        (_DIGIT, _OTHER | _LETTER),
        (_OTHER, _DIGIT),
        (_SOLID, _among(" ")),
        (_LETTER | _DIGIT, _among("\n")),
        (_among("\n"), _SOLID_BEGIN),
    )

    def __init__(self, tokenizer: TiktokenTokenizer, ranks: Mapping[bytes, int]) -> None:
        self._encode = tokenizer.encode_plain
        # `read_ranks` gives them in the order of their ranks, 0, 1, 2, ...
        self._token_size = np.fromiter(map(len, ranks), np.int64, count=len(ranks))
        self._ranks = ranks

    def mark(self, buffer: Bytes, runs: SpaceRuns, cuts: NDArray[np.bool_]) -> None:
        del buffer
        before_solid = _SOLID_BEGIN[runs.after]
        cuts[runs.first] |= (runs.before == NEWLINE) & before_solid
        cuts[runs.last] |= before_solid

    def encode(self, parts: Ranges) -> Encoded:
        buffer = parts.buffer
        first = buffer[parts.starts]
        together = first < 0x80
        # White space that is not ASCII, with a line break after it, could join a line break.
        for index in np.flatnonzero(~together).tolist():
            together[index] = b"\n" not in parts.content[parts.starts[index] : parts.stops[index]]
        ids, bounds = self._encode_together(parts.take(together))
        offsets, counts = np.zeros(len(parts), np.int64), np.zeros(len(parts), np.int64)
        offsets[together], counts[together] = bounds[0::2], bounds[1::2] - bounds[0::2]
        rows, total = [ids], len(ids)
        for index, word in zip(
            np.flatnonzero(~together).tolist(), parts.take(~together).words(), strict=True
        ):
            row = np.array(self._encode(word.decode()), np.int64)
            rows.append(row)
            offsets[index], counts[index] = total, len(row)
            total += len(row)
        return Encoded(np.concatenate(rows), offsets, counts)

    def _encode_together(self, parts: Ranges) -> tuple[Ints, Ints]:
        """All parts in one call of the library, with something between them that neither side
        takes up; its ids are dealt out by the lengths of their tokens.

        Returns the ids and, for each part, how many of them lie before it and before its end.
        """
        buffer = parts.buffer
        sizes = parts.stops - parts.starts
        white = _WHITE[buffer[parts.starts]]
        frames = np.where(white, len(_BREAK) - 1, len(_BREAK))
        # A word with its space needs nothing after another word.
        follows = np.roll(_SOLID[buffer[parts.stops - 1]], 1)
        frames[follows & (buffer[parts.starts] == SPACE) & _SOLID[buffer[parts.starts + 1]]] = 0
        ends = np.cumsum(frames + sizes)
        begins = ends - sizes
        framed = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
        for position, byte in enumerate(_BREAK):
            needed = frames > position
            framed[(begins - frames)[needed] + position] = byte
        compact = parts.compact()
        index = np.repeat(begins - compact.starts, sizes)
        index += np.arange(len(index))
        framed[index] = compact.buffer[: len(index)]
        ids = np.array(self._encode(framed.tobytes().decode()), np.int64)
        return ids, self._deal_out(ids, np.stack([begins, ends], axis=1).reshape(-1))

    def _deal_out(self, ids: Ints, positions: Ints) -> Ints:
        """How many of `ids` lie before each of these positions in the text."""
        ends = np.append(0, np.cumsum(self._token_size[ids]))
        counts = np.searchsorted(ends, positions)
        assert (ends[counts] == positions).all(), "a token reaches across two parts"
        return counts

    def frequent(self) -> list[bytes]:
        return [
            token
            for token in self._ranks
            if token[:1] == b" " and token[1:].isalpha() and token.isascii()
        ]


def read_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    """Token bytes to rank; the ranks must be 0, 1, 2, ... and the tokens all different."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            encoded, rank = line.split()
            ranks[base64.b64decode(encoded, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(
                f"{path}:{number}: expected a base64 token and its rank, got {line[:60]!r}: the "
                "file is damaged or no tiktoken file"
            ) from None
        if int(rank) != number - 1 or len(ranks) != number:
            raise DataError(
                f"{path}:{number}: expected a new token with rank {number - 1}, got "
                f"{line[:60]!r}: lines are missing, doubled or out of order"
            )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise DataError(
            f"{path} has no token for byte 0x{missing[0]:02x} ({len(ranks)} tokens): the file is "
            "cut off or no tiktoken file"
        )
    return ranks


def special_ids(first: int, added: Mapping[str, int]) -> dict[int, str]:
    """Control tokens by id: Llama 3.1's names, then what the model directory declares."""
    reserved = count()
    names = {
        offset: NAMED.get(offset) or f"<|reserved_special_token_{next(reserved)}|>"
        for offset in range(SPECIAL_COUNT)
    }
    ids = {first + offset: text for offset, text in names.items()}
    for text, token_id in added.items():
        if token_id >= first:
            ids[token_id] = text
    return ids


def _eos_ids(names: Mapping[str, int], declared: Declared) -> tuple[int, ...]:
    if declared.eos_ids or declared.eos:
        return merge_eos(declared.eos_ids, names.get(declared.eos or ""))
    # A lone file: end of text, of turn and of message, since it serves chat models too.
    return tuple(names[NAMED[offset]] for offset in (1, 9, 8))
