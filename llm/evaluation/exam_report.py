"""What a published set's subjects came to: averages, table, chart."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm import runtime
from llm.evaluation import report
from llm.evaluation.exams import averages
from llm.evaluation.parts import PartResults
from llm.evaluation.subjects import Subject

if TYPE_CHECKING:  # only who draws loads it
    from matplotlib.figure import Figure

_COLUMNS = ("subject", "category", "questions", "acc", "title")
_CHOICES = 4
_CHANCE = 1 / _CHOICES


class ExamResults(PartResults):
    """Results of subjects."""

    @staticmethod
    def averages(results: Sequence[report.Result]) -> dict[str, Any]:
        """See `PartResults`."""
        return averages(_measured(results))

    @staticmethod
    def draw(results: Sequence[report.Result]) -> "Figure":
        """See `PartResults`."""
        return draw(results)

    def _table(self) -> str:
        return table(self.results)


def _measured(results: Sequence[report.Result]) -> list[tuple[Subject, dict[str, float]]]:
    return [
        (
            Subject(
                result.settings["subject"],
                result.settings["title"],
                tuple(result.settings["categories"]),
            ),
            result.figures,
        )
        for result in results
    ]


def table(results: Sequence[report.Result]) -> str:
    """Return one line per subject, then the averages; titles come last, as they may be wide."""
    measured = _measured(results)
    rows = [
        (
            one.name,
            one.categories[0],
            f"{figures['total']:,.0f}",
            f"{figures['acc']:.4f}",
            one.title,
        )
        for one, figures in measured
    ]
    means = [
        (
            category,
            f"subjects: {figures['subjects']:.0f}",
            f"{figures['total']:,.0f}",
            f"{figures['acc']:.4f}",
            f"mean of subjects {figures['acc_of_subjects']:.4f}",
        )
        for category, figures in averages(measured).items()
    ]
    widths = [max(len(row[column]) for row in (_COLUMNS, *rows, *means)) for column in range(4)]

    def line(row: tuple[str, ...]) -> str:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:4], widths[2:], strict=True)]
        return "  ".join([*left, *right, row[4]])

    rule = "-" * (sum(widths) + 8 + len(_COLUMNS[-1]))
    lines = [line(_COLUMNS), rule, *map(line, rows), rule, *map(line, means)]
    cut = sum(figures.get("truncated", 0) for _, figures in measured)
    if cut:
        scored = _CHOICES * sum(figures["total"] for _, figures in measured)
        lines.append(
            f"{cut:,.0f} of {scored:,.0f} choices stood behind a prompt that lost its beginning: "
            "it exceeds the model's context; a smaller --num_few_shot leaves more of it"
        )
    return "\n".join(lines)


def draw(results: Sequence[report.Result]) -> "Figure":
    """Draw accuracies of subjects as bars, coloured by category.

    Subjects have the names of their files: a machine may have no font for their titles.
    """
    with runtime.fast_imports():
        from matplotlib.figure import Figure

    measured = _measured(results)
    means = averages(measured)
    names = [subject.name for subject, _ in measured]
    figure = Figure(figsize=(8, 1.6 + 0.18 * len(names)), layout="constrained")
    axes = figure.subplots()
    for category in dict.fromkeys(subject.categories[0] for subject, _ in measured):
        own = [
            (number, figures["acc"], figures.get("acc_stderr", 0))
            for number, (subject, figures) in enumerate(measured)
            if subject.categories[0] == category
        ]
        places, heights, errors = zip(*own, strict=True)
        label = f"{category} {means[category]['acc']:.3f}"
        axes.barh(places, heights, xerr=errors, label=label, error_kw={"alpha": 0.4})
    axes.axvline(_CHANCE, color="black", linestyle=":", label="chance")
    axes.axvline(means["all"]["acc"], color="black", label=f"all {means['all']['acc']:.3f}")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"accuracy ({results[0].task})")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure
