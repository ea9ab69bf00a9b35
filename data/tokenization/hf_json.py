"""tokenizer.json, through the `tokenizers` library."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from common.errors import DataError
from data.tokenization.added_tokens import (
    AddedToken,
    Region,
    RegionIds,
    SpecialTokens,
    StandIns,
    of_library,
)
from data.tokenization.base import Tokenizer
from data.tokenization.byte_level import BYTE_OF_CHARACTER
from data.tokenization.fence import fenced
from data.tokenization.model_files import Declared, merge_eos
from data.tokenization.packed import PackedEncoder
from data.tokenization.stream import StreamDecoder, WindowStreamDecoder

# What a lone tokenizer.json's control tokens are for, by the names in use.
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>")
EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>")
PAD_NAMES = ("<|finetune_right_pad_id|>", "<pad>")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class HFTokenizer(Tokenizer):
    """Ids exactly as the `tokenizers` library gives them, without its automatic BOS and EOS."""

    def __init__(
        self, path: Path, content: bytes, declared: Declared, templates: Mapping[str, str]
    ) -> None:
        self._plain = _load(path, content, declared)
        # The texts of control tokens are then ordinary characters.
        self._plain.encode_special_tokens = True
        file = _load(path, content, Declared()).get_added_tokens_decoder()
        own = {token_id: of_library(token) for token_id, token in file.items()}
        added = _added(self._plain, own)
        special = {token.content: one for one, token in added.items() if token.special}
        every = {token.content: one for one, token in added.items()}
        super().__init__(
            name=f"tokenizer.json {path}",
            vocab_size=1 + max(self._plain.get_vocab(with_added_tokens=True).values()),
            special=SpecialTokens(
                ids=special,
                bos_id=_pick(every, declared.bos, declared.bos_id, BOS_NAMES),
                eos_ids=_eos_ids(every, declared),
                pad_id=_pick(every, declared.pad, declared.pad_id, PAD_NAMES),
            ),
            added=added,
            own=own,
            content=content,
            declared=declared,
            templates=templates,
            source=path,
        )
        self._stand_ins = StandIns(self._plain, added)

    @cached_property
    def _marked(self) -> tokenizers.Tokenizer:
        return _load(self.source, self._content, self._declared)

    @cached_property
    def _bare(self) -> tokenizers.Tokenizer:
        """Puts no space before a text."""
        bare = json.dumps(_without_prefix(json.loads(self._content))).encode()
        return _load(self.source, bare, self._declared)

    def encode_regions(
        self,
        regions: Sequence[Region],
        *,
        threads: int = 1,
        encoder: PackedEncoder | None = None,
    ) -> list[RegionIds]:
        del encoder
        before = [self._stand_ins.before() if one.start != "begin" else "" for one in regions]
        texts = [
            mark + self._stand_ins.write(region.parts)
            for mark, region in zip(before, regions, strict=True)
        ]
        with fenced(self.name, texts):
            if threads == 1:
                found = [self._plain.encode(text, add_special_tokens=False) for text in texts]
            elif any(region.start == "bare" for region in regions):
                found = self._plain.encode_batch(texts, add_special_tokens=False)
            else:  # without offsets
                found = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        return [
            self._region(region, text, len(mark), row)
            for region, text, mark, row in zip(regions, texts, before, found, strict=True)
        ]

    def _region(
        self, region: Region, text: str, mark: int, found: tokenizers.Encoding
    ) -> RegionIds:
        ids = found.ids[1:] if mark else found.ids
        if region.start == "bare" and self._adds_space:
            ids = self._without_space(ids, text, mark, found)
        given = self._stand_ins.tokens
        marks = [index for index, one in enumerate(ids) if one in given]
        return RegionIds([given.get(one, one) for one in ids] if marks else ids, marks)

    def _without_space(
        self, ids: list[int], text: str, mark: int, found: tokenizers.Encoding
    ) -> list[int]:
        """Ids of a text that goes on from another: up to its first added token, no space."""
        count = next((i for i, one in enumerate(ids) if self._is_added(one)), len(ids))
        stop = found.offsets[count + 1][0] if count < len(ids) else len(text)
        with fenced(self.name, [text]):
            inside = self._bare.encode(text[mark:stop], add_special_tokens=False).ids
        return [*inside, *ids[count:]]

    def _is_added(self, token_id: int) -> bool:
        return token_id in self.added or token_id in self._stand_ins.tokens

    @cached_property
    def _adds_space(self) -> bool:
        """Whether a space is put before text that follows an added token."""
        text = self._stand_ins.before() + "x"
        after: list[int] = self._plain.encode(text, add_special_tokens=False).ids[1:]
        inside: list[int] = self._bare.encode("x", add_special_tokens=False).ids
        return after != inside

    def _encode_marked(self, text: str) -> list[int]:
        # The library knows which spaces around an added token belong to it.
        with fenced(self.name, [text]):
            ids: list[int] = self._marked.encode(text, add_special_tokens=False).ids
        return ids

    def decode_tokens(self, ids: Sequence[int]) -> str:
        text: str = self._marked.decode(list(ids), skip_special_tokens=False)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        self.check_id(token_id)
        if token_id in self.special_text:
            return b""
        text: str = self._marked.id_to_token(token_id) or ""
        if token_id in self.added:
            return text.encode()
        if self._joins_bytes and _BYTE.fullmatch(text):
            return bytes([int(text[3:5], 16)])
        if "ByteLevel" in self._decoders:
            return bytes(BYTE_OF_CHARACTER[character] for character in text)
        if "Metaspace" in self._decoders or self._joins_bytes:
            return text.replace("\u2581", " ").encode()
        raise DataError(
            f"{self.name} decodes with {', '.join(self._decoders) or 'nothing'}, of which a single "
            "token's bytes are not known; those of ByteLevel, ByteFallback and Metaspace are"
        )

    @cached_property
    def _decoders(self) -> list[str]:
        """Kinds of the file's decoders."""
        decoder = json.loads(self._content).get("decoder") or {}
        return [one["type"] for one in decoder.get("decoders", [decoder]) if "type" in one]

    def stream(self) -> StreamDecoder:
        return WindowStreamDecoder(self, self._is_byte if self._joins_bytes else None)

    @cached_property
    def _joins_bytes(self) -> bool:
        """Whether bytes in a row are characters together, or none of them is."""
        return b'"ByteFallback"' in self._content

    def _is_byte(self, token_id: int) -> bool:
        return bool(_BYTE.fullmatch(self._marked.id_to_token(token_id) or ""))

    def vocabulary_file(self) -> tuple[str, bytes]:
        return "tokenizer.json", self._content


