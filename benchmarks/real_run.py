"""What the parts of `make real` share: figures, commands with a log each, a line of progress."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from record import ROOT


class PartError(Exception):
    """A part cannot go on: a command of it failed."""


@dataclass(frozen=True)
class Figure:
    """What a part found.

    Args:
        name: what it is.
        value: number or text.
        demand: what it has to be; empty where it is reported only.
        held: whether it is that.
    """

    name: str
    value: float | int | str
    demand: str = ""
    held: bool = True

    def shown(self) -> str:
        """Return the value as tables have it."""
        return f"{self.value:.5g}" if isinstance(self.value, float) else str(self.value)


@dataclass
class Run:
    """One run of `make real`.

    Args:
        model: directory of the trained model.
        gguf: the file that it was made of.
        off_grid: an equal model whose weights are not on the grid of the published file.
        text: what perplexity is measured on.
        calibration: what quantization looks at.
        alpaca: instruction data to train on; None trains on a task that the suite makes.
        peers_python: of the environment with transformers.
        place: a directory for all that is written on the way.
    """

    model: Path
    gguf: Path
    off_grid: Path
    text: Path
    calibration: Path
    alpaca: Path | None
    peers_python: Path
    place: Path
    began: float = field(default_factory=time.perf_counter)
    title: str = ""
    commands: int = 0

    def say(self, what: str) -> None:
        """Show what is done now: on a terminal in place of the last line."""
        seconds = time.perf_counter() - self.began
        line = f"{self.title}: {what} ({seconds:.0f} s)"
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{line[: os.get_terminal_size(2).columns - 1]}")
        else:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def suite(self, script: str, *flags: str | Path) -> None:
        """Run a script or ``-m`` and a module of this checkout.

        Raises:
            PartError: it failed.
        """
        self._command([sys.executable, *script.split()], flags)

    def peer(
        self,
        questions: Sequence[str] = (),
        *,
        most: int = 0,
        text: Path | None = None,
        window: int = 0,
        adapter: Path | None = None,
    ) -> dict[str, Any]:
        """Return what transformers makes of questions and a text (``real_peer.py``)."""
        asked, answered = self.place / "peer-request.json", self.place / "peer-answer.json"
        request = {"model": str(self.model), "questions": list(questions), "max_new_tokens": most}
        request |= {"text": None if text is None else str(text), "window": window}
        request |= {"adapter": None if adapter is None else str(adapter)}
        asked.write_text(json.dumps(request), encoding="utf-8")
        self._command([str(self.peers_python), "benchmarks/real_peer.py"], (asked, answered))
        return read_json(answered)

    def log(self) -> Path:
        """Return a new file for what a command says."""
        self.commands += 1
        return self.place / f"{self.commands:02}.log"

    def _command(self, program: list[str], flags: Sequence[str | Path]) -> None:
        words, log = [*program, *map(str, flags)], self.log()
        with log.open("w", encoding="utf-8") as out:
            out.write(f"$ {' '.join(words)}\n")
            out.flush()
            done = subprocess.run(
                words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False
            )
        if done.returncode:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
            raise PartError(f"{words[1]} ended with {done.returncode}: {last} ({log})")


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON file's object."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


@contextmanager
def gone(*places: Path) -> Iterator[None]:
    """Remove large directories that only the block needs."""
    try:
        yield
    finally:
        for place in places:
            shutil.rmtree(place, ignore_errors=True)


Part = Callable[[Run], list[Figure]]


def run_parts(
    run: Run, parts: dict[str, Part], keep: Callable[[str, list[Figure]], None]
) -> dict[str, list[Figure]]:
    """Run parts one after the other; what fails in one does not keep the others from running.

    Args:
        run: that they belong to.
        parts: by name.
        keep: called with the name and the figures of each part that has not failed.
    """
    found = {}
    for number, (name, part) in enumerate(parts.items(), 1):
        run.title = f"[{number}/{len(parts)}] {name}"
        try:
            found[name] = part(run)
        except PartError as error:
            found[name] = [Figure("failed", str(error), "runs", held=False)]
        else:
            keep(name, found[name])
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
    return found


def broken(figures: list[Figure]) -> list[str]:
    """Return the names of what has not held."""
    return [one.name for one in figures if not one.held]


def table(found: dict[str, list[Figure]]) -> str:
    """Return a line for each figure: part, name, value, and what was demanded of it."""
    rows = [("part", "figure", "value", "demanded", "")]
    for part, figures in found.items():
        for one in figures:
            state = "" if not one.demand else "held" if one.held else "BROKEN"
            rows.append((part, one.name, one.shown(), one.demand, state))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)
