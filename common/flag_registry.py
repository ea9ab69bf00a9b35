"""What names mean to a script: its flags, their aliases, and settings of other programs."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.errors import UserError
from common.flag_fields import Argument, describe, did_you_mean
from common.flag_rules import Condition, Given, without_effect
from common.foreign import Becomes, Idle, Program, Row, Sets, apply


class Registry:
    """All arguments of the groups a script uses, by name and by alias.

    Attributes:
        notes: what is to be said at the start, in order.
    """

    def __init__(self, groups: Sequence[type], *, foreign: bool = True) -> None:
        self.arguments: dict[str, Argument] = {}
        self.aliases: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.only_with: dict[str, tuple[str, ...]] = {}
        self.not_with: dict[str, tuple[str, ...]] = {}
        self.programs: list[Program] = programs_of(groups) if foreign else []
        self.notes: list[str] = []
        for group in groups:
            self.refused |= getattr(group, "REFUSED", {})
            self.only_with |= getattr(group, "ONLY_WITH", {})
            self.not_with |= getattr(group, "NOT_WITH", {})
            for argument in describe(group):
                assert argument.name not in self.arguments, f"{argument.name} declared twice"
                self.arguments[argument.name] = argument
                for alias in argument.metadata.get("aliases", ()):
                    self.aliases[alias] = argument.name

    def find(self, name: str) -> Argument | None:
        """The argument of that name or alias, if there is one."""
        name = name.replace("-", "_")
        return self.arguments.get(self.aliases.get(name, name))

    def switch_off(self, name: str) -> str | None:
        """Return the switch that ``no_NAME`` turns off, as in argparse; None for other names."""
        name = name.replace("-", "_")
        switch = name.removeprefix("no_")
        argument = self.find(switch)
        known = name in self.names() or name in self.refused
        if known or switch == name or argument is None or argument.kind is not bool:
            return None
        return switch

    def knows(self, name: str) -> bool:
        """Whether a name is a flag here, or a setting of another program."""
        if self.find(name) is not None or self.switch_off(name) is not None:
            return True
        return any(program.row(name) is not None for program in self.programs)

    def names(self) -> set[str]:
        """Every name that is known, of other programs too."""
        foreign = (name for program in self.programs for name in program.rows)
        return {*self.arguments, *self.aliases, *foreign}

    def sections(self) -> set[str]:
        """Sections of other programs' files."""
        return {name.partition(".")[0] for name in self.names() if "." in name}

    def _resolve(self, name: str, source: str) -> Argument:
        found = self.find(name)
        name = self.aliases.get(name, name)
        if name in self.refused:
            raise UserError(f"{source}: {name}: {self.refused[name]}")
        if found is None:
            known = [one for one in self.names() if ("." in one) == ("." in name)]
            raise UserError(f"{source}: unknown {name!r}" + did_you_mean(name, known))
        return found

    def collect(
        self,
        items: Iterable[tuple[str, Any]],
        source: str,
        *,
        on_line: bool = False,
        beside: Mapping[str, Any] | None = None,
    ) -> dict[str, Given]:
        """Return what a source gives, by our names; what it is to say of it joins ``notes``.

        Args:
            items: names and values as they stand there.
            source: what messages call it.
            on_line: it is the command line.
            beside: what another source gives that goes before this one.

        Raises:
            UserError: everything that is wrong with it, a line each.
        """
        items = [(name.replace("-", "_"), raw) for name, raw in items]
        program = self._whose([name for name, _ in items])
        beside = dict(items) | dict(beside or {})
        idle: dict[str, list[str]] = {}
        values: dict[str, Any] = {}
        problems: list[str] = []
        for name, raw in items:
            try:
                for own, value in self._translated(name, raw, beside, program, idle, source):
                    self._take(values, own, value, name, source)
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError("\n".join(dict.fromkeys(problems)))
        for why, names in idle.items():
            self.notes.append(f"{source}: without effect: {', '.join(names)} ({why})")
        self._complete(values, program, source)
        return {
            name: Given(value, self.arguments[name].default, source, on_line, program)
            for name, value in values.items()
        }

    def _whose(self, names: Iterable[str]) -> str:
        """Return the program of whose settings most are met; empty where there are none."""
        met: Counter[str] = Counter()
        for name in names:
            if self.find(name) is None:
                met.update({p.name for p in self.programs if p.row(name) is not None})
        # Of two with as many, the first in the groups' order.
        return max((p.name for p in self.programs if met[p.name]), key=lambda n: met[n], default="")

    def _row(self, name: str, program: str) -> Row | None:
        """The row of a setting in a source of that program.

        A flag of ours is what it is here: only its values may be spelled as there, and in a source
        of a program it may be several flags, too.
        """
        rows = {p.name: row for p in self.programs if (row := p.row(name)) is not None}
        found = rows.get(program, next(iter(rows.values()), None))
        if self.find(name) is None or isinstance(found, Becomes):
            return found
        return found if isinstance(found, Sets) and program in rows else None

    def _translated(
        self,
        name: str,
        raw: Any,
        beside: Mapping[str, Any],
        program: str,
        idle: dict[str, list[str]],
        source: str,
    ) -> Iterable[tuple[str, Any]]:
        """Return the flags that a setting is, with their values as they were written."""
        row = self._row(name, program)
        if row is None or name in self.refused:
            return [(name, raw)]
        try:
            told = apply(row, name, raw, beside)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        if isinstance(row, Idle):
            if told.line:
                idle.setdefault(told.line, []).append(name)
        elif told.line:
            self.notes.append(f"{source}: {name}: {told.line}")
        return told.flags.items()

    def _take(self, values: dict[str, Any], own: str, raw: Any, said: str, source: str) -> None:
        argument = self._resolve(own, source)
        value = argument.convert(raw, source)
        there = values.get(argument.name)
        if argument.is_list and value and there:
            value = [*there, *value]  # --model_alias a --model_alias b
        elif argument.name in values and there != value:
            raise UserError(
                f"{source}: {argument.name} is given twice, as {there!r} and as {value!r} "
                f"(spelled {said!r}); keep one"
            )
        values[argument.name] = value

    def _complete(self, values: dict[str, Any], name: str, source: str) -> None:
        """Add what follows from the values in the program whose source it is."""
        for program in self.programs:
            if program.name != name:
                continue
            for told in program.completes(dict(values)):
                made = {
                    flag: value
                    for flag, value in told.flags.items()
                    if values.get(flag, self.arguments[flag].default) != value
                }
                if made:
                    values |= made
                    self.notes.append(f"{source}: {told.line}")

    def settle(self, given: Mapping[str, Given]) -> dict[str, Any]:
        """Return the given values that count.

        Raises:
            UserError: one that has no effect beside the others, with the mode that it needs.
        """
        settings = self.settings(given)
        idle: dict[tuple[str, str], list[str]] = {}
        dropped = set()
        for name in sorted(given, key=lambda name: name in self.not_with):  # fields' own first
            found = without_effect(name, given, settings, *self._conditions(name))
            if found is None:
                continue
            if found.why is not None:
                if not given[name].theirs:
                    raise UserError(found.refusal)
                idle.setdefault((given[name].source, found.why), []).append(name)
            dropped.add(name)
        for (source, why), names in idle.items():
            self.notes.append(f"{source}: without effect: {', '.join(names)} ({why})")
        self._compare(given, settings)
        return {name: one.value for name, one in given.items() if name not in dropped}

    def settings(self, given: Mapping[str, Given]) -> dict[str, Any]:
        """The value of every flag, given or default."""
        defaults = {name: argument.default for name, argument in self.arguments.items()}
        return defaults | {name: one.value for name, one in given.items()}

    def _conditions(self, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        metadata = self.arguments[name].metadata
        return (
            (*metadata.get("only_with", ()), *self.only_with.get(name, ())),
            (*metadata.get("not_with", ()), *self.not_with.get(name, ())),
        )

    def _compare(self, given: Mapping[str, Given], settings: Mapping[str, Any]) -> None:
        """Say where the same settings mean something else in the programs that were met."""
        sources = {one.theirs: one.source for one in given.values() if one.theirs}
        for program in self.programs:
            met = program.name in sources
            lines = list(program.differs(settings, frozenset(given), met))
            others = [
                f"{name}={settings[name]} (there {there})"
                for name, there in program.defaults.items()
                if met and name in self.arguments and name not in given
                if settings[name] != there and self._counts(name, settings)
            ]
            if others:
                lines.append(f"not given, with another default there: {', '.join(others)}")
            where = sources.get(program.name, program.name)
            self.notes += [f"{where}: {line}" for line in lines]

    def _counts(self, name: str, settings: Mapping[str, Any]) -> bool:
        only_with, not_with = self._conditions(name)
        return all(Condition(words).holds(settings) for words in only_with) and not any(
            Condition(words).holds(settings) for words in not_with
        )


def programs_of(groups: Iterable[type]) -> list[Program]:
    """The other programs whose settings these groups take, those of their bases too."""
    found = [
        program
        for group in groups
        for base in reversed(group.__mro__)
        for program in vars(base).get("FOREIGN", ())
    ]
    return list({id(program): program for program in found}.values())
