"""The one configuration loader: dataclass defaults < YAML or JSON file < command-line flags.

A script composes argument groups (dataclasses), and every field of every group is at once a
flag (``--max_steps 10``, ``--max-steps=10``) and a key of the file that may come as the first
argument. Anything unknown is an error that names the nearest known spelling; a name in a group's
``REFUSED`` is an error that says why it has no meaning there, and what to do instead.

A field says in which mode it counts (``only_with``, ``not_with``, see :mod:`common.flag_rules`);
a group's ``ONLY_WITH`` and ``NOT_WITH`` say so of other groups' fields.
Given outside of it, it is an error that names the mode. Two values are none: a file's value that is
the default, so that a file may list all settings, and a file's value whose mode the command line
turns off, which goes back to the default.
"""

import argparse
import dataclasses
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from common import jsonl
from common.errors import DataError, UserError, near_name
from common.files import write_whole
from common.flag_rules import Given, without_effect
from common.yaml_words import read_words

_CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
_MEANT = "_meant"  # where an instance keeps the names that were given
_TRUE = {"true", "1", "yes", "on"}
_FALSE = {"false", "0", "no", "off"}


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
) -> Any:
    """Declare one argument: a dataclass field that carries its help, bounds and other names.

    ``aliases`` are other names of the flag, ``spellings`` other words for some of its ``choices``.
    Choices may also be said by the annotation, a ``Literal``. What is required has to come from the
    file or the command line; its default is never seen. ``only_with`` are conditions on other
    settings that all have to hold for it to have an effect, ``not_with`` ones under which it has
    none (:mod:`common.flag_rules`).
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
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class _Argument:
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
                + _suggested(near_name(str(value), self.choices))
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


def _describe(group: type) -> list[_Argument]:
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
            _Argument(field.name, group, kind, optional, is_list, choices, default, field.metadata)
        )
    return arguments


class _Registry:
    """All arguments of the groups a script uses, by name and by alias."""

    def __init__(self, groups: Sequence[type]) -> None:
        self.arguments: dict[str, _Argument] = {}
        self.aliases: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.only_with: dict[str, tuple[str, ...]] = {}
        self.not_with: dict[str, tuple[str, ...]] = {}
        for group in groups:
            self.refused |= getattr(group, "REFUSED", {})
            self.only_with |= getattr(group, "ONLY_WITH", {})
            self.not_with |= getattr(group, "NOT_WITH", {})
            for argument in _describe(group):
                assert argument.name not in self.arguments, f"{argument.name} declared twice"
                self.arguments[argument.name] = argument
                for alias in argument.metadata.get("aliases", ()):
                    self.aliases[alias] = argument.name

    def resolve(self, name: str, source: str) -> _Argument:
        name = name.replace("-", "_")
        name = self.aliases.get(name, name)
        if name in self.refused:
            raise UserError(f"{source}: {name}: {self.refused[name]}")
        if name not in self.arguments:
            known = [*self.arguments, *self.aliases]
            raise UserError(f"{source}: unknown {name!r}" + did_you_mean(name, known))
        return self.arguments[name]

    def collect(self, items: Iterable[tuple[str, Any]], source: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, raw in items:
            argument = self.resolve(name, source)
            value = argument.convert(raw, source)
            if argument.name in values and values[argument.name] != value:
                raise UserError(
                    f"{source}: {argument.name} is given twice, as {values[argument.name]!r} "
                    f"and as {value!r} (spelled {name!r}); keep one"
                )
            values[argument.name] = value
        return values

    def settle(self, given: Mapping[str, Given]) -> dict[str, Any]:
        """Return the given values that count.

        Raises:
            UserError: one that has no effect beside the others, with the mode that it needs.
        """
        settings = {name: argument.default for name, argument in self.arguments.items()}
        settings |= {name: one.value for name, one in given.items()}
        idle = set()
        for name in sorted(given, key=lambda name: name in self.not_with):  # fields' own first
            metadata = self.arguments[name].metadata
            only_with = (*metadata.get("only_with", ()), *self.only_with.get(name, ()))
            not_with = (*metadata.get("not_with", ()), *self.not_with.get(name, ()))
            if without_effect(name, given, settings, only_with, not_with):
                idle.add(name)
        return {name: one.value for name, one in given.items() if name not in idle}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: the nearest one, if any is near."""
    return _suggested(near_name(name, known)) or "; --help lists what there is"


def _suggested(near: str | None) -> str:
    return f"; did you mean {near!r}?" if near else ""


