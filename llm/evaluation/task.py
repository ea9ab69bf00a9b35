"""What every measurement of ``evaluate_generation.py`` is: its data is read before any model."""

from abc import ABC, abstractmethod
from typing import Any

from llm.engine.opening import OpenedModel
from llm.evaluation.scorer import Scorer

Figures = dict[str, float]


class Task(ABC):
    """One measurement on one file, its data read.

    Attributes:
        asked: everything that is asked, where a run that ended early is gone on with.
        shared: settings that all tasks of a run have.
        group: tasks with the same one may run together.
    """

    name: str
    asked: Any = None
    group = 0

    def __init__(self, file: str) -> None:
        self.file = file
        self.settings: dict[str, Any] = {}
        self.shared: dict[str, Any] = {}

    @abstractmethod
    def run(self, model: OpenedModel, scorer: Scorer) -> Figures:
        """Measure a model.

        Raises:
            UserError: data that does not fit the model.
        """
