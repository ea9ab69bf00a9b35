"""Llama 1 and 2: a sentencepiece model file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from common.errors import DataError
from data.tokenization.added_tokens import AddedToken, SpecialTokens
from data.tokenization.bulk import SPACE, bulk_encoder, piece_models
from data.tokenization.fence import fenced
from data.tokenization.model_files import Declared, merge_eos, numbered
from data.tokenization.packed import PackedEncoder
from data.tokenization.split import SplitTokenizer
from data.tokenization.stream import (
    PER_BYTE,
    ByteStreamDecoder,
    StreamDecoder,
    WindowStreamDecoder,
)

BPE = 2
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # piece types in sentencepiece_model.proto


# Appended to a model file, this overrides its add_dummy_prefix (field 3 of field 3) with false.
_NO_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(SplitTokenizer):
    """Ids exactly as the sentencepiece library gives them, leading space included.

    Parts of a text between added tokens are encoded each as a text of its own, which is how
    Meta's code and the training of Llama 2 treat turns of a conversation. A directory whose
    tokenizer_config.json has "legacy": false wants the space before the first part of a text alone,
    and with "add_prefix_space": false none, as in transformers.
    """

    worth_making = 2_000_000

    def __init__(
        self, path: Path, content: bytes, declared: Declared, templates: Mapping[str, str]
    ) -> None:
        self._processor = load_processor(path, content)
        self._pieces = self._processor.get_piece_size()
        own, added = self._added(path, declared)
        super().__init__(
            name=f"sentencepiece model {path}",
            vocab_size=max(self._pieces, *(token_id + 1 for token_id in added)),
            special=self._special(added, declared),
            added=added,
            own=own,
            content=content,
            declared=declared,
            templates=templates,
            source=path,
            prefix=declared.prefix,
        )

    def _added(
        self, path: Path, declared: Declared
    ) -> tuple[dict[int, AddedToken], dict[int, AddedToken]]:
        """The model's own control tokens, and these with what is declared."""
        processor = self._processor
        pieces = {processor.id_to_piece(i): i for i in range(self._pieces)}
        own = {
            i: AddedToken(processor.id_to_piece(i), special=True, normalized=False)
            for i in range(self._pieces)
            if processor.is_control(i) or processor.is_unknown(i)
        }
        return own, {**own, **numbered(declared, pieces, self._pieces, path)}

    def _special(self, added: Mapping[int, AddedToken], declared: Declared) -> SpecialTokens:
        processor = self._processor
        every = {token.content: token_id for token_id, token in added.items()}
        eos = every.get(declared.eos or "")
        return SpecialTokens(
            ids={token.content: token_id for token_id, token in added.items() if token.special},
            bos_id=every.get(declared.bos or "", _present(processor.bos_id())),
            eos_ids=merge_eos(declared.eos_ids, eos, _present(processor.eos_id())),
            pad_id=every.get(declared.pad or "", _present(processor.pad_id())),
        )

    @cached_property
    def _bare(self) -> sentencepiece.SentencePieceProcessor:
        return load_processor(self.source, self._content + _NO_PREFIX)

    @cached_property
    def _model(self) -> "_Model":
        return read_model(self._content)

    def encode_raw(
        self, texts: Sequence[str], bare: Sequence[bool], threads: int
    ) -> list[list[int]]:
        rows: list[list[int]] = [[]] * len(texts)
        with fenced(self.name, texts):
            for inside in sorted(set(bare)):
                processor = self._bare if inside else self._processor
                which = [index for index, one in enumerate(bare) if one == inside]
                some = processor.encode([texts[index] for index in which], num_threads=threads)
                for index, row in zip(which, some, strict=True):
                    rows[index] = row
        return rows

    def decode_tokens(self, ids: Sequence[int]) -> str:
        if self._model.plain_decoding and any(token_id in self.added for token_id in ids):
            decoder = self._decoder(self._shown_bytes)
            return "".join(map(decoder.push, ids)) + decoder.finish()
        texts = []
        for is_added, run in groupby(ids, self.added.__contains__):
            if is_added:
                texts += [self._shown_bytes(token_id).decode() for token_id in run]
            else:
                texts.append(self._processor.decode(list(run)))
        return "".join(texts)

    def raw_encoder(self, dtype: np.dtype[Any]) -> PackedEncoder:
        if not self._model.only_merges or not self._scores_differ():
            return super().raw_encoder(dtype)
        return bulk_encoder(
            self.name, self.bulk_models, self.encode_raw, _none_apart, self._texts, dtype
        )

    def _scores_differ(self) -> bool:
        """Whether no two normal pieces have the same score, but for runs of spaces."""
        scores = [
            score for text, score, kind in self.pieces() if kind == NORMAL and text.strip(SPACE)
        ]
        return len(set(scores)) == len(scores)

    def bulk_models(self) -> list[bytes]:
        """tokenizer.json with which gigatoken gives the same ids; see `BulkEncoder`."""
        pieces = self.pieces()
        ids = {text: number for number, (text, _, _) in enumerate(pieces)}
        return piece_models([(text, score) for text, score, kind in pieces if kind == NORMAL], ids)

    def _texts(self) -> list[str]:
        return [text.replace(SPACE, " ") for text, _ in self._model.pieces]

    def stream(self) -> StreamDecoder:
        if not self._model.plain_decoding:
            return WindowStreamDecoder(self)
        return self._decoder(self.token_bytes)

    def _decoder(self, token_bytes: Callable[[int], bytes]) -> StreamDecoder:
        def first_bytes(token_id: int) -> bytes:
            content = token_bytes(token_id)
            if token_id in self.added:
                return content.removeprefix(b" ")
            return content[self._model.pieces[token_id][0].startswith(SPACE) :]

        first = first_bytes if self._model.add_dummy_prefix else None
        return ByteStreamDecoder(token_bytes, errors=PER_BYTE, first_bytes=first)

    def token_bytes(self, token_id: int) -> bytes:
        self.check_id(token_id)
        return b"" if token_id in self.special_text else self._shown_bytes(token_id)

    def _shown_bytes(self, token_id: int) -> bytes:
        if token_id in self.added:
            return self.added[token_id].content.replace(SPACE, " ").encode()
        piece, kind = self._model.pieces[token_id]
        if kind == BYTE:
            return bytes([int(piece[3:5], 16)])
        if kind == UNKNOWN:
            return self._model.unknown_surface
        return piece.replace(SPACE, " ").encode()

    def pieces(self) -> list[tuple[str, float, int]]:
        """Text, score and type of every piece of the model file, by id."""
        score = self._processor.get_score
        return [(text, score(i), kind) for i, (text, kind) in enumerate(self._model.pieces)]

    def vocabulary_file(self) -> tuple[str, bytes]:
        return "tokenizer.model", self._content

    def config(self) -> dict[str, Any]:
        return {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": True,
            **super().config(),
            "unk_token": self._processor.id_to_piece(self._processor.unk_id()),
        }


