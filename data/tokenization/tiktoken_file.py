"""Llama 3.x: a file of base64 tokens and ranks, as Meta publishes it."""

import base64
import binascii
import functools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray

from common.errors import DataError
from data.tokenization.added_tokens import AddedToken, SpecialTokens
from data.tokenization.bulk import bulk_encoder
from data.tokenization.byte_level import LLAMA3_SPLIT, merges_of_ranks, split, tokenizer_json
from data.tokenization.fence import fenced
from data.tokenization.model_files import Declared, merge_eos, numbered
from data.tokenization.packed import PackedEncoder
from data.tokenization.split import SplitTokenizer
from data.tokenization.stream import ByteStreamDecoder, StreamDecoder

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
# No letters or digits lie behind the fourth plane of Unicode.
LAST_PLANE = 0x40000
_RUNS = re.compile(r"\s+|\S+")
_WHITE_RUNS = re.compile(r"\s+")
_SPACE_RUNS = re.compile(r"[^\S\r\n]+")


class TiktokenTokenizer(SplitTokenizer):
    """Ids exactly as tiktoken gives them with Llama 3's pattern and 256 control tokens.

    What tiktoken cannot encode, such as a million spaces in a row, is cut as Meta's own code cuts.
    """

    worth_making = 10_000_000

    def __init__(
        self, path: Path, content: bytes, declared: Declared, templates: Mapping[str, str]
    ) -> None:
        ranks = read_ranks(path, content)
        added = added_tokens(ranks, declared, path)
        names = {token.content: token_id for token_id, token in added.items()}
        beyond = {text: token_id for text, token_id in names.items() if token_id >= len(ranks)}
        self.ranks = ranks
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=beyond
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
        return bulk_encoder(
            self.name, self.bulk_models, self.encode_raw, _apart, self._texts, dtype
        )

    def bulk_models(self) -> list[bytes]:
        """tokenizer.json with which gigatoken gives the same ids; see `BulkEncoder`."""
        tokens, merges = merges_of_ranks(self.ranks)
        ids = {token: number for number, token in enumerate(tokens)}
        return [tokenizer_json(ids, merges, split(LLAMA3_SPLIT), whole_words=True)]

    def _texts(self) -> list[str]:
        return [token.decode(errors="ignore") for token in self.ranks]

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
    # Few texts have so much white space at all, and counting it is fast.
    if len(text) - sum(map(len, text.split())) <= STACK:
        return False
    return any(run.end() - run.start() > STACK for run in kind.finditer(text))


def _apart(texts: Sequence[str]) -> list[bool]:
    """Which texts gigatoken is not asked for: those with more white space than tiktoken can match,
    and with characters so new that the two take them from different releases of Unicode.
    """
    wide = [text for text in texts if not text.isascii()]
    new = bool(wide) and _has_unknown("".join(wide))
    return [
        (len(text) > STACK and _has_run(_WHITE_RUNS, text)) or (new and _has_unknown(text))
        for text in texts
    ]


def _has_unknown(text: str) -> bool:
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return bool(_unknown().take(points, mode="clip").any())


@functools.cache
def _unknown() -> NDArray[np.bool_]:
    """Which characters Python's tables do not know, which are older than the libraries'."""
    return np.array([unicodedata.category(chr(one)) == "Cn" for one in range(LAST_PLANE)] + [False])


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
