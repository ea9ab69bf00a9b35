"""What GSM8K's problems and the needles in haystacks came to: averages, tables, heat map."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from llm import runtime
from llm.evaluation import report
from llm.evaluation.choices import share
from llm.evaluation.parts import PartResults

if TYPE_CHECKING:  # only who draws loads it
    from matplotlib.figure import Figure

_DARK = 0.35  # from the middle of the colours on
_WAYS = ("exact_match_strict", "exact_match_flexible")


class ProblemResults(PartResults):
    """Results of GSM8K's problems."""

    has_chart: ClassVar[bool] = False

    @staticmethod
    def averages(results: Sequence[report.Result]) -> dict[str, Any]:
        """Return the shares of right answers, strictly and flexibly read, with standard errors."""
        found: dict[str, Any] = {}
        for way in _WAYS:
            found |= share(way, [result.figures[way] for result in results])
        cut = sum(result.figures["truncated"] for result in results)
        return found | {"total": len(results), "truncated": cut}

    def _table(self) -> str:
        first = self.results[0]
        means = self.averages(self.results)
        return report.table([report.Result(first.task, first.data_file, {}, means)])


class NeedleResults(PartResults):
    """Results of needles."""

    @staticmethod
    def averages(results: Sequence[report.Result]) -> dict[str, Any]:
        """Return the share that was found: over all, by length, by depth and of each cell."""

        def by(*names: str) -> list[dict[str, Any]]:
            return [
                dict(zip(names, key, strict=True)) | share("found", hits) | {"total": len(hits)}
                for key, hits in _hits(results, names).items()
            ]

        return {
            "all": by()[0],
            "context_length": by("context_length"),
            "depth": by("depth"),
            "cells": by("context_length", "depth"),
        }

    @staticmethod
    def draw(results: Sequence[report.Result]) -> "Figure":
        """See `PartResults`."""
        return heat_map(results)

    def _table(self) -> str:
        return needle_table(self.results)


def _hits(
    results: Sequence[report.Result], names: Sequence[str]
) -> dict[tuple[Any, ...], list[float]]:
    """Return what was found, sorted by settings."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for result in results:
        key = tuple(result.settings[name] for name in names)
        found.setdefault(key, []).append(result.figures["found"])
    return dict(sorted(found.items()))


def _grid(
    results: Sequence[report.Result],
) -> tuple[list[int], list[float], Callable[[Any, Any], float | None]]:
    """Return lengths, depths, and the share that was found at both (None: not tried yet)."""
    cells = _hits(results, ("context_length", "depth"))

    def found(length: Any, depth: Any) -> float | None:
        hits = cells.get((length, depth))
        return None if hits is None else sum(hits) / len(hits)

    lengths, depths = ({key[number] for key in cells} for number in (0, 1))
    return sorted(lengths), sorted(depths), found


def needle_table(results: Sequence[report.Result]) -> str:
    """Return the share that was found: a row a depth, a column a length, with their averages."""
    lengths, depths, found = _grid(results)

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    def mean(name: str) -> list[float]:
        return [sum(hits) / len(hits) for hits in _hits(results, (name,)).values()]

    everything = sum(result.figures["found"] for result in results) / len(results)
    rows = [["depth, %", *(f"{length:,}" for length in lengths), "all lengths"]]
    for depth, average in zip(depths, mean("depth"), strict=True):
        cells = [shown(found(length, depth)) for length in lengths]
        rows.append([f"{depth:g}", *cells, shown(average)])
    rows.append(["all depths", *map(shown, mean("context_length")), shown(everything)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    rule = "-" * len(lines[0])
    lines[1:1], lines[-1:] = [rule], [rule, lines[-1]]
    return "\n".join([f"needles found, of {len(results)}, by tokens of context", *lines])


def heat_map(results: Sequence[report.Result]) -> "Figure":
    """Draw the share that was found: depths downwards, lengths to the right."""
    with runtime.fast_imports():
        from matplotlib.figure import Figure

    lengths, depths, found = _grid(results)
    shares = [[found(length, depth) for length in lengths] for depth in depths]
    size = (3 + 0.8 * len(lengths), 2 + 0.45 * len(depths))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    values = [[float("nan") if share is None else share for share in row] for row in shares]
    image = axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for row, across in enumerate(shares):
        for column, value in enumerate(across):
            if value is not None:
                shade = "white" if abs(value - 0.5) > _DARK else "black"
                middle = {"ha": "center", "va": "center", "fontsize": 8}
                axes.text(column, row, f"{value:.0%}", color=shade, **middle)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("depth of the needle, % of the text")
    figure.colorbar(image, label="found")
    return figure