def _none_apart(texts: Sequence[str]) -> list[bool]:
    return [False] * len(texts)


def _present(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None


def load_processor(path: Path, content: bytes) -> sentencepiece.SentencePieceProcessor:
    """The library's object for a model file's content; `DataError` if it is not one."""
    try:
        read_model(content)
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except (RuntimeError, OSError, ValueError, IndexError) as error:
        raise DataError(
            f"{path} is not a sentencepiece model, or is damaged ({len(content)} bytes): {error}"
        ) from error


@dataclass(frozen=True)
class _Model:
    """The parts of a model file that the library does not tell."""

    pieces: list[tuple[str, int]]
    model_type: int = 1
    whitespace_suffix: bool = False
    byte_fallback: bool = False
    unknown_surface: bytes = " \u2047 ".encode()
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    normalizes: bool = False
    denormalizes: bool = False

    @property
    def plain_decoding(self) -> bool:
        """Whether the text is just the pieces one after the other."""
        return (
            self.escape_whitespaces
            and not self.remove_extra_whitespaces
            and not self.whitespace_suffix
            and not self.denormalizes
        )

    @property
    def only_merges(self) -> bool:
        """Whether ids are what merges of pieces lead to, from a space and the text's characters."""
        normal = {piece for piece, kind in self.pieces if kind == NORMAL}
        return (
            self.model_type == BPE
            and self.byte_fallback
            and self.add_dummy_prefix
            and self.plain_decoding
            and not self.normalizes
            and all(kind in (NORMAL, UNKNOWN, CONTROL, BYTE) for _, kind in self.pieces)
            and normal.issuperset(character for piece in normal for character in piece)
        )


def read_model(content: bytes) -> _Model:
    """Read sentencepiece_model.proto's fields; `ValueError` if it is not such a message.

    The library's own protobuf classes need a newer protobuf than paddlenlp allows.
    """
    pieces: list[tuple[str, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    denormalizer: dict[int, Any] = {}
    for number, value in _fields(content):
        if number == 1:
            piece = dict(_fields(_bytes(value)))
            pieces.append((_bytes(piece.get(1, b"")).decode(), int(piece.get(3, NORMAL))))
        elif number in (2, 3, 5):
            target = {2: trainer, 3: normalizer, 5: denormalizer}[number]
            target.update(_fields(_bytes(value)))
    if not pieces:
        raise ValueError("it holds no pieces")
    return _Model(
        pieces=pieces,
        model_type=trainer.get(3, 1),
        whitespace_suffix=bool(trainer.get(24, 0)),
        byte_fallback=bool(trainer.get(35, 0)),
        unknown_surface=trainer.get(44, _Model.unknown_surface),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
        normalizes=bool(normalizer.get(2)),
        denormalizes=bool(denormalizer.get(2)),
    )


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field has the wrong type")
    return value


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) pairs of a protobuf message: int for varints, bytes otherwise."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"unknown wire type {wire} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"cut off: a field of {size} bytes begins at byte {at}")
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise ValueError(f"cut off or not a number at byte {at}")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
