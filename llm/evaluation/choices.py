"""Multiple choice by log-likelihood, scored as lm-evaluation-harness scores ``multiple_choice``."""

import math
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common import csv_rows, jsonl
from common.errors import DataError, UserError, located
from data.corpus.readers import checked
from data.tokenizer import Tokenizer
from llm.evaluation.encoding import encode_pair
from llm.evaluation.scorer import Scorer

_LETTERS = string.ascii_uppercase
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
        with located(place):
            item = _json_item(record)
        yield item


def _json_item(record: object) -> Item:
    if not isinstance(record, dict):
        raise DataError(f"a question has to be an object, not {record!r:.40}")
    prompt, choices = _one(record, "question", "query"), _one(record, "choices")
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"the question has to be non-empty text, not {prompt!r:.40}")
    texts = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
    if not texts or len(choices) < 2:
        raise DataError("choices has to be a list of two or more non-empty texts")
    for text in (prompt, *choices):
        checked(text)
    return Item(prompt, tuple(choices), _gold(_one(record, "answer", "gold"), choices))


def _one(record: dict[str, Any], *keys: str) -> Any:
    found = [key for key in keys if key in record]
    if not found:
        raise DataError(f"{' or '.join(keys)} is missing among {', '.join(record)}")
    if len(found) > 1:
        raise DataError(f"{' and '.join(found)} mean the same; leave one of them")
    return record[found[0]]


def _gold(answer: Any, choices: Sequence[str]) -> int:
    if answer in choices:
        if choices.count(answer) > 1:
            raise DataError(f"answer {answer!r:.40} is the text of two choices; give its number")
        return choices.index(answer)
    if isinstance(answer, str) and len(answer.strip()) == 1:
        index = _LETTERS.find(answer.strip().upper())
    else:
        index = answer if type(answer) is int else -1
    if not 0 <= index < len(choices):
        ways = [f"a number from 0 to {len(choices) - 1}", "the choice's text"]
        if len(choices) <= len(_LETTERS):
            ways.insert(1, f"a letter from A to {_LETTERS[len(choices) - 1]}")
        raise DataError(
            f"answer {answer!r:.40} is none of the {len(choices)} choices; give "
            + (", ".join(ways[:-1]) + f", or {ways[-1]}")
        )
    return index


def _csv_items(path: Path, answer_prompt: str | None) -> Iterable[Item]:
    text = jsonl.read_text(path)
    if answer_prompt is None:
        answer_prompt = "答案：" if any("\u4e00" <= c <= "\u9fff" for c in text) else "Answer:"
    rows = csv_rows.read(path, text, needed=("question", "a", "b", "answer"), any_case=True)
    for place, row in rows:
        with located(place):
            item = _csv_item({name: value.strip() for name, value in row.items()}, answer_prompt)
        yield item


def _csv_item(values: dict[str, str], answer_prompt: str) -> Item:
    # A letter behind a gap names a column of another kind.
    letters = takewhile(lambda letter: letter.lower() in values, _LETTERS)
    offered = [letter for letter in letters if values[letter.lower()]]
    if not values["question"] or len(offered) < 2:
        raise DataError("a question and at least two choices are needed")
    lines = [values["question"], *(f"{one}. {values[one.lower()]}" for one in offered)]
    prompt = "\n".join([*lines, answer_prompt])
    answer = values["answer"].upper()
    if answer not in offered:
        raise DataError(
            f"answer {values['answer']!r:.40} is not one of the choices {', '.join(offered)}"
        )
    return Item(prompt, tuple(offered), offered.index(answer))


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
        figures |= share(name, right)
    return figures | {"total": len(items)}


def share(name: str, right: Sequence[float]) -> dict[str, float]:
    """Return the share of right answers (zeros and ones) by name, and its standard error.

    That is their sample standard deviation over the root of their number; one has none.
    """
    mean = sum(right) / len(right)
    if len(right) == 1:
        return {name: mean}
    return {name: mean, f"{name}_stderr": math.sqrt(mean * (1 - mean) / (len(right) - 1))}
