"""Llama 3.x: a file of base64 tokens and ranks, as Meta publishes it."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import tiktoken
from numpy.typing import DTypeLike, NDArray

from data.errors import DataError
from data.tokenization.base import SpecialTokens, Tokenizer
from data.tokenization.model_files import Declared, merge_eos
from data.tokenization.packed import NEWLINE, SPACE, CutRule, PackedEncoder, SpaceRuns, WordEncoder
from data.tokenization.stream import ByteStreamDecoder, StreamDecoder
from data.tokenization.word_table import Bytes, Encoded, Ints

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


# Bytes that surely are, or begin, a character that is not white space.
_SOLID_BEGIN = np.zeros(256, bool)
_SOLID_BEGIN[0x21:0x7F] = True
_SOLID_BEGIN[0xC3:0xF5] = True
# Non-ASCII white space begins with C2, E1, E2 or E3.
_SOLID_BEGIN[0xE1:0xE4] = False
# After other bytes it would take the whole character to tell.
_SOLID_END = np.zeros(256, bool)
_SOLID_END[0x21:0x7F] = True
_ALPHANUMERIC = np.array([chr(byte).isascii() and chr(byte).isalnum() for byte in range(256)])


class _PatternRule(CutRule):
    """Cuts where the pattern `SPLIT` surely begins a new match, whatever stands around.

    - Before a space after a character that is not white space: no alternative goes on with one.
    - Before the last space of a run, if no white space follows: `\\s+(?!\\S)` leaves that
      space, and `\\s*[\\r\\n]+` ends at a line break.
    - After a line break, if only spaces stand between it and such a character: nothing
      goes on after the last line break of a run of white space.
    - Before a line break after a letter or digit: only punctuation takes line breaks with it.
    """

    prefix = b""

    def __init__(self, tokenizer: TiktokenTokenizer, ranks: Mapping[bytes, int]) -> None:
        self._encode = tokenizer.encode_plain
        self._token_size = np.zeros(len(ranks), np.int64)
        for token, rank in ranks.items():
            self._token_size[rank] = len(token)
        self._frequent = [
            token
            for token in ranks
            if token[:1] == b" " and token[1:].isalpha() and token.isascii()
        ]

    def mark(self, buffer: Bytes, runs: SpaceRuns, cuts: NDArray[np.bool_]) -> None:
        before_solid = _SOLID_BEGIN[runs.after]
        cuts[runs.first] = _SOLID_END[runs.before] | ((runs.before == NEWLINE) & before_solid)
        cuts[runs.last] |= before_solid
        newlines = np.flatnonzero(buffer == NEWLINE)
        cuts[newlines] |= _ALPHANUMERIC[buffer[newlines - 1]]
        cuts[newlines + 1] |= _SOLID_BEGIN[buffer[newlines + 1]]

    def encode(self, parts: Sequence[bytes]) -> Encoded:
        # One call of the library for all parts that may follow each other: its ids are then
        # dealt out by the lengths of their tokens.
        sizes = np.array([len(part) for part in parts], np.int64)
        ends = np.cumsum(sizes)
        buffer = np.frombuffer(b"".join(parts) + b"\0", np.uint8)
        begins = ends - sizes
        joinable = (buffer[begins] == SPACE) & _SOLID_BEGIN[buffer[begins + 1]]
        joinable &= (sizes > 1) & _SOLID_END[buffer[ends - 1]]
        joined = [part for part, joins in zip(parts, joinable.tolist(), strict=True) if joins]
        ids = np.array(self._encode(b"".join(joined).decode()), np.int64)
        counts = np.zeros(len(parts), np.int64)
        counts[joinable] = self._deal_out(ids, sizes[joinable])
        offsets = np.zeros(len(parts), np.int64)
        offsets[joinable] = np.cumsum(counts[joinable]) - counts[joinable]
        total = len(ids)
        rows = [ids]
        for index in np.flatnonzero(~joinable).tolist():
            row = np.array(self._encode(parts[index].decode()), np.int64)
            rows.append(row)
            offsets[index], counts[index] = total, len(row)
            total += len(row)
        return Encoded(np.concatenate(rows), offsets, counts)

    def _deal_out(self, ids: Ints, sizes: Ints) -> Ints:
        """How many of `ids` belong to each of the parts that were joined."""
        ends = np.cumsum(self._token_size[ids])
        part_ends = np.cumsum(sizes)
        last = np.searchsorted(ends, part_ends)
        assert (ends[last] == part_ends).all(), "a token reaches across two parts"
        return np.diff(last, prepend=-1)

    def frequent(self) -> list[bytes]:
        return self._frequent


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
