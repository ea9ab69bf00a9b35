"""Results with everything that they depend on: a table for people, JSON for the record."""

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.devices import KINDS
from common.files import write_whole
from common.results import Journal

_PACKAGES = (
    "paddlepaddle",
    *(kind.wheel for kind in KINDS.values()),
    "numpy",
    "sentencepiece",
    "tokenizers",
)
_COUNTS = ("tokens", "words", "bytes", "total", "missing", "truncated", "too_long")


@dataclasses.dataclass(frozen=True)
class Result:
    """One measurement: what, on which file, how, and what came out."""

    task: str
    data_file: str
    settings: dict[str, Any]
    figures: dict[str, float]


def table(results: list[Result]) -> str:
    """Return one line per figure."""
    rows = [("task", "data", "figure", "value")]
    for result in results:
        for name, value in result.figures.items():
            shown = f"{value:,.0f}" if name in _COUNTS else f"{value:.4f}"
            rows.append((result.task, Path(result.data_file).name, name, shown))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    last = max(len(row[3]) for row in rows)
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False))])
        + "  "
        + row[3].rjust(last)
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """Return the versions that results may depend on, and the commit where there is one."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "commit": _commit()}


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None


def write(file: str, model: dict[str, Any], results: list[Result]) -> None:
    """Write results and settings as JSON; the file is the old one or the whole new one."""
    write_whole(file, _document(model, results))


def _document(model: dict[str, Any], results: list[Result]) -> str:
    content = {
        "model": model,
        "results": [dataclasses.asdict(result) for result in results],
        **environment(),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


class Results:
    """Results that are kept as they come, and at the end written and shown.

    Where the end comes early, those that are there are shown, and stay in a partial file.

    Args:
        file: what is written at the end; None shows only.
        model: what was measured, for the file.
    """

    def __init__(self, file: str | None, model: dict[str, Any]) -> None:
        self._model, self._results = model, list[Result]()
        self._journal = Journal(file) if file is not None else None

    def add(self, result: Result) -> None:
        """Keep a result."""
        if self._journal is not None and not self._journal.through:
            self._journal.add(len(self._results), dataclasses.asdict(result))
        self._results.append(result)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._journal is not None:
            kept = self._journal.place if self._journal.count else None
            with self._journal:
                if kind is None:
                    self._journal.finish(_document(self._model, self._results))
            if kind is not None and kept is not None:
                sys.stderr.write(f"stopped: {len(self._results)} results are in {kept}\n")
        if self._results:
            print(table(self._results))
