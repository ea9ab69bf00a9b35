"""Fields that are flags: how one is declared, and how its value is read."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from common.errors import UserError, near_name

_TRUE = {"true", "1", "yes", "on"}
_FALSE = {"false", "0", "no", "off"}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: the nearest one, if any is near."""
    return suggested(near_name(name, known)) or "; --help lists what there is"


def suggested(near: str | None) -> str:
    return f"; did you mean {near!r}?" if near else ""


class Setting(NamedTuple):
    """A flag that another program's file sets: its name, its value, and what errors call it."""

    name: str
    value: Any
    source: str


def arg(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    aliases: tuple[str, ...] = (),
    spellings: Mapping[str, str] | None = None,
    required: bool = False,
    only_with: str | tuple[str, ...] = (),
    not_with: str | tuple[str, ...] = (),
    reader: Callable[[str], Iterable["Setting"]] | None = None,
) -> Any:
    """Declare one argument: a dataclass field that carries its help, bounds and other names.

    ``aliases`` are other names of the flag, ``spellings`` other words for some of its ``choices``.
    Choices may also be said by the annotation, a ``Literal``. What is required has to come from the
    file or the command line; its default is never seen. ``only_with`` are conditions on other
    settings that all have to hold for it to have an effect, ``not_with`` ones under which it has
    none (:mod:`common.flag_rules`). A ``reader`` takes the value for another program's file, and
    returns what that sets.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "aliases": aliases,
        "spellings": spellings or {},
        "required": required,
        "only_with": (only_with,) if isinstance(only_with, str) else only_with,
        "not_with": (not_with,) if isinstance(not_with, str) else not_with,
        "reader": reader,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Argument:
    """One field of one group, with its annotation taken apart."""

    name: str
    group: type
    kind: type
    optional: bool
    is_list: bool
    choices: tuple[str, ...] | None
    default: Any
    metadata: Mapping[str, Any]

    def convert(self, value: Any, source: str) -> Any:
        """Turn a string from the command line or a value from a file into the field's type."""
        says_none = isinstance(value, str) and value.lower() in ("none", "null")
        if self.optional and (value is None or says_none):
            return None
        if value is None or (says_none and self.kind is not str):
            raise UserError(f"{source}: {self.name} needs a value of type {self.kind.__name__}")
        if self.is_list:
            items = value if isinstance(value, list | tuple) else [value]
            return [self._convert_one(item, source) for item in items]
        return self._convert_one(value, source)

    def _convert_one(self, value: Any, source: str) -> Any:
        try:
            converted = _CONVERTERS[self.kind](value)
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(
                f"{source}: {self.name}={value!r} is not a valid {self.kind.__name__}"
            ) from error
        converted = self.metadata.get("spellings", {}).get(converted, converted)
        self._check_limits(converted, source)
        return converted

    def _check_limits(self, value: Any, source: str) -> None:
        if self.choices and value not in self.choices:
            raise UserError(
                f"{source}: {self.name}={value!r} is not one of {', '.join(self.choices)}"
                + suggested(near_name(str(value), self.choices))
            )
        minimum, maximum = self.metadata.get("minimum"), self.metadata.get("maximum")
        if minimum is not None and value < minimum:
            raise UserError(f"{source}: {self.name}={value} but the minimum is {minimum}")
        if maximum is not None and value > maximum:
            raise UserError(f"{source}: {self.name}={value} but the maximum is {maximum}")


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text in _TRUE | _FALSE:
        return text in _TRUE
    raise ValueError(value)


def _to_int(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(value)
    if isinstance(value, int):
        return value
    try:
        return int(str(value))
    except ValueError:
        number = float(value)  # "1e9" is how people write token budgets
        if not number.is_integer():
            raise
        return int(number)


def _to_float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(value)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _to_str(value: Any) -> str:
    if value is None or isinstance(value, bool | dict | list | tuple):
        raise TypeError(value)
    return str(value)


_CONVERTERS: dict[type, Callable[[Any], Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
}


def describe(group: type) -> list[Argument]:
    hints = typing.get_type_hints(group)
    arguments = []
    for field in dataclasses.fields(group):
        hint = hints[field.name]
        optional = False
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            members = [m for m in typing.get_args(hint) if m is not type(None)]
            optional, hint = True, members[0]
        is_list = typing.get_origin(hint) is list
        kind = typing.get_args(hint)[0] if is_list else hint
        choices = field.metadata.get("choices")
        if typing.get_origin(kind) is typing.Literal:
            choices, kind = typing.get_args(kind), str
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = field.default
        arguments.append(
            Argument(field.name, group, kind, optional, is_list, choices, default, field.metadata)
        )
    return arguments