def read_config_file(path: str | Path, *, words: bool = False) -> dict[str, Any]:
    """Read a flat YAML or JSON mapping.

    Args:
        path: the file.
        words: leave YAML's values as they are written (:mod:`common.yaml_words`), for fields to
            convert, instead of what YAML takes them for.

    Raises:
        UserError: the file is missing, unreadable, not valid YAML/JSON, or not a flat mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config file {path}: {error}") from error
    try:
        if path.suffix == ".json":
            content = jsonl.parse(text.encode())
        else:
            content = read_words(text) if words else yaml.safe_load(text)
    except (DataError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} has to be a mapping of names to values, not {content!r:.60}")
    for key, value in content.items():
        if isinstance(value, dict):
            raise UserError(f"{path}: {key!r} is a section; keys are flat, one per flag")
    return {str(key): value for key, value in content.items()}


def _flags(argv: Sequence[str], registry: _Registry) -> Iterable[tuple[str, Any]]:
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not word.startswith("--"):
            raise UserError(
                f"command line: {word!r} is not a flag; flags look like --name value, and a config "
                f"file ({', '.join(_CONFIG_SUFFIXES)}) may only come first"
            )
        name, has_value, inline = word[2:].partition("=")
        argument = registry.resolve(name, "command line")
        values = [inline] if has_value else []
        while not has_value and position < len(argv) and not argv[position].startswith("--"):
            if values and not argument.is_list:
                break
            values.append(argv[position])
            position += 1
        if not values and argument.kind is bool:
            values = ["true"]
        if not values:
            raise UserError(f"command line: --{name} needs a value")
        yield name, values if argument.is_list else values[0]


def _help_text(groups: Sequence[type], prog: str, description: str) -> str:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [CONFIG.yaml|CONFIG.json] [--flag value ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A config file holds the same names as the flags; flags override it.",
        allow_abbrev=False,
    )
    for group in groups:
        section = parser.add_argument_group(group.__name__, (group.__doc__ or "").split("\n")[0])
        for argument in _describe(group):
            spellings = [f"--{n}" for n in (argument.name, *argument.metadata.get("aliases", ()))]
            kind = argument.kind.__name__.upper()
            metavar = "|".join(argument.choices) if argument.choices else kind
            shown = str(argument.metadata.get("help", "")).replace("%", "%%")
            required = argument.metadata.get("required")
            for condition in argument.metadata.get("only_with", ()):
                shown += f"; with {condition}"
            section.add_argument(
                *spellings,
                metavar=metavar + (" ..." if argument.is_list else ""),
                help=f"{shown} ({'required' if required else f'default: {argument.default}'})",
            )
    return parser.format_help()


def load(
    groups: Sequence[type], argv: Sequence[str] | None = None, *, prog: str, description: str = ""
) -> tuple[Any, ...]:
    """Build one instance per group from defaults, an optional first config file, and flags.

    Each group's ``validate()``, where it has one, runs on the result.

    Args:
        groups: dataclasses with disjoint field names.
        argv: words after the program's name; None takes ``sys.argv[1:]``.
        prog: name shown in the help.
        description: what the script does, shown by ``--help``.

    Raises:
        UserError: an unknown name (with the nearest one), a value of the wrong type or out of
            bounds, one without effect, a required one missing, or a config file that cannot be
            read.
        SystemExit: status 0 after printing ``--help``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in words):
        sys.stdout.write(_help_text(groups, prog, description))
        raise SystemExit(0)
    registry = _Registry(groups)
    given: dict[str, Given] = {}
    if words and words[0].endswith(_CONFIG_SUFFIXES) and not words[0].startswith("-"):
        path = words.pop(0)
        file = read_config_file(path, words=True)
        for name, value in registry.collect(file.items(), path).items():
            given[name] = Given(value, registry.arguments[name].default, path, on_line=False)
    line = "command line"
    for name, value in registry.collect(_flags(words, registry), line).items():
        given[name] = Given(value, registry.arguments[name].default, line, on_line=True)
    for name, argument in registry.arguments.items():
        if argument.metadata.get("required") and name not in given:
            raise UserError(f"--{name} is missing: {argument.metadata['help']}")
    return _build(registry, groups, given)


def build(group: type, values: Mapping[str, Any], source: str) -> Any:
    """Build one group from values that a caller gives by name, as :func:`load` does from flags.

    Args:
        group: a dataclass.
        values: by name or alias, as flags or as they are.
        source: what errors call the caller.

    Raises:
        UserError: see :func:`load`.
    """
    registry = _Registry([group])
    given = {
        name: Given(value, registry.arguments[name].default, source, on_line=True)
        for name, value in registry.collect(values.items(), source).items()
    }
    return _build(registry, [group], given)[0]


def _build(
    registry: _Registry, groups: Sequence[type], given: Mapping[str, Given]
) -> tuple[Any, ...]:
    values = registry.settle(given)
    result = []
    for group in groups:
        own = {n: v for n, v in values.items() if registry.arguments[n].group is group}
        instance = group(**own)
        vars(instance)[_MEANT] = frozenset(name for name in own if given[name].is_meant)
        if hasattr(instance, "validate"):
            instance.validate()
        result.append(instance)
    return tuple(result)


def meant(group: Any) -> frozenset[str]:
    """Return the names that the user set in a group that :func:`load` made.

    A config file's value that is the default does not count: such files may list all settings.
    """
    names: frozenset[str] = vars(group).get(_MEANT, frozenset())
    return names


def save_resolved(
    groups: Sequence[Any], path: str | Path, leave_out: frozenset[str] = frozenset()
) -> None:
    """Write every value of the groups as one flat YAML file that :func:`load` accepts again."""
    flat: dict[str, Any] = {}
    for group in groups:
        flat |= {f.name: getattr(group, f.name) for f in dataclasses.fields(group)}
    flat = {name: value for name, value in flat.items() if name not in leave_out}
    write_whole(path, yaml.safe_dump(flat, sort_keys=False, allow_unicode=True))
