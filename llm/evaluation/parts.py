"""Results of many parts of one measurement: each is kept as it comes, and an early end goes on."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from common.errors import DataError, Place, UserError
from common.files import check_target, followed, replacing, written_through
from common.results import Journal, check_earlier, partial
from llm import runtime
from llm.evaluation import report
from llm.evaluation.task import Task
from llm.llama.files.packed import SUFFIX as PACKED

if TYPE_CHECKING:  # only who draws loads it
    from matplotlib.figure import Figure

_PLACES = ("model_name_or_path", "model_dir", "lora_path", "prefix_path")


class PartResults(report.Results):
    """Results of parts, of which earlier ones are taken up if they are of the same work.

    Args:
        file: what is written at the end, with a chart beside it; None shows only.
        model: what is measured: the flags that open it.
        tasks: one for each part.
        kernels: what runs of it, for the file; follows from the flags on this machine.

    Attributes:
        has_chart: whether `draw` draws one.

    Raises:
        UserError: a place that cannot be written.
        DataError: results of other work, by line.
    """

    has_chart: ClassVar[bool] = True

    def __init__(
        self,
        file: str | None,
        model: dict[str, Any],
        tasks: Sequence[Task],
        kernels: dict[str, str] | None = None,
    ) -> None:
        self._numbers = _numbers(model, tasks, file)
        self._keys = list(self._numbers)
        self._shared = tasks[0].shared
        self._chart = self.chart_of(file)
        super().__init__(file, model | {"ops": kernels} if kernels is not None else model)

    @classmethod
    def check(cls, file: str | None, model: dict[str, Any], tasks: Sequence[Task]) -> None:
        """Refuse places and earlier results before a model is opened, with the same errors."""
        chart = cls.chart_of(file)
        if chart is not None:
            check_target(chart, "output_file")
        if file is not None:
            numbers = _numbers(model, tasks, file)
            check_earlier(file, lambda place, value: _earlier(numbers, place, value)[0])

    @classmethod
    def chart_of(cls, file: str | None) -> Path | None:
        """Return where the chart of an output file lies; None without a regular file.

        Raises:
            UserError: the name that the chart would have.
        """
        if not cls.has_chart or file is None or written_through(followed(Path(file))):
            return None
        chart = Path(file).with_suffix(".png")
        if chart == Path(file):
            raise UserError(
                f"output_file={file} gets JSON, and a chart is written beside it with the ending "
                ".png; name it .json"
            )
        return chart

    @staticmethod
    def averages(results: Sequence[report.Result]) -> dict[str, Any]:
        """Return what the parts come to, for the file."""
        raise NotImplementedError

    @staticmethod
    def draw(results: Sequence[report.Result]) -> "Figure":
        """Return the chart of the parts, where there is to be one."""
        raise NotImplementedError

    def add(self, number: int, result: report.Result) -> None:
        """Keep a part's result with what it is of."""
        settings = result.settings | {"key": self._keys[number]}
        super().add(number, dataclasses.replace(result, settings=settings))

    def _open(self, file: str) -> Journal:
        def take(place: Place, value: object) -> int:
            number, result = _earlier(self._numbers, place, value)
            self._results[number] = result
            return number

        return Journal(file, take, replaced=True)

    def _further(self) -> dict[str, Any]:
        shared = {"settings": self._shared} if self._shared else {}
        return shared | {"averages": self.averages(self.results)}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, at)
        if kind is None and self._chart is not None:
            with runtime.fast_imports():
                from matplotlib.backends.backend_agg import FigureCanvasAgg

            figure = self.draw(self.results)
            with replacing(self._chart) as temporary:
                canvas = FigureCanvasAgg(figure)  # type: ignore[no-untyped-call]
                canvas.print_png(str(temporary))  # type: ignore[no-untyped-call]
            print(f"chart: {self._chart}")


def _numbers(model: dict[str, Any], tasks: Sequence[Task], output: str | None) -> dict[str, int]:
    """Return each task's number by what stands for it: model, questions and how they are asked."""
    files = []
    for name in _PLACES:
        place = Path(model.get(name) or "")
        found = sorted(place.iterdir()) if place.is_dir() and model.get(name) else [place]
        states = [(one.name, one.stat()) for one in found if _is_of_the_model(one, output)]
        files.append([(file, state.st_size, state.st_mtime_ns) for file, state in states])
    opened = json.dumps([model, files, tasks[0].shared], sort_keys=True)
    return {_key(opened, task): number for number, task in enumerate(tasks)}


def _is_of_the_model(file: Path, output: str | None) -> bool:
    """Whether a file of a model's directory was there before anything was run with it."""
    made_here = file.name.startswith(".") or file.suffix == PACKED
    return file.is_file() and not made_here and (output is None or not _beside(file, output))


def _beside(file: Path, output: str) -> bool:
    """Whether a file holds results, or is their chart."""
    target = followed(Path(output))
    results = (target, partial(target), target.with_suffix(".png"))
    return file.resolve() in [one.resolve() for one in results]


def _key(opened: str, task: Task) -> str:
    content = json.dumps([opened, task.name, task.settings, task.asked], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _earlier(numbers: dict[str, int], place: Place, value: object) -> tuple[int, report.Result]:
    names = {field.name for field in dataclasses.fields(report.Result)}
    key = None
    if isinstance(value, dict) and value.keys() == names and isinstance(value["settings"], dict):
        key = value["settings"].get("key")
    if not isinstance(value, dict) or key not in numbers:
        raise DataError(
            "this result is of another model, other questions or other settings; give the same "
            f"command to go on, remove {place.file} to begin again, or choose another output_file",
            place,
        )
    return numbers[key], report.Result(**value)
