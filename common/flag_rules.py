"""Flags that count only in a mode: the words in which a field says so, and who is refused.

A condition is a setting's name (``lora``: it is on), several of them (``fp16|bf16``: one is on), a
setting with values (``task=squad|choices``: it has one of them), or a setting that has to exceed a
number (``tensor_parallel_degree>1``).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

_OFF = ("", "no", "off", "none", "false")


@dataclass(frozen=True)
class Condition:
    """What other settings have to be; made from the words in a field."""

    words: str

    @property
    def names(self) -> list[str]:
        """The settings that it looks at."""
        return re.split("[=>]", self.words)[0].split("|")

    @property
    def values(self) -> list[str]:
        """The values that will do; none where the setting only has to be on."""
        values = self.words.partition("=")[2]
        return values.split("|") if values else []

    @property
    def above(self) -> float | None:
        """The number that a value has to exceed, if there is one."""
        number = self.words.partition(">")[2]
        return float(number) if number else None

    def holds(self, settings: Mapping[str, Any]) -> bool:
        """Whether it is met by these values by name."""
        if self.above is not None:
            value = settings[self.names[0]]
            return value is not None and value > self.above
        if not self.values:
            return any(not says_off(settings[name]) for name in self.names)
        found = settings[self.names[0]]
        return any(
            value in self.values for value in (found if isinstance(found, list) else [found])
        )

    def missing(self) -> tuple[str, str]:
        """What to say where it is not met: what is, and what to add."""
        if self.above is not None:
            return f"{self.names[0]} is not above {self.above:g}", "raise that"
        if self.values:
            return f"{self.names[0]} is not {' or '.join(self.values)}", "choose that"
        if len(self.names) == 1:
            return f"{self.names[0]} is off", f"add --{self.names[0]}"
        return f"{' and '.join(self.names)} are off", "add one of them"


def says_off(value: Any) -> bool:
    """Whether a value turns something off, which is true of it in every mode."""
    if isinstance(value, list):
        return all(says_off(item) for item in value)
    return value is None or value is False or (isinstance(value, str) and value.lower() in _OFF)


@dataclass(frozen=True)
class Given:
    """A value that somebody gave.

    Args:
        value: what it is.
        default: what it would be otherwise.
        source: the config file, or the command line.
        on_line: it comes from the command line.
        theirs: the program whose settings the source has, if it is another's.
    """

    value: Any
    default: Any
    source: str
    on_line: bool
    theirs: str = ""

    @property
    def is_meant(self) -> bool:
        """Whether it says more than that the default holds, as a file of all settings does."""
        return self.on_line or self.value != self.default


class Idleness(NamedTuple):
    """Why a value does not count: None where the command line itself turned its mode off."""

    why: str | None
    refusal: str = ""


def without_effect(
    name: str,
    given: Mapping[str, Given],
    settings: Mapping[str, Any],
    only_with: tuple[str, ...],
    not_with: tuple[str, ...],
) -> Idleness | None:
    """Tell whether a value that was given does not count.

    Args:
        name: a setting that was given.
        given: all that were given.
        settings: the values of all.
        only_with: conditions that all have to be met for it to have an effect.
        not_with: conditions under which it has none.

    Returns:
        None where it counts, else why not, and the refusal with the mode and what to do.
    """
    own = given[name]
    if not own.is_meant or says_off(own.value):
        return None
    for condition in map(Condition, only_with):
        if not condition.holds(settings):
            if not own.on_line and _on_line(condition, given):
                return Idleness(None)
            what, cure = condition.missing()
            said = f"{own.source}: {name} is given but {what}; {cure}, or drop {name}"
            return Idleness(what, said)
    for words in not_with:
        condition = Condition(words)
        if condition.holds(settings):
            if not own.on_line and _on_line(condition, given):
                return Idleness(None)
            beside = words.replace("|", " or ").replace(">", " above ")
            said = f"{own.source}: {name} has no effect beside {beside}; drop one of them"
            return Idleness(f"beside {beside}", said)
    return None


def _on_line(condition: Condition, given: Mapping[str, Given]) -> bool:
    return any(name in given and given[name].on_line for name in condition.names)
