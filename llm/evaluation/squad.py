"""Answers of SQuAD's layout, and exact match and F1 as SQuAD v1.1's official evaluation has them.

Rajpurkar et al. 2016, section 6.1, and its ``evaluate-v1.1.py``.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import jsonl
from common.errors import UserError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Question:
    """One question of a SQuAD file."""

    id: str
    context: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Measure:
    """How a prediction is compared with the acceptable answers.

    Args:
        plain: what of a text has to be the same for an exact match.
        segments: the pieces of a text that F1 counts.
        common: how many pieces two texts share.
    """

    plain: Callable[[str], str]
    segments: Callable[[str], list[str]]
    common: Callable[[Sequence[str], Sequence[str]], int]

    def exact_match(self, prediction: str, answers: Sequence[str]) -> float:
        """Return 1 if the prediction equals one of the answers but for what is dropped, else 0.

        Raises:
            UserError: no answers.
        """
        return self._best(self._same, prediction, answers)

    def f1(self, prediction: str, answers: Sequence[str]) -> float:
        """Return the best harmonic mean of precision and recall over the answers, 0 to 1.

        Raises:
            UserError: no answers.
        """
        return self._best(self._overlap, prediction, answers)

    @staticmethod
    def _best(
        compare: Callable[[str, str], float], prediction: str, answers: Sequence[str]
    ) -> float:
        if not answers:
            raise UserError(
                "a question without answers cannot be scored; SQuAD v1.1 has at least one"
            )
        return max(compare(prediction, answer) for answer in answers)

    def _same(self, prediction: str, answer: str) -> float:
        return float(self.plain(prediction) == self.plain(answer))

    def _overlap(self, prediction: str, answer: str) -> float:
        predicted, true = self.segments(prediction), self.segments(answer)
        common = self.common(predicted, true)
        if common == 0:
            return 0.0
        precision, recall = common / len(predicted), common / len(true)
        return 2 * precision * recall / (precision + recall)


def normalize(text: str) -> str:
    """Lower-case, drop ASCII punctuation and English articles, and make every gap one space."""
    plain = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def _words(text: str) -> list[str]:
    return normalize(text).split()


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    return (Counter(one) & Counter(other)).total()


SQUAD = Measure(normalize, _words, _shared)


def score_pairs(
    pairs: Sequence[tuple[str, Sequence[str]]],
    total: int | None = None,
    measure: Measure = SQUAD,
) -> dict[str, float]:
    """Score answers with the acceptable ones beside them.

    Args:
        pairs: each given answer and the acceptable ones.
        total: how many were asked for, at least as many as were given; missing ones are wrong.
        measure: how they are compared.

    Returns:
        ``exact_match`` and ``f1`` in percent of all, and the counts ``total`` and ``missing``.

    Raises:
        UserError: nothing to score, or a question without acceptable answers.
    """
    asked = len(pairs) if total is None else total
    if asked == 0:
        raise UserError("there are no answers to score")
    return {
        "exact_match": 100 * sum(measure.exact_match(*pair) for pair in pairs) / asked,
        "f1": 100 * sum(measure.f1(*pair) for pair in pairs) / asked,
        "total": asked,
        "missing": asked - len(pairs),
    }


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], measure: Measure = SQUAD
) -> dict[str, float]:
    """Score answers by question id, as :func:`score_pairs` does.

    Raises:
        UserError: no questions, or predictions of which none belongs to them.
    """
    if not questions:
        raise UserError("there are no questions to score")
    answered = [question for question in questions if question.id in predictions]
    if not answered:
        raise UserError(
            f"none of the {len(predictions)} predictions has the id of one of the "
            f"{len(questions)} questions; do the two files belong together?"
        )
    pairs = [(predictions[question.id], question.answers) for question in answered]
    return score_pairs(pairs, len(questions), measure)


def read_questions(path: str | Path) -> list[Question]:
    """Read a dataset in SQuAD v1.1's layout.

    Raises:
        UserError: an unreadable file, another layout, a repeated id, or a question without answers.
    """
    content: Any = jsonl.read_document(path, once=True)
    questions: dict[str, Question] = {}
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for item in paragraph["qas"]:
                    question = Question(
                        id=str(item["id"]),
                        context=paragraph["context"],
                        question=item["question"],
                        answers=tuple(answer["text"] for answer in item["answers"]),
                    )
                    wrong = [one for one in question.answers if not isinstance(one, str)]
                    if wrong:
                        raise UserError(
                            f"{path}: an answer of question {question.id!r} has to be text, not "
                            f"{wrong[0]!r:.40}"
                        )
                    if question.id in questions:
                        raise UserError(f"{path}: two questions have the id {question.id!r}")
                    if not question.answers:
                        raise UserError(
                            f"{path}: question {question.id!r} has no answers; SQuAD v2's "
                            "unanswerable questions are not supported"
                        )
                    questions[question.id] = question
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not in SQuAD v1.1's layout (data > paragraphs > qas): {error!r}"
        ) from error
    if not questions:
        raise UserError(f"{path} has no questions")
    return list(questions.values())


def read_predictions(path: str | Path) -> dict[str, str]:
    """Read answers as one JSON object of question ids to texts.

    Raises:
        UserError: an unreadable file, or anything else than texts by id.
    """
    content = jsonl.read_document(path, once=True)
    if not isinstance(content, dict):
        raise UserError(f"{path} has to hold one JSON object of question ids to answers")
    for key, value in content.items():
        if not isinstance(value, str):
            raise UserError(f"{path}: the answer to {key!r} has to be text, not {value!r:.40}")
    return content
