"""Instruction data: examples of conversations from the files that the ecosystem uses.

    examples = read_examples(["alpaca.json"])

Formats: alpaca, sharegpt, messages, src_tgt, squad, as JSON lines, JSON array, CSV or Parquet;
docs/instruct_data.md shows each.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from tqdm import tqdm

from common.errors import DataError
from data.conversations.instruct_formats import (
    FORMATS,
    Example,
    from_record,
    known_keys,
    nearest,
    record_format,
    squad_prompt,
    squad_rows,
)
from data.conversations.record_files import CONTAINERS, Named, Record, find_files, read_records
from data.conversations.record_keys import note_keys, report_ignored

__all__ = ["FORMATS", "Example", "read_examples", "squad_prompt"]

logger = logging.getLogger(__name__)

OnBad = Literal["error", "skip"]
Converted = TypeVar("Converted")
SHOWN = 20


def read_examples(
    paths: Sequence[str | Path], *, format: str = "auto", on_bad: OnBad = "error"
) -> list[Example]:
    """Every example of the files, in order.

    Args:
        paths: files, or directories all of whose files with a known ending are read.
        format: alpaca, sharegpt, messages, src_tgt or squad, csv or parquet (what these hold is
            told by their columns), or "auto": told by the first record of each file.
        on_bad: "error" stops at the first record that cannot be used; "skip" leaves such
            records out and logs how many and which.

    Raises:
        DataError: a file that cannot be read, a record that cannot be used (by file and line),
            or no example at all.
    """
    bad = bad_list(on_bad)
    examples = collect_examples(paths, format, bad)
    report_bad(bad)
    return examples


def bad_list(on_bad: OnBad) -> list[str] | None:
    """Where bad records are listed that are to be left out; None where they are errors."""
    if on_bad not in ("error", "skip"):
        raise DataError(f"on_bad must be error or skip, got {on_bad!r}")
    return [] if on_bad == "skip" else None


def report_bad(bad: list[str] | None) -> None:
    """One line in the log about the records that were left out."""
    if bad:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        logger.warning("left out %d bad records: %s%s", len(bad), "; ".join(bad[:SHOWN]), more)


def collect_examples(
    paths: Sequence[str | Path], format: str, bad: list[str] | None
) -> list[Example]:
    """`read_examples`; where `bad` is a list, it takes the records that cannot be used."""
    if isinstance(paths, str | Path):
        paths = [paths]
    if format not in ("auto", *FORMATS, *CONTAINERS):
        raise DataError(
            f"unknown format {format!r}{nearest(format, [*FORMATS, *CONTAINERS])}: choose auto, "
            f"{', '.join((*FORMATS, *CONTAINERS))}"
        )
    examples: list[Example] = []
    ignored: Counter[str] = Counter()
    for path in find_files(paths):
        examples.extend(read_file(path, format, bad, ignored=ignored))
    report_ignored(ignored)
    if not examples:
        left_out = f"; {len(bad)} bad records, the first: {bad[0]}" if bad else ""
        raise DataError(f"no usable example in {', '.join(map(str, paths))}{left_out}")
    return examples


def read_file(
    path: Path,
    format: str,
    bad: list[str] | None = None,
    convert: Callable[[Record, str, str], Example] = from_record,
    *,
    ignored: Counter[str],
) -> Iterator[Example]:
    """`convert(record, kind, name)` of every record of a file; `bad` takes what cannot be used,
    and `ignored` counts the keys that mean nothing here.

    Raises:
        DataError: without `bad`, a record that cannot be used, by file and line.
    """
    kind = format if format in FORMATS else ""

    def example(record: Record, name: str) -> Example:
        nonlocal kind
        kind = kind or record_format(record)
        note_keys(record, known_keys(record, kind), ignored)
        return convert(record, kind, name)

    yield from converted(path, example, format if format in CONTAINERS else "auto", bad)


def converted(
    path: Path,
    convert: Callable[[Record, str], Converted],
    container: str = "auto",
    bad: list[str] | None = None,
) -> Iterator[Converted]:
    """`convert(record, name)` of every record of a file; `bad` takes what cannot be used.

    The nested file of SQuAD has a record a question.

    Raises:
        DataError: a file that cannot be read; without `bad`, a record that cannot be used.
    """
    records = _flat_records(path, container)
    bar = tqdm(records, f"reading {path.name}", unit="ex", disable=None, leave=False, delay=2)
    for place, record in bar:
        try:
            if isinstance(record, DataError):
                raise record
            yield convert(record, str(place))
        except DataError as error:
            if bad is None:
                raise error.at(place) from None
            bad.append(str(error.at(place)))


def _flat_records(path: Path, container: str) -> Iterator[Named]:
    for place, record in read_records(path, container):
        if not isinstance(record, DataError) and isinstance(record.get("data"), list):
            yield from squad_rows(record, place)
        else:
            yield place, record
