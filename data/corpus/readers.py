"""Readers: how the documents of one input format lie in a file.

A reader finds places where a file can be cut and takes the documents out of a piece of it. A
further format is one more class in `READERS`.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from common.errors import DataError, Place
from common.jsonl import BOM, decode, is_json, parse

# The first level only: " = Robert Boulter = " begins an article, " = = Career = = " does not.
_TITLE = re.compile(rb"[ \t]*=[ \t]+(?!=[ \t]).*[^=\s][ \t]+=[ \t\r]*")


@dataclass
class Documents:
    """What a piece of a file holds.

    Attributes:
        texts: the documents, none of them blank.
        bad: (line, reason) of every line that could not be used; lines count from 1 in the piece.
        lines: line breaks in the piece.
        empty: documents left out because they hold nothing but white space.
    """

    texts: list[str] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    lines: int = 0
    empty: int = 0

    def add(self, text: str) -> None:
        """Take a document unless it is blank."""
        if not text or text.isspace():
            self.empty += 1
        else:
            self.texts.append(text)


class Reader(ABC):
    """One input format."""

    @abstractmethod
    def next_start(self, file: BinaryIO, position: int) -> int:
        """The first place at or after `position` where the file may be cut, or its end."""

    @abstractmethod
    def read(self, content: bytes) -> Documents:
        """The documents of a piece between two cuts."""


class JsonLines(Reader):
    """One JSON object a line, its text under `key`."""

    def __init__(self, key: str = "text", hint: str = "see --json_key") -> None:
        self.key, self.hint = key, hint
        self._spelled = json.dumps(key, ensure_ascii=False).encode()

    def next_start(self, file: BinaryIO, position: int) -> int:
        return next_line(file, position)

    def read(self, content: bytes) -> Documents:
        found = Documents(lines=content.count(b"\n"))
        for number, line in enumerate(content.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                item = parse(line, once=self.key if line.count(self._spelled) > 1 else False)
                found.add(self._text(item, escaped=b"\\u" in line))
            except DataError as error:
                found.bad.append((number, str(error)))
        return found

    def _text(self, item: object, *, escaped: bool = True) -> str:
        if not isinstance(item, dict):
            raise DataError(f"a JSON {_kind(item)}, not an object")
        if self.key not in item:
            keys = ", ".join(map(repr, list(item)[:8])) or "none"
            raise DataError(f"no key {self.key!r} (its keys: {keys}); {self.hint}")
        text = item[self.key]
        if not isinstance(text, str):
            raise DataError(f"the value of {self.key!r} is a JSON {_kind(text)}, not a string")
        # What is no text can only come out of an escape, now that the bytes were all right.
        return checked(text) if escaped else text


class JsonList(JsonLines):
    """One JSON array of such objects, which is read as a whole."""

    def next_start(self, file: BinaryIO, position: int) -> int:
        return file.seek(0, 2)

    def read(self, content: bytes) -> Documents:
        found = Documents(lines=content.count(b"\n"))
        try:
            items = parse(content, Place("", 1), once=self.key)
        except DataError as error:
            found.bad.append((error.line or 1, error.reason))
            return found
        for number, item in enumerate(items if isinstance(items, list) else [items], 1):
            try:
                found.add(self._text(item))
            except DataError as error:
                found.bad.append((1, f"item {number}: {error}"))
        return found


class PlainText(Reader):
    """Text; a document is a file, a run of lines without a blank one, or a line."""

    def __init__(self, documents: str = "blank_line") -> None:
        self.documents = documents

    def next_start(self, file: BinaryIO, position: int) -> int:
        if self.documents == "line":
            return next_line(file, position)
        if self.documents == "file":
            return file.seek(0, 2)
        start = next_line(file, position)
        while line := file.readline():
            if not line.strip():
                return start
            start += len(line)
        return start

    def read(self, content: bytes) -> Documents:
        found = Documents(lines=content.count(b"\n"))
        lines = text_lines(content, found)
        if self.documents == "line":
            texts: Iterable[str] = (line for line in lines if line.strip())
        elif self.documents == "file":
            texts = ["\n".join(lines)]
        else:
            texts = _paragraphs(lines)
        for text in texts:
            found.add(text)
        return found


class WikiText(Reader):
    """WikiText's token files: an article begins at a " = Title = " after a blank line."""

    def next_start(self, file: BinaryIO, position: int) -> int:
        start = next_line(file, position)
        blank = start == 0
        while line := file.readline():
            if blank and _TITLE.fullmatch(line.rstrip(b"\n")):
                return start
            blank = not line.strip()
            start += len(line)
        return start

    def read(self, content: bytes) -> Documents:
        found = Documents(lines=content.count(b"\n"))
        article: list[str] = []
        blank = True
        for line in text_lines(content, found):
            if blank and _TITLE.fullmatch(line.encode()) and article:
                self._close(found, article)
                article = []
            blank = not line.strip()
            article.append(line)
        self._close(found, article)
        return found

    def _close(self, found: Documents, article: list[str]) -> None:
        text = "\n".join(article)
        # The blank line before the first title of a file is no article.
        if text.strip():
            found.add(text)


