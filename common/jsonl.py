"""Records in JSON: one a line, or a list of them, told apart by what the file begins with.

A line ends at \\n or \\r\\n and nowhere else: what `str.splitlines` also cuts at (U+2028, U+2029,
U+0085 and others) may stand inside a string. A byte order mark and blank lines are passed over.
"""

import contextlib
import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.errors import DataError, Place
from common.files import replacing, writing

BOM = b"\xef\xbb\xbf"
# Files with these endings hold a record a line, also where it is a single one or begins badly.
LINES = (".jsonl", ".ndjson")


def read(path: str | Path) -> Iterator[tuple[Place, object]]:
    """Every record of a file with its place, in order; lines are read one at a time.

    Raises:
        DataError: the file cannot be read, is not UTF-8 or not JSON, by file and line.
    """
    for place, value in scan(path):
        if isinstance(value, DataError):
            raise value
        yield place, value


def scan(path: str | Path) -> Iterator[tuple[Place, object]]:
    """As :func:`read`, but a bad line comes as the `DataError` that says why, so one may go on.

    What begins with "[" is a list of records, whatever the file is called. A file that is not
    called .jsonl or .ndjson and whose first line is no record by itself is one record as a whole.

    Raises:
        DataError: the file cannot be read, or is damaged as a whole.
    """
    path = Path(path)
    with _reading(path), path.open("rb") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if _bare(line))
        first = next(lines, None)
        if first is None:
            return
        number, line = first
        begin, in_lines = Place(path, number), path.suffix.lower() in LINES
        if _bare(line).startswith(b"["):
            yield from _list(begin, line, file.read())
        elif in_lines:
            yield from _rows(path, itertools.chain([first], lines))
        elif not is_json(line):
            yield Place(path), parse(line + file.read(), begin)
        elif (second := next(lines, None)) is None:
            yield Place(path), parse(line.rstrip(b"\r\n"), begin)
        else:
            yield from _rows(path, itertools.chain([first, second], lines))


def _rows(path: str | Path, lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[Place, object]]:
    for number, line in lines:
        place = Place(path, number)
        try:
            value = parse(line.rstrip(b"\r\n"), place)
        except DataError as error:
            value = error
        yield place, value


def _list(begin: Place, line: bytes, rest: bytes) -> Iterator[tuple[Place, object]]:
    """The items of the list that `line` begins; lines where each of them is a list of its own."""
    try:
        items = parse(line + rest, begin)
    except DataError:
        if not is_json(line):
            raise
        lines = enumerate([line, *rest.split(b"\n")], begin.line or 1)
        yield from _rows(begin.file, ((number, line) for number, line in lines if _bare(line)))
        return
    assert isinstance(items, list)
    for index, item in enumerate(items, 1):
        yield Place(begin.file, inner=f" item {index}"), item


def write(path: str | Path, values: Iterable[object]) -> Path:
    """Write a value a line as :func:`common.files.replacing` does; returns the path.

    Raises:
        DataError: it cannot be written; what was there stays.
    """
    path = Path(path)
    lines = (json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    with writing(path), replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    return path


def read_document(path: str | Path, *, once: bool = False) -> object:
    """The single value of a JSON file; `once` as :func:`parse` has it.

    Raises:
        DataError: the file cannot be read, or is not valid JSON.
    """
    text = read_text(path)
    try:
        value: object = json.loads(text, object_pairs_hook=unrepeated if once else None)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    return value


def read_text(path: str | Path) -> str:
    """A whole UTF-8 file, without a byte order mark; line ends stay as they are.

    Raises:
        DataError: the file cannot be read, or is not UTF-8, by line.
    """
    path = Path(path)
    with _reading(path):
        content = path.read_bytes()
    return decode(content.removeprefix(BOM), Place(path, 1))


def parse(content: bytes, begin: Place | None = None, *, once: bool | str = True) -> object:
    """The value of a line, or of all that comes from where `begin` says.

    With `once`, a key (or that key) that stands twice in one object is an error, since one of its
    two values would vanish; looking for that takes twice the time.

    Raises:
        DataError: why it is none; the place is only known with `begin`.
    """
    text = decode(content.removeprefix(BOM), begin)
    try:
        hook = functools.partial(unrepeated, only=once) if once else None
        value: object = json.loads(text, object_pairs_hook=hook)
    except json.JSONDecodeError as error:
        reason = f"not JSON: {error.msg} (column {error.colno})"
        raise DataError(reason, _further(begin, error.lineno - 1)) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", begin) from None
    return value


def unrepeated(pairs: list[tuple[str, object]], only: bool | str = True) -> dict[str, object]:
    """An object of its pairs, as `object_pairs_hook` of `json.loads`.

    Raises:
        ValueError: a key (or that key) stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen and only in (True, key):
                raise ValueError(f"the key {key!r} stands twice in one object")
            seen.add(key)
    return found


def decode(content: bytes, begin: Place | None = None) -> str:
    """Bytes as text.

    Raises:
        DataError: why they are none; the place is only known with `begin`.
    """
    at = content.find(b"\0")
    reason = "holds a NUL byte: binary data, or UTF-16 (convert with `iconv -t UTF-8`)"
    if at < 0:
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            at = error.start
            column = at - (content.rfind(b"\n", 0, at) + 1)
            reason = (
                f"not UTF-8 at byte {column} (0x{content[at]:02x}): convert with `iconv -t UTF-8`"
            )
    raise DataError(reason, _further(begin, content.count(b"\n", 0, at)))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _bare(line: bytes) -> bytes:
    return line.removeprefix(BOM).strip()


def is_json(line: bytes) -> bool:
    """Whether a line is a value by itself."""
    try:
        parse(line)
    except DataError:
        return False
    return True


def _further(begin: Place | None, lines: int) -> Place | None:
    return None if begin is None else Place(begin.file, (begin.line or 1) + lines)
