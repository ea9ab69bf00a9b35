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
# A perplexity per word may have hundreds of digits.
_LARGE = 1e9
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
            figure = f"{value:.4f}" if abs(value) < _LARGE else f"{value:.4e}"
            shown = f"{value:,.0f}" if name in _COUNTS else figure
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
    write_whole(file, _document(model, results, {}))


def _document(model: dict[str, Any], results: list[Result], further: dict[str, Any]) -> str:
    content = {
        "model": model,
        **further,
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
        self._model, self._results = model, dict[int, Result]()
        self._journal = self._open(file) if file is not None else None

    def _open(self, file: str) -> Journal:
        return Journal(file)

    def _further(self) -> dict[str, Any]:
        """Return what the file says beside model and results."""
        return {}

    def _table(self) -> str:
        return table(self.results)

    @property
    def results(self) -> list[Result]:
        """Those that are there, in order."""
        return [result for _, result in sorted(self._results.items())]

    def __contains__(self, number: int) -> bool:
        """Whether the result of that number is there, from an earlier run."""
        return number in self._results

    def add(self, number: int, result: Result) -> None:
        """Keep a result; numbers count from 0."""
        if self._journal is not None and not self._journal.through:
            self._journal.add(number, dataclasses.asdict(result))
        self._results[number] = result

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
                    content = _document(self._model, self.results, self._further())
                    self._journal.finish(content)
            if kind is not None and kept is not None:
                sys.stderr.write(f"stopped: {len(self._results)} results are in {kept}\n")
        if self._results:
            print(self._table())
