"""The one configuration loader: dataclass defaults < YAML or JSON file < command-line flags.

A script composes argument groups (dataclasses), and every field of every group is at once a
flag (``--max_steps 10``, ``--max-steps=10``) and a key of the file that may come as the first
argument; a switch is turned off by ``--switch false`` or, as in argparse, ``--no_switch``.
Anything unknown is an error that names the nearest known spelling; a name in a group's
``REFUSED`` is an error that says why it has no meaning there, and what to do instead. All that is
wrong with a file, or with the command line, is said at once.

A group's ``FOREIGN`` are settings of other programs (:mod:`common.foreign`), which become flags of
the script's, or are told as without effect at the start, or refused.

A field says in which mode it counts (``only_with``, ``not_with``, see :mod:`common.flag_rules`);
a group's ``ONLY_WITH`` and ``NOT_WITH`` say so of other groups' fields.
Given outside of it, it is an error that names the mode. Two values are none: a file's value that is
the default, so that a file may list all settings, and a file's value whose mode the command line
turns off, which goes back to the default.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from common import jsonl
from common.errors import DataError, UserError
from common.files import write_whole
from common.flag_fields import Setting, arg, describe, did_you_mean
from common.flag_registry import Registry
from common.flag_rules import Given
from common.yaml_words import read_words

__all__ = [
    "Setting",
    "arg",
    "build",
    "did_you_mean",
    "load",
    "meant",
    "read_config_file",
    "save_resolved",
    "unknown_names",
]

_CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
_MEANT = "_meant"  # where an instance keeps the names that were given


def read_config_file(
    path: str | Path, *, words: bool = False, sections: Collection[str] = ()
) -> dict[str, Any]:
    """Read a flat YAML or JSON mapping.

    Args:
        path: the file.
        words: leave YAML's values as they are written (:mod:`common.yaml_words`), for fields to
            convert, instead of what YAML takes them for.
        sections: keys that may hold mappings, whose keys are then ``section.key``.

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
        if isinstance(value, dict) and key not in sections:
            raise UserError(f"{path}: {key!r} is a section; keys are flat, one per flag")
    return dict(_flattened(content))


def _flattened(content: Mapping[Any, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flattened(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _flags(argv: Sequence[str], registry: Registry) -> Iterable[tuple[str, Any]]:
    """Return names and values; a name that is no flag here takes all words up to the next one."""
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
        switch = registry.switch_off(name)
        if switch is not None and not has_value:
            yield switch, "false"
            continue
        argument = registry.find(name)
        several = argument is None or argument.is_list
        values = [inline] if has_value else []
        while not has_value and position < len(argv) and not argv[position].startswith("--"):
            if values and not several:
                break
            values.append(argv[position])
            position += 1
        if not values and (argument is None or argument.kind is bool):
            values = ["true"]
        if not values:
            raise UserError(f"command line: --{name} needs a value")
        yield name, values if len(values) > 1 or (argument and argument.is_list) else values[0]


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
        for argument in describe(group):
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
    registry = Registry(groups)
    given: dict[str, Given] = {}
    if words and words[0].endswith(_CONFIG_SUFFIXES) and not words[0].startswith("-"):
        path = words.pop(0)
        file = read_config_file(path, words=True, sections=registry.sections())
        line = {name.replace("-", "_"): raw for name, raw in _flags(words, registry)}
        given |= registry.collect(file.items(), path, beside=line)
    given |= registry.collect(_flags(words, registry), "command line", on_line=True)
    _read_settings(registry, given)
    for name, argument in registry.arguments.items():
        if argument.metadata.get("required") and name not in given:
            raise UserError(f"--{name} is missing: {argument.metadata['help']}")
    groups_made = _build(registry, groups, given)
    if os.environ.get("PADDLE_TRAINER_ID", "0") == "0":  # of a launch's processes, one says it
        sys.stderr.writelines(f"{line}\n" for line in registry.notes)
    return groups_made


def unknown_names(groups: Sequence[type], words: Sequence[str]) -> set[str]:
    """Return the names in a command line and its config file that no group knows.

    Args:
        groups: as :func:`load` takes them.
        words: after the program's name.

    Raises:
        UserError: a config file that cannot be read.
    """
    registry = Registry(groups)
    given = {word[2:].partition("=")[0].replace("-", "_") for word in words if word[:2] == "--"}
    if words and words[0].endswith(_CONFIG_SUFFIXES):
        given |= set(read_config_file(words[0], sections=registry.sections()))
    return {name for name in given if not registry.knows(name)}


def _read_settings(registry: Registry, given: dict[str, Given]) -> None:
    """Add what other programs' files set; the command line goes before them.

    Raises:
        UserError: a setting that is bad, or that the config file has otherwise.
    """
    for name, argument in registry.arguments.items():
        reader = argument.metadata.get("reader")
        if reader is None or name not in given or given[name].value is None:
            continue
        for setting in reader(given[name].value):
            for own, one in registry.collect([setting[:2]], setting.source).items():
                there = given.get(own)
                if there is not None and not there.on_line and there.value != one.value:
                    raise UserError(
                        f"{setting.source} sets {own}={one.value!r}, and {there.source} sets "
                        f"{there.value!r}; keep one"
                    )
                if there is None or not there.on_line:
                    given[own] = one


def build(group: type, values: Mapping[str, Any], source: str) -> Any:
    """Build one group from values that a caller gives by name, as :func:`load` does from flags.

    Args:
        group: a dataclass.
        values: by name or alias, as flags or as they are.
        source: what errors call the caller.

    Raises:
        UserError: see :func:`load`.
    """
    registry = Registry([group], foreign=False)
    given = registry.collect(values.items(), source, on_line=True)
    return _build(registry, [group], given)[0]


def _build(
    registry: Registry, groups: Sequence[type], given: Mapping[str, Given]
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