def next_line(file: BinaryIO, position: int) -> int:
    """The first line that begins at or after `position`; leaves the file there."""
    if position == 0:
        return file.seek(0)
    file.seek(position - 1)
    file.readline()
    return file.tell()


def text_lines(content: bytes, found: Documents) -> list[str]:
    """Lines as text, without line ends (\\n or \\r\\n); bad ones are left out and noted."""
    content = content.replace(b"\r\n", b"\n")
    try:
        return decode(content).split("\n")
    except DataError:
        pass
    good = []
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            good.append(decode(line))
        except DataError as error:
            found.bad.append((number, str(error)))
    return good


def checked(text: str) -> str:
    """`text`, or `DataError` where it came out of an escape that is no text."""
    if "\0" in text:
        raise DataError("the text holds a NUL character (\\u0000)")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds the lone surrogate \\u{ord(text[error.start]):04x}"
        ) from None
    return text


def _paragraphs(lines: Iterable[str]) -> Iterable[str]:
    """Runs of lines that are not blank."""
    run: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            run.append(line)
        elif run:
            yield "\n".join(run)
            run = []


def _kind(value: object) -> str:
    names = {str: "string", list: "array", dict: "object", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


FORMATS = ("jsonl", "json", "txt", "wikitext")
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
    ".text": "txt",
    ".md": "txt",
    ".tokens": "wikitext",
}
LARGEST_LIST = 1 << 30
COMPRESSED = {".gz": "gzip -dk", ".zst": "zstd -dk", ".xz": "xz -dk", ".bz2": "bzip2 -dk"}


def make_reader(
    name: str, *, json_key: str, txt_documents: str, key_hint: str = "see --json_key"
) -> Reader:
    """The reader of a format in `FORMATS`; `key_hint` says what to do where a key is missing."""
    if name in ("jsonl", "json"):
        return (JsonLines if name == "jsonl" else JsonList)(json_key, key_hint)
    if name == "wikitext":
        return WikiText()
    return PlainText(txt_documents)


def refuse_compressed(path: Path) -> None:
    """`DataError` with what unpacks it, if the ending says that a file is compressed."""
    command = COMPRESSED.get(path.suffix.lower())
    if command is not None:
        raise DataError(f"{path} is compressed: unpack it first (`{command} {path.name}`)")


def detect_format(path: Path, hint: str = "Say what it is with --input_format") -> str:
    """The format of a file by its ending, and by its first lines for .txt and JSON.

    `hint` says what to do where the ending is unknown.

    Raises:
        DataError: an unknown ending, a compressed file, or a JSON array too large to be read whole.
    """
    refuse_compressed(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path}: unknown ending {suffix!r}; known are {', '.join(SUFFIXES)}. {hint}"
        )
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(BOM)
    first, *more = head.strip(b" \t\r\n").split(b"\n", 1)
    # One that is whole in a line is that line's fault, which is told with the others.
    in_lines = bool(more) and is_json(first)
    if SUFFIXES[suffix] == "jsonl" and first.startswith(b"[") and not in_lines:
        if path.stat().st_size > LARGEST_LIST:
            raise DataError(
                f"{path} is one JSON array of more than {LARGEST_LIST >> 20} MiB, which would be "
                f"read as a whole: write one object a line (`jq -c '.[]' {path.name} > "
                f"{path.stem}.jsonl`)"
            )
        return "json"
    if suffix == ".txt" and head[:1] in (b" ", b"\n") and _TITLE.fullmatch(b" " + first):
        return "wikitext"
    return SUFFIXES[suffix]
