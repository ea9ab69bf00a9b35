"""The API keys that a server takes, and the limits of each.

A file of keys is YAML (a list of mappings) or JSON lines. An entry has a ``name`` for logs, metrics
and messages, and the ``key`` itself or its ``sha256``; ``requests_per_minute`` and
``tokens_per_minute`` where it is limited. Nothing here keeps, logs or tells a key: what is compared
are hashes, and an error about the file shows none of its values but names.
"""

import hashlib
import hmac
import logging
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from common import jsonl
from common.errors import DataError, Place, near_name
from common.yaml_words import read_words
from llm.serving.rates import Rates

logger = logging.getLogger(__name__)

MIN_LENGTH = 8  # of a key; shorter ones are guessed
_LIMITS = ("requests_per_minute", "tokens_per_minute")
_FIELDS = ("name", "key", "sha256", *_LIMITS)
_NAME = re.compile(r"[\w.@-]{1,64}")
_YAML = (".yaml", ".yml")
# Timing tells nothing of where a hash lies in a table by hashes that nobody can make.
_SECRET = secrets.token_bytes(32)


@dataclass(frozen=True)
class Key:
    """A key that the server takes.

    Args:
        digest: SHA-256 of the key's UTF-8.
        name: for logs, metrics, turns in the engine; None of the one key of ``--api_key``.
        rates: its limits.
    """

    digest: bytes
    name: str | None
    rates: Rates


def digest_of(key: str) -> bytes:
    """Return the hash by which a key is known."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Keys:
    """Every key that the server takes; none at all lets everybody in.

    Args:
        path: file of keys.
        single: a key without name and limits.

    Raises:
        DataError: the file cannot be read, or an entry is wrong, by its place.
    """

    def __init__(self, path: str | Path | None = None, single: str | None = None) -> None:
        self.path = path
        self._single = None if single is None else Key(digest_of(single), None, Rates("api_key"))
        self._rates: dict[str, Rates] = {}
        self._lock = threading.Lock()  # of a reload
        self._table = self._read()

    @property
    def wanted(self) -> bool:
        """Whether requests have to carry a key."""
        return bool(self._table)

    def find(self, given: str) -> Key | None:
        """Return whose key it is."""
        digest = digest_of(given)
        found = self._table.get(_hidden(digest))
        return found if found and hmac.compare_digest(found.digest, digest) else None

    def reload(self) -> None:
        """Read the file again; a wrong one changes nothing and is logged.

        What the last minute has taken goes on to count for keys of the same name.
        """
        try:
            with self._lock:
                self._table = self._read()
        except DataError as error:
            logger.error("keys stay as they were: %s", error)
            return
        logger.info("%d keys from %s", len(self._table), self.path)

    def _read(self) -> dict[bytes, Key]:
        entries = [] if self.path is None else _entries(Path(self.path))
        table = {} if self._single is None else {_hidden(self._single.digest): self._single}
        names: dict[str, Place] = {}
        limits = {}
        for place, name, digest, *most in entries:
            if name in names:
                raise DataError(f"the name {name!r} stands at {names[name]} too", place)
            if (other := table.get(_hidden(digest))) is not None:
                whose = "--api_key" if other.name is None else repr(other.name)
                raise DataError(
                    f"{name!r} has the same key as {whose}; make one of them new", place
                )
            names[name] = place
            rates = self._rates.get(name) or Rates(name)
            limits[name] = rates, most
            table[_hidden(digest)] = Key(digest, name, rates)
        # Only now, when all of the file is known to be right.
        for rates, most in limits.values():
            rates.limit(*most)
        self._rates = {name: rates for name, (rates, _) in limits.items()}
        return table


_Entry = tuple[Place, str, bytes, int | None, int | None]


def _hidden(digest: bytes) -> bytes:
    return hashlib.blake2b(digest, key=_SECRET).digest()


def _entries(path: Path) -> list[_Entry]:
    values = _yaml(path) if path.suffix.lower() in _YAML else jsonl.read(path)
    entries = [_entry(place, value) for place, value in values]
    if not entries:
        raise DataError(
            "has no key; give each a line like {name: alice, key: ...}, or drop the flag",
            Place(path),
        )
    return entries


def _yaml(path: Path) -> Iterator[tuple[Place, object]]:
    try:
        content = read_words(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", Place(path)) from error
    except yaml.MarkedYAMLError as error:
        # Not its text, which shows the line, and so perhaps a key.
        line = None if error.problem_mark is None else error.problem_mark.line + 1
        raise DataError(f"is not valid YAML: {error.problem}", Place(path, line)) from None
    except yaml.YAMLError as error:
        raise DataError(f"is not valid YAML: {type(error).__name__}", Place(path)) from None
    if not isinstance(content, list):
        raise DataError("has to be a list; begin each entry with '- name: ...'", Place(path))
    for number, value in enumerate(content, 1):
        yield Place(path, inner=f" entry {number}"), value


def _entry(place: Place, value: object) -> _Entry:
    if not isinstance(value, Mapping):
        raise DataError(f"an entry has to have the fields {', '.join(_FIELDS)}", place)
    for field in value:
        if field not in _FIELDS:
            near = near_name(str(field), _FIELDS)
            hint = f"did you mean {near!r}?" if near else f"there are {', '.join(_FIELDS)}"
            raise DataError(f"unknown field {field!r}; {hint}", place)
    name = value.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DataError(
            f"name={name!r} has to be 1 to 64 letters, digits and ._@-; logs and metrics show it",
            place,
        )
    return place, name, _digest(value, name, place), *(_limit(value, one, place) for one in _LIMITS)


def _digest(entry: Mapping[str, object], name: str, place: Place) -> bytes:
    key, hashed = entry.get("key"), entry.get("sha256")
    if (key is None) == (hashed is None):
        raise DataError(f"{name!r} needs key or sha256, one of the two", place)
    if hashed is not None:
        if not isinstance(hashed, str) or not re.fullmatch("[0-9a-fA-F]{64}", hashed):
            raise DataError(
                f"sha256 of {name!r} has to be 64 hexadecimal digits, such as sha256sum prints",
                place,
            )
        return bytes.fromhex(hashed)
    if not isinstance(key, str) or len(key) < MIN_LENGTH or not key.isascii() or " " in key:
        raise DataError(
            f"key of {name!r} has to be at least {MIN_LENGTH} ASCII characters without blanks; "
            "openssl rand -hex 24 makes one",
            place,
        )
    return digest_of(key)


def _limit(entry: Mapping[str, object], field: str, place: Place) -> int | None:
    value = entry.get(field)
    if value is None:
        return None
    if isinstance(value, str) and value.isdecimal():
        value = int(value)  # YAML's values come as words
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DataError(f"{field}={value!r} has to be a whole number from 1 on", place)
    return value
