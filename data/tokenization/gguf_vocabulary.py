"""Tokenizers in GGUF metadata, as the files of a model directory would hold them.

llama.cpp's kind "gpt2" becomes a tokenizer.json of byte-level BPE, its kind "llama" a sentencepiece
model; ids are then those of the libraries that read such files. How text is split before merging is
named by ``tokenizer.ggml.pre``; the expressions are those of ``llama.cpp/src/llama-vocab.cpp``.
"""

import struct
from collections.abc import Iterator
from typing import Any

from common.errors import DataError
from common.gguf import GGUFHeader
from data.tokenization.added_tokens import AddedToken
from data.tokenization.byte_level import BYTES, LLAMA3_SPLIT, sequence, split, tokenizer_json
from data.tokenization.model_files import ALWAYS, DEFAULT, NEVER, Declared

PREFIX = "tokenizer.ggml"
TEMPLATE = "tokenizer.chat_template"
# Kinds of tokens, numbered as in sentencepiece_model.proto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_QWEN2 = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": BYTES,
    "llama-bpe": split(LLAMA3_SPLIT),
    "smollm": sequence({"type": "Digits", "individual_digits": True}, BYTES),
    "qwen2": split(_QWEN2),
}
_SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "gpt2": "gpt-2"}
# Words that are one token stay whole, though no merge may lead to them.
WHOLE_WORDS = ("llama-bpe",)


def holds_vocabulary(header: GGUFHeader) -> bool:
    """Whether there is a tokenizer in a file."""
    return f"{PREFIX}.model" in header.metadata


def read_vocabulary(header: GGUFHeader) -> tuple[bytes, Declared]:
    """Return a vocabulary file's content, and what a directory would declare beside it.

    Raises:
        DataError: no tokenizer, one of another kind, or one whose lists do not fit together.
    """
    kind = header.get(f"{PREFIX}.model", str)
    if not holds_vocabulary(header):
        raise DataError(
            f"{header.file} holds no tokenizer; give one as --tokenizer_name_or_path DIR"
        )
    if kind not in ("gpt2", "llama"):
        raise DataError(
            f"{header.file} has a tokenizer of the kind {kind!r}; gpt2 (byte-level BPE) and llama "
            "(sentencepiece) are read. Give the model's tokenizer.json or tokenizer.model as "
            "--tokenizer_name_or_path DIR"
        )
    tokens = _list(header, "tokens", str)
    kinds = _list(header, "token_type", int, len(tokens)) or [NORMAL] * len(tokens)
    if len(set(tokens)) < len(tokens):
        raise DataError(f"{header.file} is damaged: a token stands twice; fetch it again")
    make = _byte_level if kind == "gpt2" else _sentencepiece
    return make(header, tokens, kinds), _declared(header, tokens, kinds, kind)


def _list(header: GGUFHeader, name: str, kind: type, count: int | None = None) -> list[Any]:
    values = header.get(f"{PREFIX}.{name}", list, [])
    if not all(type(value) is kind for value in values):
        raise DataError(
            f"{header.file}: {PREFIX}.{name} is no list of {kind.__name__}; fetch it again"
        )
    if count is None and not values:
        raise DataError(f"{header.file}: {PREFIX}.{name} is missing; fetch the file again")
    if count is not None and values and len(values) != count:
        raise DataError(
            f"{header.file} is damaged: {count} tokens, and {len(values)} entries in "
            f"{PREFIX}.{name}; fetch it again"
        )
    return list(values)


