"""Files of records: JSON lines, a JSON array, CSV or TSV, Parquet, told apart by their content.

A record is an object whose keys say what it is (`instruct_formats.py` knows the usual ones).
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import csv_rows, jsonl
from common.errors import DataError, Place
from data.corpus.readers import checked, refuse_compressed
from data.input_files import Files

logger = logging.getLogger(__name__)

Record = dict[str, Any]
# With its place; in place of one that cannot be read the error that says why.
Named = tuple[Place, Record | DataError]

CONTAINERS = ("json", "jsonl", "csv", "parquet")
SUFFIXES = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
PARQUET_MAGIC = b"PAR1"


def find_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files named, and those with a known ending below the directories named, sorted.

    Raises:
        DataError: nothing there, or a directory without such files.
    """
    if not paths:
        raise DataError("no data file was given")
    found = Files()
    for path in map(Path, paths):
        if path.is_dir():
            found.add_directory(path, SUFFIXES)
        elif path.is_file():
            found.add(path)
        else:
            raise DataError(f"no such file or directory: {path}")
    if found.ignored:
        count, first = len(found.ignored), found.ignored[0]
        logger.warning("passed over %d other, hidden or repeated files, e.g. %s", count, first)
    return found.paths


def read_records(path: Path, container: str = "auto") -> Iterator[Named]:
    """(place, record) of every record of a file, in its order.

    A line or an item that is no object comes as the `DataError` that says so, in place of the
    record, so that a caller may go on after it. A JSON object with a list under "data" (SQuAD)
    is one record.

    Raises:
        DataError: not such a file, or damaged as a whole.
    """
    kind = detect_container(path) if container == "auto" else container
    if kind == "parquet":
        return _parquet(path)
    return _csv(path, jsonl.read_text(path)) if kind == "csv" else _json(path)


def detect_container(path: Path) -> str:
    """json, csv or parquet, by ending and first bytes.

    Raises:
        DataError: empty, compressed, a Git LFS pointer, or of no known kind.
    """
    refuse_compressed(path)
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(jsonl.BOM)
    if not head.strip():
        raise DataError(f"{path} is empty")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`")
    if head.startswith(PARQUET_MAGIC):
        return "parquet"
    if suffix == ".parquet":
        raise DataError(f"{path} is no Parquet file: it begins with {head[:4]!r}, not b'PAR1'")
    if SUFFIXES.get(suffix) == "csv":
        return "csv"
    if head.lstrip()[:1] in (b"[", b"{"):
        return "json"
    raise DataError(
        f"{path} holds neither JSON nor CSV nor Parquet: it begins with {head[:20]!r}. Known are "
        "JSON lines, a JSON array, CSV with a header (.csv, .tsv) and Parquet"
    )


def _json(path: Path) -> Iterator[Named]:
    empty = True
    for place, item in jsonl.scan(path):
        empty = False
        if isinstance(item, dict | DataError):
            yield place, item
        else:
            kind = type(item).__name__
            yield place, DataError(f"a record must be a JSON object, not {kind}", place)
    if empty:
        blank = not path.read_bytes().removeprefix(jsonl.BOM).strip()
        raise DataError(f"{path} {'is empty' if blank else 'holds an empty JSON array'}")


def _csv(path: Path, text: str) -> Iterator[Named]:
    header = text.split("\n", 1)[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    if delimiter == "," and "," not in header and ";" in header:
        delimiter = ";"
    empty = True
    for named in csv_rows.read(path, text, delimiter=delimiter):
        empty = False
        yield named
    if empty:
        raise DataError(f"{path} holds a header but no rows")


def _parquet(path: Path) -> Iterator[Named]:
    # Half a second to load, and few need it.
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:  # type: ignore[no-untyped-call]
            for batch in file.iter_batches(4096):
                for row in batch.to_pylist():
                    number += 1
                    yield Place(path, inner=f" row {number}"), row
    except (ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is no Parquet file, or damaged: {error}") from error
    if not number:
        raise DataError(f"{path} holds no rows")


def absent(record: Record, key: str) -> DataError:
    """What is wrong with a record that has nothing under a key of its format."""
    return DataError(f"no {key!r} (its keys: {', '.join(map(repr, list(record)[:8])) or 'none'})")


def text_of(record: Record, key: str, *, required: bool = True) -> str:
    """The text under `key`; "" where it is absent or null and not `required`.

    Raises:
        DataError: absent, not a string, or no text (a NUL, a lone surrogate).
    """
    value = record.get(key)
    if value is None:
        if not required:
            return ""
        raise absent(record, key)
    if not isinstance(value, str):
        raise DataError(f"{key!r} must be a string, not {type(value).__name__}")
    return checked(value)