def _load(path: Path, content: bytes, declared: Declared) -> tokenizers.Tokenizer:
    """The library's object, with declared tokens added as transformers' loader adds them."""
    try:
        with fenced("the tokenizers library", []):
            loaded = tokenizers.Tokenizer.from_buffer(content)
    except DataError as error:
        reason = str(error).partition(": ")[2]
        raise DataError(f"{path} is not a tokenizer.json, or is damaged: {reason}") from error
    loaded.no_truncation()
    loaded.no_padding()
    there = loaded.get_added_tokens_decoder()
    same = [of_library(token) for token in there.values()]
    new = [token for _, token in sorted(declared.added.items()) if token not in same]
    known = {token.content for token in (*same, *new)}
    new += [token for token in declared.named if token.content not in known]
    loaded.add_tokens([token.library() for token in new])
    for token_id, token in declared.added.items():
        if loaded.token_to_id(token.content) != token_id:
            raise DataError(
                f"{path}: tokenizer_config.json calls id {token_id} {token.content!r}, which "
                f"tokenizer.json {_calls(loaded, token)}: the two do not belong together"
            )
    return loaded


def _calls(loaded: tokenizers.Tokenizer, token: AddedToken) -> str:
    return f"has as id {loaded.token_to_id(token.content)}"


def _added(library: tokenizers.Tokenizer, own: Mapping[int, AddedToken]) -> dict[int, AddedToken]:
    """The added tokens; what the file has as special stays so, whatever is declared beside it."""
    special = {token.content for token in own.values() if token.special}
    every = {one: of_library(token) for one, token in library.get_added_tokens_decoder().items()}
    return {
        one: replace(token, special=token.special or token.content in special)
        for one, token in every.items()
    }


def _without_prefix(value: Any) -> Any:
    """A tokenizer.json whose steps put no space before a text."""
    if isinstance(value, list):
        return [_without_prefix(one) for one in value if not _is_prepend(one)]
    if not isinstance(value, dict):
        return value
    changed = {
        key: None if _is_prepend(one) else _without_prefix(one)
        for key, one in value.items()
        if key not in ("model", "added_tokens")
    }
    if "prepend_scheme" in changed:
        changed["prepend_scheme"] = "never"
    if "add_prefix_space" in changed:
        changed["add_prefix_space"] = False
    return {**value, **changed}


def _is_prepend(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "Prepend"


def _pick(
    special: Mapping[str, int], text: str | None, token_id: int | None, names: Sequence[str]
) -> int | None:
    if text is not None and text in special:
        return special[text]
    if token_id is not None:
        return token_id
    return next((special[name] for name in names if name in special), None)


def _eos_ids(special: Mapping[str, int], declared: Declared) -> tuple[int, ...]:
    found = merge_eos(declared.eos_ids, special.get(declared.eos or ""))
    return found or tuple(special[name] for name in EOS_NAMES if name in special)
