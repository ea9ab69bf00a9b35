"""Running tasks one after the other, or together, and keeping each result as it comes."""

from collections.abc import Sequence
from itertools import groupby

from llm.config.evaluation import EXAMS
from llm.engine.opening import OpenedModel
from llm.evaluation.asking import QuestionTask, ask
from llm.evaluation.exam_report import ExamResults
from llm.evaluation.parts import PartResults
from llm.evaluation.question_report import NeedleResults, ProblemResults
from llm.evaluation.report import Result, Results
from llm.evaluation.scorer import Scorer
from llm.evaluation.task import Figures, Task

# What keeps the results of tasks that are measured alone, and goes on with earlier ones.
PARTS: dict[str | None, type[PartResults]] = {
    **dict.fromkeys(EXAMS, ExamResults),
    "gsm8k": ProblemResults,
    "needle": NeedleResults,
}


def measure(
    model: OpenedModel, scorer: Scorer, tasks: Sequence[Task], results: Results, batch_size: int
) -> None:
    """Run every task that has no result yet.

    Args:
        model: what is measured.
        scorer: of the same.
        tasks: in order; questions of a group are asked together.
        results: takes each result as soon as it is there.
        batch_size: answers that are generated at once.

    Raises:
        UserError: data that does not fit the model.
    """
    rest = [number for number in range(len(tasks)) if number not in results]

    def keep(number: int, figures: Figures) -> None:
        task = tasks[number]
        results.add(number, Result(task.name, task.file, task.settings, figures))

    for _, members in groupby(rest, key=lambda number: tasks[number].group):
        numbers = list(members)
        questions = [task for n in numbers if isinstance(task := tasks[n], QuestionTask)]
        if questions:
            ask(
                *(model, questions, batch_size),
                lambda number, figures, numbers=numbers: keep(numbers[number], figures),
            )
        else:
            for number in numbers:
                keep(number, tasks[number].run(model, scorer))
