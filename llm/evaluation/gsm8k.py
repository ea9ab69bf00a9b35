"""GSM8K: word problems, answered step by step and scored by the number at the end.

Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems". Prompts, the two ways to find
the number (``strict-match``, ``flexible-extract``) and what is compared are those of
lm-evaluation-harness's task ``gsm8k``, version 3.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError, UserError, located
from data.conversations.record_files import find_files, read_records
from data.corpus.readers import checked
from data.tokenization.chat import Message

STOP = ("Question:", "</s>", "<|im_end|>")  # the harness's, beside the model's own ends
_BETWEEN = "\n\n"  # examples
_NOTHING = "[invalid]"
_MARKED = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_BEFORE_MARK = re.compile(r".*#### ", re.DOTALL)
_PLAIN = re.compile(r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")


@dataclass(frozen=True)
class Problem:
    """One problem and its worked answer, whose last line is ``#### NUMBER``."""

    question: str
    answer: str

    @property
    def asked(self) -> str:
        """The problem as a prompt has it."""
        return f"Question: {self.question}\nAnswer:"

    @property
    def right(self) -> str:
        """The number that is right, bare; what stands in its place where there is none."""
        return _plain(self.answer.rstrip())


def read_problems(path: str | Path) -> list[Problem]:
    """Read JSON lines, a JSON list, csv or Parquet with ``question`` and ``answer``.

    Raises:
        DataError: an unreadable file, or a record that is no problem, by line.
    """
    if Path(path).is_dir():
        raise DataError(f"{path} is a directory; name one of its files")
    problems = []
    for place, record in read_records(*find_files([path])):
        if isinstance(record, DataError):
            raise record
        fields = []
        for name in ("question", "answer"):
            text = record.get(name)
            if not isinstance(text, str) or not text.strip():
                raise DataError(
                    f"{name} has to be non-empty text, not {text!r:.40} (keys: "
                    f"{', '.join(map(repr, record))})",
                    place,
                )
            with located(place):
                fields.append(checked(text))
        problem = Problem(*fields)
        if _BEFORE_MARK.match(problem.answer) is None or _PLAIN.fullmatch(problem.right) is None:
            raise DataError(
                f"the answer {problem.answer[-40:]!r} has no '#### NUMBER' at its end, which is "
                "what answers are compared with",
                place,
            )
        problems.append(problem)
    if not problems:
        raise DataError(f"{path} has no problems")
    return problems


def draw_examples(
    pool: Sequence[Problem], count: int, questions: int, seed: int | None
) -> list[list[Problem]]:
    """Return the examples that stand before each question.

    Args:
        pool: of worked problems.
        count: how many before each question.
        questions: how many there are.
        seed: draws others for each question, in order, as the harness does by default (its seed is
            1234); None takes the first ones for all.
    """
    if seed is None:
        return [list(pool[:count])] * questions
    drawn = random.Random(seed)
    return [drawn.sample(list(pool), count) for _ in range(questions)]


def prompt(problem: Problem, examples: Sequence[Problem]) -> str:
    """Return the text that an answer goes on from."""
    solved = "".join(f"{one.asked} {one.answer}{_BETWEEN}" for one in examples)
    return solved + problem.asked


def conversation(problem: Problem, examples: Sequence[Problem]) -> list[Message]:
    """Return the same as turns for a chat template, as the harness's ``fewshot_as_multiturn``."""
    turns: list[Message] = []
    for one in examples:
        turns.append({"role": "user", "content": one.asked})
        turns.append({"role": "assistant", "content": one.answer})
    return [*turns, {"role": "user", "content": problem.asked}]


def strict(answer: str) -> str:
    """Return the first number behind ``####``; ``[invalid]`` where there is none."""
    found = _MARKED.search(answer)
    return found[1].strip() if found else _NOTHING


def flexible(answer: str) -> str:
    """Return the last number, wherever it is; ``[invalid]`` where there is none."""
    found = _NUMBER.findall(answer)
    return found[-1].strip() if found else _NOTHING


def _plain(text: str) -> str:
    """Return a number without commas, dollar signs and what stands around it."""
    bare = _BEFORE_MARK.sub("", text.replace(",", "").replace("$", ""))
    return re.sub(r"\.$", "", bare).lower()


def score(answer: str, problem: Problem) -> dict[str, float]:
    """Return whether a generated answer ends in the right number, strictly and flexibly read."""
    return {
        "exact_match_strict": float(_plain(strict(answer)) == problem.right),
        "exact_match_flexible": float(_plain(flexible(answer)) == problem.right),
    }


def check_examples(pool: Sequence[Problem], count: int, file: str) -> None:
    """Refuse more examples than there are.

    Raises:
        UserError: names both numbers.
    """
    if len(pool) < count:
        raise UserError(
            f"num_few_shot={count}, but {file} has only {len(pool)} problems; give at most so many"
        )