def _declared(header: GGUFHeader, tokens: list[str], kinds: list[int], kind: str) -> Declared:
    ids = {
        name: header.get(f"{PREFIX}.{name}_token_id", int)
        for name in ("bos", "eos", "eot", "eom", "padding")
    }
    for name, one in ids.items():
        if one is not None and one >= len(tokens):
            raise DataError(
                f"{header.file}: {PREFIX}.{name}_token_id={one} is no id of its {len(tokens)} "
                "tokens; fetch it again"
            )
    texts = {name: None if one is None else tokens[one] for name, one in ids.items()}
    ends = dict.fromkeys(ids[name] for name in ("eos", "eot", "eom"))
    spaced = header.get(f"{PREFIX}.add_space_prefix", bool, True)
    config = {
        key: value
        for key in ("add_bos_token", "add_eos_token")
        if (value := header.get(f"{PREFIX}.{key}", bool)) is not None
    }
    if kind == "llama" and not spaced:
        config["add_prefix_space"] = False
    return Declared(
        added={
            one: AddedToken(tokens[one], special=False, normalized=False)
            for one, of in enumerate(kinds)
            if of == USER_DEFINED
        },
        bos=texts["bos"],
        eos=texts["eos"],
        pad=texts["padding"],
        bos_id=ids["bos"],
        eos_ids=tuple(one for one in ends if one is not None),
        pad_id=ids["padding"],
        templates=_templates(header),
        prefix=NEVER if kind == "llama" and not spaced else ALWAYS,
        config=config,
    )


def _templates(header: GGUFHeader) -> dict[str, str]:
    found = {DEFAULT: header.get(TEMPLATE, str)}
    for name in header.get("tokenizer.chat_templates", list, []):
        found[str(name)] = header.get(f"{TEMPLATE}.{name}", str)
    return {name: text for name, text in found.items() if text is not None}


def _byte_level(header: GGUFHeader, tokens: list[str], kinds: list[int]) -> bytes:
    """Return tokenizer.json of a byte-level BPE."""
    pre = header.get(f"{PREFIX}.pre", str, "gpt-2")
    pre = _SAME.get(pre, pre)
    if pre not in PRE_TOKENIZERS:
        raise DataError(
            f"{header.file}: {PREFIX}.pre={pre!r}, a way to split text that is not known here "
            f"({', '.join(PRE_TOKENIZERS)} are); give the model's tokenizer.json as "
            "--tokenizer_name_or_path DIR"
        )
    merges = _list(header, "merges", str)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": one, "content": tokens[one], **flags, "special": kind == CONTROL}
        for one, kind in enumerate(kinds)
        if kind in (CONTROL, USER_DEFINED)
    ]
    return tokenizer_json(
        {token: one for one, token in enumerate(tokens)},
        merges,
        PRE_TOKENIZERS[pre],
        added=added,
        whole_words=pre in WHOLE_WORDS,
    )


def _sentencepiece(header: GGUFHeader, tokens: list[str], kinds: list[int]) -> bytes:
    """Return a sentencepiece model: pieces, a trainer and a normalizer of Llama 2's kind."""
    scores = _list(header, "scores", float, len(tokens)) or [0.0] * len(tokens)
    if kinds.count(UNKNOWN) != 1:
        raise DataError(
            f"{header.file} is damaged: {kinds.count(UNKNOWN)} tokens of the kind unknown, a "
            "sentencepiece model has one; fetch it again"
        )
    content = b""
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        piece = _field(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, kind)
        content += _field(1, piece)
    roles = {"unknown": (40, 45), "bos": (41, 46), "eos": (42, 47), "padding": (43, 48)}
    trainer = _field(3, 2) + _field(4, len(tokens)) + _field(35, 1)  # BPE with bytes
    for name, (number, text) in roles.items():
        one = header.get(f"{PREFIX}.{name}_token_id", int)
        one = kinds.index(UNKNOWN) if one is None and name == "unknown" else one
        if one is not None and one < len(tokens):
            trainer += _field(number, one) + _field(text, tokens[one].encode())
    normalizer = _field(1, b"identity") + _field(3, 1) + _field(4, 0) + _field(5, 1)
    return content + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | bytes) -> bytes:
    """Return a field of a protobuf message: a whole number, or bytes."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    return bytes(_sevens(value))


def _sevens(value: int) -> Iterator[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value
