"""Settings of other programs: a flag here, without effect and why, or refused with what to write.

A group's ``FOREIGN`` (:mod:`common.flags`) holds a :class:`Program` for each program whose files
and command lines its scripts take. A row says what becomes of one setting. A name that ends in
``.*`` stands for all names of a section that have no row of their own.

A source, the file or the command line, in which a row is met is that program's. Settings of it
whose mode is off have no effect there either: they are told at the start instead of refused.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from common.errors import UserError

Settings = Mapping[str, Any]


class Told(NamedTuple):
    """What becomes of settings: flags of ours with their values, and a line to say."""

    flags: Settings
    line: str = ""


@dataclass(frozen=True)
class Becomes:
    """It is a flag.

    Args:
        flag: its name here; that of the row where only values differ.
        values: words for values here, by theirs in lower case.
        refused: values that have no counterpart, and what to write instead.
        convert: makes a value of ours of any other.
        note: said at the start.
    """

    flag: str
    values: Settings = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    convert: Callable[[Any], Any] = lambda value: value
    note: str = ""


@dataclass(frozen=True)
class Sets:
    """It is several flags, or what it is depends on the settings beside it.

    Args:
        make: from its value and all settings of its source to flags here, with what to say of it
            where that is not ``note``.
        words: what it becomes, for tables.
        note: said at the start where it sets a flag.
    """

    make: Callable[[Any, Settings], Settings | Told]
    words: str
    note: str = ""


@dataclass(frozen=True)
class Only:
    """It may only have these values, which is how things are here."""

    values: tuple[Any, ...]
    instead: str


@dataclass(frozen=True)
class Idle:
    """It changes nothing here; ``usual`` are values at which nothing is missed, nor said."""

    why: str
    usual: tuple[Any, ...] = ()


Row = Becomes | Sets | Only | Idle


@dataclass(frozen=True)
class Program:
    """Another program's settings.

    Args:
        name: what people call it.
        rows: by setting.
        defaults: flags of ours whose default is another one there.
        completes: from the flags that a source of its sets to those that follow from them there,
            each with the line that says so.
        differs: lines about what the same spelling means there, from the value of each flag,
            the names that were given, and whether a source is this program's.
    """

    name: str
    rows: Mapping[str, Row]
    defaults: Settings = field(default_factory=dict)
    completes: Callable[[Settings], Iterable[Told]] = lambda values: ()
    differs: Callable[[Settings, frozenset[str], bool], Iterable[str]] = lambda *_: ()

    def row(self, name: str) -> Row | None:
        """The row of a setting, or of the section that it is in."""
        found = self.rows.get(name)
        section = name
        while found is None and "." in section:
            section = section.rpartition(".")[0]
            found = self.rows.get(f"{section}.*")
        return found


def is_value(given: Any, *values: Any) -> bool:
    """Whether a value of a file or a word of a command line is one of these."""
    return any(_same(given, value) for value in values)


def _same(given: Any, value: Any) -> bool:
    if value is None:
        return given is None or (isinstance(given, str) and given.lower() in ("none", "null"))
    if isinstance(value, bool):
        words = ("true", "1", "yes", "on") if value else ("false", "0", "no", "off")
        return str(given).lower() in words
    if isinstance(value, int | float) and isinstance(given, str | int | float):
        try:
            return float(given) == value
        except ValueError:
            return False
    if isinstance(value, str) and isinstance(given, str):
        return given.lower() == value.lower()
    return bool(given == value)


def apply(row: Row, name: str, value: Any, beside: Settings) -> Told:
    """Return what becomes of a setting.

    Args:
        row: of the setting.
        name: the setting, for messages.
        value: its value.
        beside: all settings of its source.

    Raises:
        UserError: a value that has no counterpart, with what to write instead.
    """
    if isinstance(row, Becomes):
        word = str(value).lower()
        if word in row.refused:
            raise UserError(f"{name}={value} has no counterpart here: {row.refused[word]}")
        made = row.values[word] if word in row.values else row.convert(value)
        return Told({row.flag: made}, row.note)
    if isinstance(row, Sets):
        found = row.make(value, beside)
        return found if isinstance(found, Told) else Told(found, row.note if found else "")
    if isinstance(row, Idle):
        return Told({}, "" if is_value(value, *row.usual) else row.why)
    if not is_value(value, *row.values):
        raise UserError(f"{name}={value} has no counterpart here: {row.instead}")
    return Told({})
