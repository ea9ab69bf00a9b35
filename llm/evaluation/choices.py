"""Multiple choice by log-likelihood, scored as lm-evaluation-harness scores ``multiple_choice``."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common import jsonl
from common.errors import UserError
from data.tokenizer import Tokenizer
from llm.evaluation.encoding import encode_pair
from llm.evaluation.scorer import Scorer

_LETTERS = "ABCDEFGHIJ"
_BETWEEN = "\n\n"  # few-shot examples


@dataclass(frozen=True)
class Item:
    """A prompt, the continuations to choose from (behind one space), and the right one."""

    prompt: str
    choices: tuple[str, ...]
    gold: int

    @property
    def solved(self) -> str:
        """The prompt with its answer, as few-shot examples show it."""
        return f"{self.prompt} {self.choices[self.gold]}"


def read_items(path: str | Path, *, answer_prompt: str | None = None) -> list[Item]:
    """Read questions with choices.

    ``.jsonl`` or ``.json`` has objects with ``question`` or ``query``, ``choices`` (texts, each a
    continuation of the question) and ``answer`` or ``gold`` (number from 0, the choice, or letter).
    ``.csv`` has columns question, A, B, C, D, … and answer (a letter), as C-Eval and CMMLU do:
    the prompt lists the choices and the continuations are their letters.

    Args:
        path: the file.
        answer_prompt: last line of a csv file's prompts; ``答案：`` when not given and the file
            has Chinese text, else ``Answer:``.

    Raises:
        UserError: an unreadable file or a line that cannot be used, by number.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".json", ".csv"):
        raise UserError(f"{path}: multiple choice is read from .jsonl or .csv files, or a .json")
    items = list(_csv_items(path, answer_prompt) if path.suffix == ".csv" else _json_items(path))
    if not items:
        raise UserError(f"{path} has no questions")
    return items


def _json_items(path: Path) -> Iterable[Item]:
    for place, record in jsonl.read(path):
        where = str(place)
        if not isinstance(record, dict):
            raise UserError(f"{where} has to be an object, not {record!r:.40}")
        prompt = _first(record, ("question", "query"), where)
        choices = _first(record, ("choices",), where)
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{where}: the question has to be non-empty text, not {prompt!r:.40}")
        texts = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
        if not texts or len(choices) < 2:
            raise UserError(f"{where}: choices has to be a list of two or more non-empty texts")
        answer = _first(record, ("answer", "gold"), where)
        yield Item(prompt, tuple(choices), _gold(answer, choices, where))


def _first(record: dict[str, Any], keys: Sequence[str], where: str) -> Any:
    for key in keys:
        if key in record:
            return record[key]
    raise UserError(f"{where}: {' or '.join(keys)} is missing among {', '.join(record)}")


def _gold(answer: Any, choices: Sequence[str], where: str) -> int:
    if answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and len(answer.strip()) == 1:
        index = _LETTERS.find(answer.strip().upper())
    else:
        index = answer if type(answer) is int else -1
    if not 0 <= index < len(choices):
        raise UserError(
            f"{where}: answer {answer!r:.40} is none of the {len(choices)} choices; give a number "
            f"from 0 to {len(choices) - 1}, a letter from A to {_LETTERS[len(choices) - 1]}, or "
            "the choice's text"
        )
    return index


def _csv_items(path: Path, answer_prompt: str | None) -> Iterable[Item]:
    text = jsonl.read_text(path)
    if answer_prompt is None:
        answer_prompt = "答案：" if any("\u4e00" <= c <= "\u9fff" for c in text) else "Answer:"
    rows = csv.DictReader(io.StringIO(text))
    columns = {name.strip().lower(): name for name in rows.fieldnames or () if name}
    letters = [letter for letter in _LETTERS if letter.lower() in columns]
    if not {"question", "answer", "a", "b"} <= columns.keys():
        raise UserError(
            f"{path}: the columns question, A, B, … and answer are needed, the header has "
            f"{', '.join(rows.fieldnames or ('nothing',))}"
        )
    for row in rows:
        where = f"{path}:{rows.line_num}"
        values = {name: (row[column] or "").strip() for name, column in columns.items()}
        offered = [letter for letter in letters if values[letter.lower()]]
        if not values["question"] or len(offered) < 2:
            raise UserError(f"{where}: a question and at least two choices are needed")
        lines = [values["question"], *(f"{one}. {values[one.lower()]}" for one in offered)]
        prompt = "\n".join([*lines, answer_prompt])
        yield Item(prompt, tuple(offered), _gold(values["answer"], offered, where))


def with_shots(items: Sequence[Item], shots: Sequence[Item], description: str = "") -> list[Item]:
    """Put a description and solved examples before each question, as the harness does."""
    before = description + "".join(shot.solved + _BETWEEN for shot in shots)
    return [Item(before + item.prompt, item.choices, item.gold) for item in items]


def score(
    scorer: Scorer, tokenizer: Tokenizer, items: Sequence[Item], *, add_bos: bool | None = None
) -> dict[str, float]:
    """Answer every question with its likeliest choice.

    Returns:
        ``acc`` by the log-likelihood itself, ``acc_norm`` by the log-likelihood per character and
        ``acc_bytes`` per UTF-8 byte of the choice, each with its standard error, and ``total``.

    Raises:
        UserError: a choice longer than the model's context, or ids beyond its vocabulary.
    """
    requests = [
        encode_pair(tokenizer, item.prompt, f" {choice}", add_bos=add_bos)
        for item in tqdm(items, "questions", disable=None, leave=False)
        for choice in item.choices
    ]
    logprobs = iter([one.logprob for one in scorer.loglikelihood(requests)])
    hits: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for item in items:
        own = np.asarray([next(logprobs) for _ in item.choices])
        sizes = {
            "acc": np.ones(len(own)),
            "acc_norm": np.asarray([len(choice) for choice in item.choices]),
            "acc_bytes": np.asarray([len(choice.encode()) for choice in item.choices]),
        }
        for name, size in sizes.items():
            hits[name].append(int((own / size).argmax()) == item.gold)
    figures: dict[str, float] = {}
    for name, right in hits.items():
        mean = sum(right) / len(right)
        figures[name] = mean
        # The sample standard deviation of zeros and ones, over the root of their number.
        if len(right) > 1:  # one question says nothing of the spread
            figures[f"{name}_stderr"] = math.sqrt(mean * (1 - mean) / (len(right) - 1))
    return figures | {"total": len(items)}
