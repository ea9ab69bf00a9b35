"""Llama 3.x: a file of base64 tokens and ranks, as Meta publishes it."""

import base64
import binascii
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray

from common.errors import DataError
from data.tokenization.added_tokens import AddedToken
from data.tokenization.base import SpecialTokens
from data.tokenization.fence import fenced
from data.tokenization.model_files import Declared, merge_eos, numbered
from data.tokenization.packed import (
    NEWLINE,
    SPACE,
    CutRule,
    PackedEncoder,
    SpaceRuns,
    WordEncoder,
)
from data.tokenization.split import SplitTokenizer
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


# How Meta's code cuts what the library cannot match at once (llama3/tokenizer.py).
LONGEST_TEXT = 400_000
LONGEST_RUN = 25_000
# White space in a row, line breaks apart, for which the library's pattern has a stack; and the
# length from which a text is looked at for that.
STACK = 999_998
_RUNS = re.compile(r"\s+|\S+")
_WHITE_RUNS = re.compile(r"\s+")
_SPACE_RUNS = re.compile(r"[^\S\r\n]+")


class TiktokenTokenizer(SplitTokenizer):
    """Ids exactly as tiktoken gives them with Llama 3's pattern and 256 control tokens.

    What tiktoken cannot encode, such as a million spaces in a row, is cut as Meta's own code cuts.
    """

    def __init__(
        self, path: Path, content: bytes, declared: Declared, templates: Mapping[str, str]
    ) -> None:
        ranks = read_ranks(path, content)
        added = added_tokens(ranks, declared, path)
        names = {token.content: token_id for token_id, token in added.items()}
        beyond = {text: token_id for text, token_id in names.items() if token_id >= len(ranks)}
        self._ranks = ranks
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=beyond
        )
        super().__init__(
            name=f"tiktoken file {path}",
            vocab_size=max(added) + 1,
            special=SpecialTokens(
                ids={token.content: one for one, token in added.items() if token.special},
                bos_id=names.get(declared.bos or NAMED[0], declared.bos_id),
                eos_ids=_eos_ids(names, declared),
                pad_id=names.get(declared.pad or NAMED[4], declared.pad_id),
            ),
            added=added,
            own=_meta(len(ranks)),
            content=content,
            declared=declared,
            templates=templates,
            source=path,
        )

    def encode_raw(
        self, texts: Sequence[str], bare: Sequence[bool], threads: int
    ) -> list[list[int]]:
        del bare
        whole = [self.encode_long(text) for text in texts]
        short = [text for text, ids in zip(texts, whole, strict=True) if ids is None]
        with fenced(self.name, short):
            if threads == 1 or len(short) == 1:
                rows = iter(list(map(self._encoding.encode_ordinary, short)))
            else:
                rows = iter(self._encoding.encode_ordinary_batch(short, num_threads=threads))
        return [next(rows) if ids is None else ids for ids in whole]

    def encode_long(self, text: str) -> list[int] | None:
        """Ids of a text with more white space in a row than is for the library; else None."""
        if len(text) <= STACK or not _has_run(_WHITE_RUNS, text):
            return None
        if not _has_run(_SPACE_RUNS, text):
            try:
                with fenced(self.name, [text]):
                    return self._encoding.encode_ordinary(text)
            except DataError:  # other mixtures of white space
                pass
        with fenced(self.name, [text]):
            return list(chain.from_iterable(map(self._encoding.encode_ordinary, cut_long(text))))

    def decode_tokens(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids))

    def raw_encoder(self, dtype: np.dtype[Any]) -> PackedEncoder:
        return WordEncoder(_PatternRule(self, self._ranks), dtype)

    def stream(self) -> StreamDecoder:
        return ByteStreamDecoder(self.token_bytes)

    def token_bytes(self, token_id: int) -> bytes:
        self.check_id(token_id)
        if token_id in self.special_text:
            return b""
        return self._encoding.decode_single_token_bytes(token_id)

    def vocabulary_file(self) -> tuple[str, bytes]:
        return "tokenizer.model", self._content


def _has_run(kind: re.Pattern[str], text: str) -> bool:
    return any(run.end() - run.start() > STACK for run in kind.finditer(text))


def cut_long(text: str) -> Iterator[str]:
    """A text in pieces of at most 400,000 characters, in which nothing that is all white space, or
    all something else, is longer than 25,000, as Meta's code cuts it.
    """
    for first in range(0, len(text), LONGEST_TEXT):
        part = text[first : first + LONGEST_TEXT]
        starts = [0]
        for run in _RUNS.finditer(part):
            starts += range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)
        for start, stop in pairwise([*starts, len(part)]):
            yield part[start:stop]


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
        self._encode_many = tokenizer.encode_raw
        self._encode_long = tokenizer.encode_long
        # `read_ranks` gives them in the order of their ranks, 0, 1, 2, ...
        self._token_size = np.fromiter(map(len, ranks), np.int64, count=len(ranks))
        self._ranks = ranks

    def mark(self, buffer: Bytes, runs: SpaceRuns, cuts: NDArray[np.bool_]) -> None:
        del buffer
        before_solid = _SOLID_BEGIN[runs.after]
        cuts[runs.first] |= (runs.before == NEWLINE) & before_solid
        cuts[runs.last] |= before_solid

    def _encode(self, text: str) -> list[int]:
        return self._encode_many([text], [False], 1)[0]

    def encode_whole(self, text: str) -> list[int] | None:
        return self._encode_long(text)

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


def _meta(first: int) -> dict[int, AddedToken]:
    """Control tokens of Llama 3.1 by id, the first of which is `first`."""
    reserved = count()
    names = (
        NAMED.get(n) or f"<|reserved_special_token_{next(reserved)}|>" for n in range(SPECIAL_COUNT)
    )
    return {
        first + offset: AddedToken(text, special=True, normalized=False)
        for offset, text in enumerate(names)
    }


def added_tokens(
    ranks: Mapping[bytes, int], declared: Declared, path: Path
) -> dict[int, AddedToken]:
    """Llama 3.1's control tokens, and in their place or after them what the directory declares."""
    first = len(ranks)
    taken = {token.content for token in declared.added.values()}
    added = {
        one: replace(token, content=f"<|reserved_token_{one}|>")
        if token.content in taken
        else token
        for one, token in _meta(first).items()
    }
    added.update(declared.added)
    texts = [token.content for token in (*declared.added.values(), *declared.named)]
    # As transformers has it, who spells bytes as characters: others are new to the vocabulary.
    plain = [text for text in texts if re.fullmatch(r"[!-~]+", text)]
    own = {text: ranks[text.encode()] for text in plain if text.encode() in ranks}
    return numbered(replace(declared, added=added), own, first, path)


def _eos_ids(names: Mapping[str, int], declared: Declared) -> tuple[int, ...]:
    if declared.eos_ids or declared.eos:
        return merge_eos(declared.eos_ids, names.get(declared.eos or ""))
    # A lone file: end of text, of turn and of message, since it serves chat models too.
    return tuple(names[NAMED[offset]] for offset in (1, 9, 8))
