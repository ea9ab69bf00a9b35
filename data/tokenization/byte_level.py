"""Byte-level BPE as a tokenizer.json: how bytes are spelled, and text is split before merging."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

# How Llama 3 cuts a text before byte pair encoding (Meta's llama3/tokenizer.py).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes_of_characters() -> dict[str, int]:
    """Return the byte that each character of byte-level BPE stands for (Radford et al. 2019).

    Bytes that are visible in Latin-1 stand for themselves, the others for what follows Latin-1.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in visible]
    shown = {chr(byte): byte for byte in visible}
    return shown | {chr(0x100 + number): byte for number, byte in enumerate(others)}


BYTE_OF_CHARACTER = _bytes_of_characters()
CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}

# ByteLevel's own expression is GPT-2's.
BYTES: dict[str, Any] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def spelled(token: bytes) -> str:
    """The bytes of a token as characters, one each."""
    return token.decode("latin-1").translate(CHARACTER_OF_BYTE)


def merges_of_ranks(ranks: Mapping[bytes, int]) -> tuple[list[str], list[str]]:
    """Return the tokens of a tiktoken file by rank, spelled, and every merge that leads to one.

    tiktoken joins whatever two neighbours are a token together, the one with the lowest rank
    first: a token has a merge for every place at which it parts into two tokens.
    """
    tokens = [spelled(token) for token in sorted(ranks, key=ranks.__getitem__)]
    rank = dict(zip(tokens, range(len(tokens)), strict=True))
    merges: list[str] = []
    for token in tokens:
        pairs = [
            (rank[left], rank[right])
            for at in range(1, len(token))
            if (left := token[:at]) in rank and (right := token[at:]) in rank
        ]
        merges += [f"{tokens[left]} {tokens[right]}" for left, right in sorted(pairs)]
    return tokens, merges


def split(expression: str) -> dict[str, Any]:
    """Return a pre-tokenizer that cuts by a regular expression."""
    cut = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"}
    return sequence({**cut, "invert": False}, {**BYTES, "use_regex": False})


def sequence(*steps: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pre-tokenizer of several."""
    return {"type": "Sequence", "pretokenizers": list(steps)}


def tokenizer_json(
    vocabulary: Mapping[str, int],
    merges: Sequence[str],
    pre_tokenizer: Mapping[str, Any],
    *,
    added: Sequence[Mapping[str, Any]] = (),
    whole_words: bool,
) -> bytes:
    """Return tokenizer.json of a byte-level BPE.

    Args:
        vocabulary: ids by token, whose bytes are spelled as characters.
        merges: pairs, "left right", in the order in which they are made.
        pre_tokenizer: how text is split before.
        added: entries of added tokens.
        whole_words: whether a word that is one token stays whole, though no merge may lead to it.
    """
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "fuse_unk": False,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "byte_fallback": False,
        "ignore_merges": whole_words,
        "vocab": vocabulary,
        "merges": merges,
    }
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {**BYTES, "add_prefix_space": True},
        "model": model,
    }
    return json.dumps(whole, ensure_ascii=False).encode()
