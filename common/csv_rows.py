"""Rows of CSV files, read strictly: a comma or a quotation mark too many is an error, not a shift.

An unquoted comma moves every cell behind it into the next column, and a quotation mark that is
never closed swallows the rows that follow: what is left may still look like rows.
"""

import csv
import io
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from common.errors import DataError, Place

# The whole of a cell may be a long document.
_LONGEST_CELL = 1 << 30


def read(
    path: Path,
    text: str,
    *,
    columns: Sequence[str] = (),
    needed: Collection[str] = (),
    any_case: bool = False,
    delimiter: str = ",",
) -> Iterator[tuple[Place, dict[str, str]]]:
    """Every row with its place, by the names of its columns; blank lines are passed over.

    Args:
        path: of the file, for messages.
        text: what it holds.
        columns: names, where the first row has none.
        needed: names that have to be among them.
        any_case: names are those of the header in lower case, and so are `needed`.
        delimiter: between two cells.

    Raises:
        DataError: a row that is no CSV, has cells too many or too few, or a header that lacks a
            column or names one twice; by the line where the row begins.
    """
    csv.field_size_limit(_LONGEST_CELL)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names = list(columns)
    while True:
        place = Place(path, rows.line_num + 1)
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise DataError(f"the row that begins here is no CSV: {error}", place) from None
        if row is None:
            return
        if not row:
            continue
        if not names:
            names = [name.strip().lower() if any_case else name.strip() for name in row]
            _check_header(names, needed, place)
            continue
        if len(row) != len(names):
            raise DataError(
                f"{len(row)} cells where there are {len(names)} columns ({', '.join(names)}): is a "
                "comma or a line break not quoted?",
                place,
            )
        yield place, dict(zip(names, row, strict=True))


def _check_header(names: Sequence[str], needed: Collection[str], place: Place) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(
            f"the column {twice[0]!r} stands twice in the header: one of the two would be lost",
            place,
        )
    lacking = [name for name in needed if name not in names]
    if lacking:
        raise DataError(
            f"the header has no {lacking[0]!r} among {', '.join(map(repr, names))}; the columns "
            f"{', '.join(needed)} are needed",
            place,
        )
