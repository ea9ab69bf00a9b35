"""C-Eval, CMMLU and MMLU from their published directories, subject by subject.

Prompts are those of lm-evaluation-harness's tasks ceval-valid, cmmlu and mmlu: a description that
names the subject, the first questions of its dev file with their answers, and the question.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import csv_rows, jsonl
from common.errors import DataError, Place, UserError
from llm.evaluation import subjects
from llm.evaluation.choices import Item, with_shots
from llm.evaluation.subjects import Subject

ALL = "all"  # the average over every subject
_LETTERS = "ABCD"
_FIELDS = ("question", "a", "b", "c", "d", "answer")


@dataclass(frozen=True)
class Exam:
    """A published set.

    Attributes:
        subjects: in the set's order, by category.
        file: of a subject's split, from the directory.
        split: which one is measured; answers are published for it.
        has_header: whether a file's first line names its columns.
        description: comes before the first example.
        answer: ends a question.
    """

    subjects: tuple[Subject, ...]
    file: str
    split: str
    has_header: bool
    description: str
    answer: str

    def path(self, directory: Path, subject: Subject, split: str) -> Path:
        """Return where a subject's questions lie."""
        return directory / self.file.format(subject=subject.name, split=split)


EXAMS = {
    "ceval": Exam(
        subjects.CEVAL,
        "{split}/{subject}_{split}.csv",
        "val",
        has_header=True,
        description="以下是中国关于{title}的单项选择题，请选出其中的正确答案。\n\n",
        answer="答案：",
    ),
    "cmmlu": Exam(
        subjects.CMMLU,
        "{split}/{subject}.csv",
        "test",
        has_header=True,
        description="以下是关于{title}的单项选择题，请直接给出正确答案的选项。\n\n",
        answer="答案：",
    ),
    "mmlu": Exam(
        subjects.MMLU,
        "{split}/{subject}_{split}.csv",
        "test",
        has_header=False,
        description="The following are multiple choice questions (with answers) about {title}.\n\n",
        answer="Answer:",
    ),
}


@dataclass(frozen=True)
class Paper:
    """What is asked in one subject: whole prompts, with their examples."""

    subject: Subject
    file: Path
    items: list[Item]


def read_papers(
    name: str,
    directory: str | Path,
    *,
    shots: int = 5,
    only: Sequence[str] | None = None,
    limit: int | None = None,
) -> list[Paper]:
    """Read all subjects of a set, or some, in the set's order.

    Args:
        name: of the set, in `EXAMS`.
        directory: with one directory per split, as published.
        shots: examples before each question, the first ones of the subject's dev file.
        only: names of the subjects that are measured.
        limit: most questions of a subject.

    Raises:
        UserError: a subject that the set lacks, or whose file is missing.
        DataError: a line that is no question, by number.
    """
    exam, directory = EXAMS[name], Path(directory)
    if not directory.is_dir():
        raise UserError(f"data_dir={str(directory)!r} is not a directory")
    known = [subject.name for subject in exam.subjects]
    for given in only or ():
        if given not in known:
            raise UserError(
                f"subjects={given!r} is not one of the {len(known)} of {name}: {', '.join(known)}"
            )
    wanted = [subject for subject in exam.subjects if only is None or subject.name in only]
    splits = (exam.split, "dev") if shots else (exam.split,)
    _check_files(exam, directory, wanted, splits)
    papers = []
    for subject in wanted:
        file = exam.path(directory, subject, exam.split)
        solved = []
        if shots:
            dev = exam.path(directory, subject, "dev")
            solved = _read(exam, dev)
            if len(solved) < shots:
                raise UserError(
                    f"num_few_shot={shots}, but {dev} has only {len(solved)} questions; give at "
                    "most so many"
                )
        description = exam.description.format(title=subject.title)
        items = with_shots(_read(exam, file)[:limit], solved[:shots], description)
        papers.append(Paper(subject, file, items))
    return papers


def _check_files(
    exam: Exam, directory: Path, wanted: Sequence[Subject], splits: Sequence[str]
) -> None:
    """Name every subject whose file is missing, before any is read."""
    for split in splits:
        paths = {one.name: exam.path(directory, one, split) for one in wanted}
        missing = [name for name, path in paths.items() if not path.is_file()]
        if not missing:
            continue
        example = paths[missing[0]]
        cure = "give its directory as published, or only the --subjects that are there"
        if split == "dev":
            cure += ", or --num_few_shot 0, which needs no dev file"
        raise UserError(
            f"{len(missing)} of {len(wanted)} subjects have no {split} file in {directory} "
            f"({example} does not exist): {', '.join(missing)}; {cure}"
        )


def _read(exam: Exam, path: Path) -> list[Item]:
    rows = csv_rows.read(
        path,
        jsonl.read_text(path),
        columns=() if exam.has_header else _FIELDS,
        needed=_FIELDS,
        any_case=True,
    )
    items = [_item(exam, values, place) for place, values in rows]
    if not items:
        raise UserError(f"{path} has no questions")
    return items


def _item(exam: Exam, values: dict[str, str], place: Place) -> Item:
    question, answer = values["question"].strip(), values["answer"].strip()
    if not question:
        raise DataError("the question is empty", place)
    if answer not in tuple(_LETTERS):
        raise DataError(f"answer {answer!r:.40} is not one of A, B, C and D", place)
    # Only the question is stripped, as in the harness.
    offered = [f"{letter}. {values[letter.lower()]}" for letter in _LETTERS]
    prompt = "\n".join([question, *offered, exam.answer])
    return Item(prompt, tuple(_LETTERS), _LETTERS.index(answer))


def averages(
    measured: Sequence[tuple[Subject, dict[str, float]]],
) -> dict[str, dict[str, float]]:
    """Average figures of subjects by category, and over all.

    Returns:
        By category and for `ALL`: ``acc`` over questions (the harness's), its standard error
        ``acc_stderr`` from the subjects' pooled variance, ``acc_of_subjects`` (the mean over
        subjects, which C-Eval and CMMLU report), ``subjects`` and ``total`` questions.
    """
    groups: dict[str, list[dict[str, float]]] = {}
    for subject, figures in measured:
        for category in subject.categories:
            groups.setdefault(category, []).append(figures)
    groups[ALL] = [figures for _, figures in measured]
    found: dict[str, dict[str, float]] = {}
    for category, members in groups.items():
        sizes = [one["total"] for one in members]
        hits = [one["acc"] * one["total"] for one in members]
        entry = found[category] = {
            "acc": sum(hits) / sum(sizes),
            "acc_of_subjects": sum(one["acc"] for one in members) / len(members),
            "subjects": len(members),
            "total": sum(sizes),
        }
        if all("acc_stderr" in one for one in members):
            spread = sum(
                (one["total"] - 1) * one["total"] * one["acc_stderr"] ** 2 for one in members
            )
            pooled = spread / (sum(sizes) - len(members))
            entry["acc_stderr"] = math.sqrt(pooled / sum(sizes))
    return found
