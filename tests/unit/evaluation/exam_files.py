"""Directories of published sets, with questions that are made here."""

import csv
import random

from llm.evaluation.exams import EXAMS
from llm.evaluation.subjects import Subject

HEADERS = {
    "ceval": ["id", "question", "A", "B", "C", "D", "answer"],
    "cmmlu": ["", "Question", "A", "B", "C", "D", "Answer"],
    "mmlu": None,
}


def write_exam(root, name, subjects, *, questions=3, seed=0):
    """Write a directory as it is published; returns it."""
    rng = random.Random(seed)
    for subject in subjects:
        for split, count in ((EXAMS[name].split, questions), ("dev", 5)):
            path = EXAMS[name].path(root, Subject(subject, "", ()), split)
            path.parent.mkdir(parents=True, exist_ok=True)
            header = HEADERS[name]
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                if header:
                    writer.writerow(header + (["explanation"] if split == "dev" else []))
                for number in range(count):
                    a, b = rng.randrange(90), rng.randrange(90)
                    row = [
                        f' {a}, "和" {b}\n= ?',
                        a + b,
                        a - b - 1,
                        f" {a}",
                        "none",
                        "ABCD"[number % 4],
                    ]
                    row = [number, *row] if header else row
                    writer.writerow(row + (["因为"] if header and split == "dev" else []))
    return root
