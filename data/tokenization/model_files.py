"""What the JSON files of a model directory say about its tokenizer."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.jsonl import read_document
from data.tokenization.added_tokens import EXTRA, NAMED, AddedToken, read_token

DEFAULT = "default"
CONFIG = "tokenizer_config.json"
TEMPLATES = "additional_chat_templates"
# When a space is put before a text, or before what follows an added token (sentencepiece).
ALWAYS, FIRST, NEVER = "always", "first", "never"
# Keys of tokenizer_config.json that are read here or cannot change an id or a text.
_KNOWN = {
    *("tokenizer_class", "chat_template", "added_tokens_decoder", "legacy", "add_prefix_space"),
    *("add_bos_token", "add_eos_token", "eos_token_ids", "clean_up_tokenization_spaces"),
    *("model_max_length", "max_length", "padding_side", "truncation_side", "pad_token_id"),
    *("model_input_names", "name_or_path", "special_tokens_map_file", "tokenizer_file", "backend"),
    *("use_default_system_prompt", "use_fast", "from_slow", "is_local", "local_files_only"),
    *("transformers_version", "processor_class", "spaces_between_special_tokens", "use_auth_token"),
    *("vocab_file", "merges_file", "pad_to_multiple_of", "stride", "truncation_strategy", *EXTRA),
}
# Keys that would change what a text becomes, at the values at which they do not.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "split_special_tokens": (False, None),
    "do_lower_case": (False, None),
    "sp_model_kwargs": ({}, None),
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Declared:
    """Declarations found beside a vocabulary file; empty for a lone file.

    Attributes:
        added: tokens with ids of their own.
        named: special tokens that are named without an id.
        bos, eos, pad: texts of tokens with a role.
        bos_id, eos_ids, pad_id: ids that config.json or generation_config.json give.
        templates: chat templates by name; that of most models is called "default".
        prefix: where sentencepiece's space stands before a text, by `legacy` and
            `add_prefix_space`.
        config: tokenizer_config.json as it was read.
    """

    added: Mapping[int, AddedToken] = field(default_factory=dict)
    named: tuple[AddedToken, ...] = ()
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    templates: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ALWAYS
    config: Mapping[str, Any] = field(default_factory=dict)


def read_declared(directory: Path, vocabulary: str) -> Declared:
    """Read the JSON files beside a vocabulary, as transformers does, and the chat templates.

    tokenizer_config.json comes first. Where it has no added_tokens_decoder, special_tokens_map.json
    and added_tokens.json count too. A tokenizer.json tells its added tokens to a vocabulary file of
    another kind beside it.

    Args:
        directory: of the model.
        vocabulary: name of the vocabulary file in it.

    Raises:
        DataError: one of them is not valid, or asks for what is not done here.
    """
    config = read_json(directory / CONFIG)
    _check_keys(directory / CONFIG, config)
    special = read_json(directory / "special_tokens_map.json")
    decoder = config.get("added_tokens_decoder")
    names = {**special, **config} if decoder is not None else {**config, **special}
    model = read_json(directory / "config.json")
    generation = {**model, **read_json(directory / "generation_config.json")}
    eos_ids = _ids(generation.get("eos_token_id"), directory)
    if not eos_ids:
        eos_ids = _ids(config.get("eos_token_ids"), directory)
    named = _named(directory / CONFIG, config if decoder is not None else names)
    added = _of_tokenizer_json(directory) if vocabulary != "tokenizer.json" else {}
    if decoder is not None:
        added.update(_decoder(directory / CONFIG, decoder))
    else:
        added.update(_legacy(directory / "added_tokens.json", {one.content for one in named}))
    return Declared(
        added=added,
        named=named,
        bos=_text(names.get("bos_token")),
        eos=_text(names.get("eos_token")),
        pad=_text(names.get("pad_token")),
        bos_id=next(iter(_ids(generation.get("bos_token_id"), directory)), None),
        eos_ids=eos_ids,
        pad_id=next(iter(_ids(generation.get("pad_token_id"), directory)), None),
        templates=_templates(directory, config),
        prefix=_prefix(config),
        config=config,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file."""
    if not path.is_file():
        return {}
    content = read_document(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _check_keys(path: Path, config: Mapping[str, Any]) -> None:
    for key, harmless in _REFUSED.items():
        if config.get(key) not in harmless:
            raise DataError(
                f"{path}: {key} is {config[key]!r}, which would change how text is read and is not "
                f"done here: remove it, or convert the tokenizer to a tokenizer.json that does it"
            )
    idle = [key for key in config if key not in _KNOWN and key not in _REFUSED]
    idle = [key for key in idle if not key.endswith("_token")]
    if idle:
        _tell(f"{path}: {', '.join(sorted(idle))} mean nothing here and are left aside")


@cache
def _tell(message: str) -> None:
    """Log once, however often a tokenizer is opened."""
    _log.warning(message)


# Added tokens


def _of_tokenizer_json(directory: Path) -> dict[int, AddedToken]:
    path = directory / "tokenizer.json"
    added = read_json(path).get("added_tokens") or []
    try:
        return {int(one["id"]): read_token(one, f"{path}: added_tokens") for one in added}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: added_tokens must be objects with id and content") from error


def _decoder(path: Path, decoder: Any) -> dict[int, AddedToken]:
    if isinstance(decoder, Mapping) and all(str(one).isdecimal() for one in decoder):
        values = decoder.values()
        if all(isinstance(one, Mapping) and isinstance(one.get("content"), str) for one in values):
            where = f"{path}: added_tokens_decoder"
            return {int(one): read_token(token, where) for one, token in decoder.items()}
    raise DataError(
        f'{path}: added_tokens_decoder must look like {{"32000": {{"content": "<pad>"}}}}'
    )


def _legacy(path: Path, special: set[str]) -> dict[int, AddedToken]:
    """added_tokens.json: texts and ids; those are special that are named so elsewhere."""
    found = read_json(path)
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in found.values()):
        raise DataError(f'{path} must look like {{"<pad>": 32000}}')
    return {
        token_id: AddedToken(text, special=text in special, normalized=text not in special)
        for text, token_id in found.items()
    }


