"""Rows of CSV files: what is written comes back, and damaged files are refused by every reader."""

import csv
import io
import random

import pytest

from common import csv_rows
from common.errors import DataError
from data.conversations.record_files import read_records
from llm.evaluation.choices import read_items
from llm.evaluation.exams import read_papers
from llm.evaluation.gsm8k import read_problems

CELLS = (
    'a "b" c',
    "x,y",
    "two\nlines",
    "two\r\nlines",
    "",
    " blank ",
    "问\u2028题",
    "#",
    "'",
    "\\",
)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_what_is_written_comes_back(tmp_path, ending):
    rng = random.Random(3)
    names = ["one", "Two", "三"]
    rows = [[rng.choice(CELLS) for _ in names] for _ in range(200)]
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator=ending, quoting=csv.QUOTE_ALL).writerows([names, *rows])
    got = list(csv_rows.read(tmp_path / "x.csv", file.getvalue()))
    assert [list(values.values()) for _, values in got] == rows
    assert all(list(values) == names for _, values in got)
    # A row's line is the number of line ends before it.
    whole = file.getvalue().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    begin = 2
    for (place, _), row in zip(got, rows, strict=True):
        assert place.line == begin and whole[begin - 1]
        begin += 1 + sum(cell.count("\n") for cell in row)


def choices(tmp_path, text):
    (tmp_path / "law.csv").write_text(text, "utf-8")
    return read_items(tmp_path / "law.csv")


def exam(tmp_path, text):
    (tmp_path / "test").mkdir(exist_ok=True)
    (tmp_path / "test" / "law.csv").write_text(text, "utf-8")
    (paper,) = read_papers("cmmlu", tmp_path, shots=0, only=["college_law"])
    return paper.items


def problems(tmp_path, text):
    (tmp_path / "law.csv").write_text(text, "utf-8")
    return read_problems(tmp_path / "law.csv")


def records(tmp_path, text):
    (tmp_path / "law.csv").write_text(text, "utf-8")
    return list(read_records(tmp_path / "law.csv"))


# Every reader of CSV files, with a header and a row that it takes.
READERS = {
    "choices": (choices, "question,A,B,answer", "q,1,2,B"),
    "exam": (exam, "Question,A,B,C,D,Answer", "q,1,2,3,4,B"),
    "problems": (problems, "question,answer", "q,#### 2"),
    "records": (records, "src,tgt", "q,a"),
}
# What is wrong, and what is said of it; {row} is the row that begins with q.
DAMAGED = {
    "a comma too many": (
        "{header}\n{row}\nq,{row}\n",
        r"law\.csv:3: \d cells where there are \d c",
    ),
    "a comma too few": ("{header}\n{row}\nq\n", r"law\.csv:3: 1 cells where there are \d columns"),
    "a quote that stays open": ('{header}\n"{row}\n{row}\n', r"law\.csv:2: the row that begins he"),
    "a quote inside": ('{header}\n"q "x" y{rest}\n', r"law\.csv:2: the row that begins here is no"),
    "a column twice": ("{header},{last}\n{row},B\n", r"law\.csv:1: the column '\w+' stands twice"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("what", DAMAGED)
def test_every_reader_refuses_what_would_shift_or_swallow(tmp_path, monkeypatch, reader, what):
    read, header, row = READERS[reader]
    monkeypatch.setattr("llm.evaluation.exams.Exam.path", lambda *_: tmp_path / "test" / "law.csv")
    damaged, message = DAMAGED[what]
    last = header.rpartition(",")[2]
    words = {"header": header, "row": row, "last": last, "rest": row.removeprefix("q")}
    with pytest.raises(DataError, match=message):
        read(tmp_path, damaged.format(**words))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_every_reader_takes_any_line_end_a_mark_and_a_long_cell(
    tmp_path, monkeypatch, reader, ending
):
    read, header, row = READERS[reader]
    monkeypatch.setattr("llm.evaluation.exams.Exam.path", lambda *_: tmp_path / "test" / "law.csv")
    long = row.replace("q", "q" * 200_000, 1)
    assert len(read(tmp_path, "\ufeff" + ending.join([header, row, "", long, ""]))) == 2
