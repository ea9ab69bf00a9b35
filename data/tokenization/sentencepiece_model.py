"""Llama 1 and 2: a sentencepiece model file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from common.errors import DataError
from data.tokenization.added_tokens import AddedToken
from data.tokenization.base import SpecialTokens
from data.tokenization.fence import fenced
from data.tokenization.model_files import Declared, merge_eos, numbered
from data.tokenization.packed import (
    NEWLINE,
    SEPARATOR,
    CutRule,
    PackedEncoder,
    SpaceRuns,
    WordEncoder,
)
from data.tokenization.split import SplitTokenizer
from data.tokenization.stream import (
    PER_BYTE,
    ByteStreamDecoder,
    StreamDecoder,
    WindowStreamDecoder,
)
from data.tokenization.word_table import Bytes, Encoded, Ranges

SPACE = "\u2581"  # sentencepiece writes a space so
SPACE_SIGN = SPACE.encode()
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
        if self._model.cuts_at_spaces:
            return WordEncoder(_PieceRule(self, self._model), dtype)
        return super().raw_encoder(dtype)

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

    def plain_words(self) -> list[bytes]:
        """The pieces that are a space and ASCII letters, as they stand in a text."""
        pieces = (piece for piece, _ in self._model.pieces)
        return [
            b" " + piece[1:].encode()
            for piece in pieces
            if piece[:1] == SPACE and piece[1:].isalpha() and piece[1:].isascii()
        ]

    def vocabulary_file(self) -> tuple[str, bytes]:
        return "tokenizer.model", self._content

    def _config(self) -> dict[str, Any]:
        return {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": True,
            **super()._config(),
            "unk_token": self._processor.id_to_piece(self._processor.unk_id()),
        }


class _PieceRule(CutRule):
    """Cuts before runs of spaces, and between two bytes that stand together in no piece.

    Exact for a BPE model in which no piece has a space sign after another character: no merge can
    then reach across a cut, so both sides are encoded as if they stood alone. The space that
    sentencepiece puts before any text stands for the first space of a part; a part without
    one is encoded after a line break, which is a piece of its own.
    """

    prefix = b" "

    def __init__(self, tokenizer: SentencePieceTokenizer, model: "_Model") -> None:
        self._encode = tokenizer.encode_raw
        self._newline_ids = len(tokenizer.encode_raw(["\n"], [False], 1)[0])
        self._plain_words = tokenizer.plain_words
        self.pairs = model.separate_bytes()

    def mark(self, buffer: Bytes, runs: SpaceRuns, cuts: NDArray[np.bool_]) -> None:
        del buffer
        # Pieces of several spaces exist, and a space sign in the text is a space to
        # sentencepiece: a run goes on after one. At the end of a text no space is cut off, since
        # encoding the empty text does not give one.
        cuts[runs.first] = (runs.before != SPACE_SIGN[-1]) & (runs.after != SEPARATOR)

    def encode(self, parts: Ranges) -> Encoded:
        # A part that does not begin with a space is encoded after a line break, whose ids are left
        # out. The empty text would give no id for a lone space, the line break gives it one.
        spaced = parts.buffer[parts.starts] == ord(" ")
        lone = spaced & (parts.stops - parts.starts == 1)
        plain = (spaced & ~lone).tolist()
        own = Ranges(parts.content, parts.starts + spaced, parts.stops)
        texts = [
            text if has_space else "\n" + text
            for text, has_space in zip(map(bytes.decode, own.words()), plain, strict=True)
        ]
        rows = self._encode(texts, [False] * len(texts), 1) if texts else []
        counts = np.fromiter(map(len, rows), np.int64, count=len(rows))
        offsets = np.cumsum(counts) - counts
        ids = np.fromiter(chain.from_iterable(rows), np.int64, count=int(counts.sum()))
        # [space, line break] + its own ids; of a lone space the first is its own.
        offsets[~spaced] += self._newline_ids
        counts[~spaced] -= self._newline_ids
        counts[lone] -= 1
        return Encoded(ids, offsets, counts)

    def frequent(self) -> list[bytes]:
        return self._plain_words()


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
    def cuts_at_spaces(self) -> bool:
        """Whether `_PieceRule` is exact for this model."""
        return (
            self.model_type == BPE
            and self.byte_fallback
            and self.add_dummy_prefix
            and self.plain_decoding
            and not self.normalizes
            and all(kind in (NORMAL, UNKNOWN, CONTROL, BYTE) for _, kind in self.pieces)
            and not any(SPACE in piece.lstrip(SPACE) for piece, _ in self.pieces)
        )

    def separate_bytes(self) -> NDArray[np.bool_]:
        """[65536] 256 * a + b: whether bytes a and b belong to two characters that stand side by
        side in no piece. Nothing is said of spaces and of what may be a space sign.
        """
        separate = np.ones((256, 256), bool)
        for piece, kind in self.pieces:
            content = piece.encode()
            if kind == NORMAL and len(content) > 1:
                separate[list(content[:-1]), list(content[1:])] = False
        if not separate[NEWLINE].all() or not separate[:, NEWLINE].all():
            # Parts without a space before them could not be encoded.
            return np.zeros(65536, bool)
        separate[:, 0x80:0xC0] = False
        separate[:, SPACE_SIGN[0]] = separate[SPACE_SIGN[-1]] = False
        separate[:, ord(" ")] = separate[ord(" ")] = False
        return separate.reshape(-1)


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
