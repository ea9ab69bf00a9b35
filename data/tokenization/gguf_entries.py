"""Tokenizers as GGUF metadata: what :mod:`data.tokenization.gguf_vocabulary` reads, written."""

import json
from collections.abc import Mapping
from typing import Any

from common.errors import DataError
from data.tokenization.base import Tokenizer
from data.tokenization.byte_level import merges_of_ranks
from data.tokenization.gguf_vocabulary import (
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    PREFIX,
    TEMPLATE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHOLE_WORDS,
)
from data.tokenization.hf_json import HFTokenizer
from data.tokenization.model_files import DEFAULT, NEVER
from data.tokenization.sentencepiece_model import SentencePieceTokenizer
from data.tokenization.tiktoken_file import TiktokenTokenizer

# Of ids that have a row of the embedding and no token.
_PAD = "[PAD{}]"


def vocabulary_entries(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """Return the metadata of a tokenizer by key: texts, numbers, truth values and lists of them.

    Args:
        tokenizer: of the model.
        rows: of its embedding; ids beyond the vocabulary are called unused.

    Raises:
        DataError: a kind or a way to split text for which llama.cpp has no name.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        entries, lists = _pieces(tokenizer)
    elif isinstance(tokenizer, TiktokenTokenizer):
        entries, lists = _ranks(tokenizer.ranks)
    elif isinstance(tokenizer, HFTokenizer):
        entries, lists = _merges(tokenizer)
    else:
        raise AssertionError(type(tokenizer))
    tokens: list[str | None] = [*lists["tokens"], *([None] * (rows - len(lists["tokens"])))]
    kinds = [*lists["token_type"], *([UNUSED] * (rows - len(lists["token_type"])))]
    for token_id, token in tokenizer.added.items():
        if token_id >= rows:  # a pad token that has been left out
            continue
        if lists["token_type"][token_id : token_id + 1] != [UNKNOWN]:
            kinds[token_id] = CONTROL if token.special else USER_DEFINED
        tokens[token_id] = token.content
    lists["tokens"] = [_PAD.format(i) if text is None else text for i, text in enumerate(tokens)]
    lists["token_type"] = [
        UNUSED if text is None else kind for text, kind in zip(tokens, kinds, strict=True)
    ]
    if "scores" in lists:
        lists["scores"] += [0.0] * (rows - len(lists["scores"]))
    return {f"{PREFIX}.{key}": value for key, value in (entries | lists | _ids(tokenizer)).items()}


def template_entries(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the metadata of a tokenizer's chat templates."""
    named = [name for name in tokenizer.templates if name != DEFAULT]
    found: dict[str, Any] = {f"{TEMPLATE}.{name}": tokenizer.templates[name] for name in named}
    if named:
        found[f"{TEMPLATE}s"] = named
    if DEFAULT in tokenizer.templates:
        found[TEMPLATE] = tokenizer.templates[DEFAULT]
    return found


def _ids(tokenizer: Tokenizer) -> dict[str, int]:
    ends = dict(zip(("eos", "eot", "eom"), tokenizer.eos_ids, strict=False))
    roles = {"bos": tokenizer.bos_id, **ends, "padding": tokenizer.pad_id}
    return {f"{name}_token_id": one for name, one in roles.items() if one is not None}


def _pieces(tokenizer: SentencePieceTokenizer) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    pieces = tokenizer.pieces()
    unknown = next(i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN)
    spaced = tokenizer.encode_raw(["x"], [False], 1) != tokenizer.encode_raw(["x"], [True], 1)
    entries = {
        "model": "llama",
        "pre": "default",
        "add_space_prefix": spaced and tokenizer.prefix != NEVER,
        "add_bos_token": _adds_bos(tokenizer, True),
        "unknown_token_id": unknown,
    }
    lists: dict[str, list[Any]] = {
        "tokens": [text for text, _, _ in pieces],
        "scores": [score for _, score, _ in pieces],
        "token_type": [kind for _, _, kind in pieces],
    }
    return entries, lists


def _ranks(ranks: Mapping[bytes, int]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    tokens, merges = merges_of_ranks(ranks)
    lists: dict[str, list[Any]] = {
        "tokens": tokens,
        "token_type": [NORMAL] * len(tokens),
        "merges": merges,
    }
    return {"model": "gpt2", "pre": "llama-bpe", "add_bos_token": True}, lists


def _merges(tokenizer: HFTokenizer) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Return the lists of a byte-level tokenizer.json."""
    whole = json.loads(tokenizer.vocabulary_file()[1])
    model = whole["model"]
    decoder = (whole.get("decoder") or {}).get("type")
    if model.get("type") != "BPE" or decoder != "ByteLevel" or whole.get("normalizer"):
        raise DataError(
            f"{tokenizer.name} is no byte-level BPE, which is what GGUF files hold of such files; "
            "put the model's tokenizer.model beside it if there is one"
        )
    pre = _named(whole["pre_tokenizer"], bool(model.get("ignore_merges")))
    if pre is None:
        raise DataError(
            f"{tokenizer.name} splits text in a way for which GGUF files have no name here "
            f"({', '.join(PRE_TOKENIZERS)} are known): {json.dumps(whole['pre_tokenizer'])}"
        )
    tokens: list[str | None] = [None] * (1 + max(model["vocab"].values()))
    for text, token_id in model["vocab"].items():
        tokens[token_id] = text
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    lists: dict[str, list[Any]] = {
        "tokens": tokens,
        "token_type": [NORMAL] * len(tokens),
        "merges": merges,
    }
    adds = bool(tokenizer.bos_id is not None and whole.get("post_processor"))
    return {"model": "gpt2", "pre": pre, "add_bos_token": _adds_bos(tokenizer, adds)}, lists


def _adds_bos(tokenizer: Tokenizer, usual: bool) -> bool:
    said = tokenizer.declared_config.get("add_bos_token")
    return bool(usual if said is None else said) and tokenizer.bos_id is not None


def _named(steps: Any, whole_words: bool) -> str | None:
    """Return llama.cpp's name for a way to split text."""
    wanted = _plain(steps)
    for name, known in PRE_TOKENIZERS.items():
        if _plain(known) == wanted and (name in WHOLE_WORDS) == whole_words:
            return name
    return None


def _plain(steps: Any) -> Any:
    """Return steps without what changes no id, and regular expressions in one spelling."""
    if isinstance(steps, list):
        return [_plain(one) for one in steps]
    if isinstance(steps, dict):
        if steps.get("type") == "Sequence" and len(steps["pretokenizers"]) == 1:
            return _plain(steps["pretokenizers"][0])
        return {key: _plain(value) for key, value in steps.items() if key != "trim_offsets"}
    return steps
