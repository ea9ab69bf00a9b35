"""What the JSON files of a model directory say about its tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.jsonl import read_document


@dataclass(frozen=True)
class Declared:
    """Declarations found beside a vocabulary file; empty for a lone file.

    `added` maps control token texts to ids; `bos`, `eos` and `pad` are texts; `bos_id`,
    `eos_ids` and `pad_id` are ids that config.json or generation_config.json give.
    """

    added: Mapping[str, int] = field(default_factory=dict)
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    chat_template: str | None = None


def read_declared(directory: Path) -> Declared:
    """Read tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json
    and chat_template.jinja, as far as they exist.

    Raises:
        DataError: one of them is not valid.
    """
    tokenizer = read_json(directory / "tokenizer_config.json")
    names = {**read_json(directory / "special_tokens_map.json"), **tokenizer}
    config = read_json(directory / "config.json")
    generation = {**config, **read_json(directory / "generation_config.json")}
    eos_ids = _ids(generation.get("eos_token_id"), directory)
    if not eos_ids:
        eos_ids = _ids(tokenizer.get("eos_token_ids"), directory)
    return Declared(
        added=_added(tokenizer.get("added_tokens_decoder", {}), directory),
        bos=_text(names.get("bos_token")),
        eos=_text(names.get("eos_token")),
        pad=_text(names.get("pad_token")),
        bos_id=next(iter(_ids(generation.get("bos_token_id"), directory)), None),
        eos_ids=eos_ids,
        pad_id=next(iter(_ids(generation.get("pad_token_id"), directory)), None),
        chat_template=_chat_template(directory, tokenizer),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file."""
    if not path.is_file():
        return {}
    content = read_document(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _chat_template(directory: Path, tokenizer: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text: {error}") from error
    template = tokenizer.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _added(decoder: Any, directory: Path) -> dict[str, int]:
    path = directory / "tokenizer_config.json"
    try:
        return {item["content"]: int(token_id) for token_id, item in decoder.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f'{path}: added_tokens_decoder must look like {{"32000": {{"content": "<pad>"}}}}'
        ) from error


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