def _named(path: Path, names: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    """Special tokens that have a name, in the order in which transformers adds them."""
    found: dict[str, AddedToken] = {}
    own = [key for key in names if key.endswith("_token") and key not in NAMED]
    for key in (*NAMED, *own):
        value = names.get(key)
        if isinstance(value, str | Mapping) and value:
            token = read_token(value, f"{path}: {key}", special=True)
            found.setdefault(token.content, token)
    for value in _extras(names):
        token = read_token(value, f"{path}: additional_special_tokens", special=True)
        found.setdefault(token.content, token)
    return tuple(found.values())


def _extras(names: Mapping[str, Any]) -> Iterator[Any]:
    for key in EXTRA:
        value = names.get(key) or []
        yield from value.values() if isinstance(value, Mapping) else value


# Chat templates


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: files come before tokenizer_config.json, as in transformers."""
    files = {path.stem: path for path in sorted((directory / TEMPLATES).glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        files[DEFAULT] = directory / "chat_template.jinja"
    if files:
        return {name: _read_template(path) for name, path in files.items()}
    given = config.get("chat_template")
    if given is None:
        return {}
    if isinstance(given, str):
        return {DEFAULT: given}
    if isinstance(given, Mapping):
        given = [{"name": name, "template": text} for name, text in given.items()]
    try:
        named = {item["name"]: item["template"] for item in given}
        if all(isinstance(text, str) for pair in named.items() for text in pair):
            return named
    except (KeyError, TypeError):
        pass
    raise DataError(
        f"{directory / CONFIG}: chat_template must be a text or look like "
        '[{"name": "default", "template": "..."}]'
    )


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error


# Roles


def _prefix(config: Mapping[str, Any]) -> str:
    if config.get("add_prefix_space") is False:
        return NEVER
    return FIRST if config.get("legacy") is False else ALWAYS


def _text(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _ids(value: Any, directory: Path) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise DataError(f"{directory}: token ids must be integers, got {value!r}")
    # Published configs use -1 and the like for "none".
    return tuple(i for i in ids if i >= 0)


def merge_eos(first: tuple[int, ...], *more: int | None) -> tuple[int, ...]:
    """`first` followed by the ids of `more` that it lacks, in order."""
    merged = list(first)
    merged.extend(i for i in more if i is not None and i not in merged)
    return tuple(merged)


def numbered(
    declared: Declared, ids: Mapping[str, int], size: int, source: Path
) -> dict[int, AddedToken]:
    """The declared tokens by id; a named one that the vocabulary lacks takes the next free id.

    Args:
        declared: what the directory says.
        ids: ids of the vocabulary's own pieces by text.
        size: ids of the vocabulary.
        source: the vocabulary file, for messages.

    Raises:
        DataError: an id or a text that the vocabulary has otherwise, or ids are missing between.
    """
    added = dict(declared.added)
    known = {token.content for token in added.values()}
    for token in declared.named:
        if token.content not in known:
            next_free = max([size - 1, *added]) + 1
            added[ids.get(token.content, next_free)] = token
    for token_id, token in added.items():
        there = ids.get(token.content, None if token_id >= size else -1)
        if there not in (None, token_id):
            names = (repr(text) for text, own in ids.items() if own == token_id)
            other = f"has it as id {there}" if there != -1 else next(names, "another")
            raise DataError(
                f"{source}: tokenizer_config.json calls id {token_id} {token.content!r}, the model "
                f"file {other}: the two do not belong together"
            )
    missing = sorted(set(range(size, max(added, default=0))) - {*added})
    if missing:
        raise DataError(
            f"{source}: tokenizer_config.json adds tokens but none with id {missing[0]}, right "
            f"after the {size} pieces of the model file"
        )
    return added


def config_of(
    declared: Declared,
    added: Mapping[int, AddedToken],
    named: Mapping[str, int | None],
    eos_ids: Sequence[int],
) -> dict[str, Any]:
    """tokenizer_config.json of a tokenizer, in Hugging Face's spelling.

    Args:
        declared: what its directory said.
        added: its added tokens.
        named: ids of the named ones.
        eos_ids: every id that ends a generation.
    """
    given = {key: value for key, value in declared.config.items() if key not in EXTRA}
    given.pop("chat_template", None)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **given,
        "added_tokens_decoder": {
            str(token_id): token.fields() for token_id, token in sorted(added.items())
        },
    }
    for key, token_id in named.items():
        if token_id is not None and token_id in added:
            config[key] = added[token_id].content
    if len(eos_ids) > 1:
        config["eos_token_ids"] = list(eos_ids)
    return config
