"""Differential fuzzing within a budget: random cases, each beside an independent computation.

A module of this package has `main(argv)`, which goes through `budget(argv, ...).seeds()`, tells a
`Tally` what came of each and returns `tally.report()`. A case is made of its own seed alone, so
that `--seed S --cases 1` shows one again. `python -m tests.fuzz` runs one module or all of them.
"""

import argparse
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

SHOWN = 10
SECONDS = 60.0


@dataclass(frozen=True)
class Budget:
    """How much is tried: `cases` of them (None: any number) from `seed` on, for `seconds`.

    Of modules whose cases have names, those in `only`; all where there are none.
    """

    seconds: float
    seed: int
    cases: int | None
    only: tuple[str, ...] = ()

    def seeds(self) -> Iterator[int]:
        """Yield seeds of cases until the budget is used up; at least one."""
        end = time.monotonic() + self.seconds
        for number in itertools.count():
            if number and (time.monotonic() > end or number == self.cases):
                return
            yield self.seed + number


def budget(argv: Sequence[str], about: str, names: Sequence[str] = ()) -> Budget:
    """Read the flags that all modules share.

    Args:
        argv: words of the command line.
        about: what ``--help`` says.
        names: that ``--only`` may choose from; without any there is no such flag.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time to spend")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case")
    parser.add_argument("--cases", type=int, default=None, help="cases at most")
    if names:
        parser.add_argument("--only", nargs="+", choices=names, default=[], help="nothing else")
    given = parser.parse_args(argv)
    only = tuple(getattr(given, "only", ()))
    return Budget(given.seconds, given.seed, given.cases, only)


@dataclass
class Tally:
    """What came of the cases: how many of each outcome, and those where two sides differ."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def count(self, outcome: str) -> None:
        """Note an outcome that is as it should be: "equal", "refused" or a finer name."""
        self.counts[outcome] += 1

    def differ(self, seed: int, what: str) -> None:
        """Note a silent difference, with what is needed to see it again."""
        self.counts["DIFFERENT"] += 1
        if len(self.differences) < SHOWN:
            self.differences.append(f"--seed {seed}: {what}")

    def report(self) -> int:
        """Print counts and the first differences; returns the exit status."""
        outcomes = ", ".join(f"{n} {outcome}" for outcome, n in sorted(self.counts.items()))
        print(f"{self.name}: {self.counts.total()} cases: {outcomes}", flush=True)
        for difference in self.differences:
            print(f"  {difference}", flush=True)
        return 1 if self.counts["DIFFERENT"] else 0
