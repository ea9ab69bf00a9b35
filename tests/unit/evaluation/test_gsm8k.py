"""GSM8K: numbers found in answers, prompts, and what goes on after an early end."""

import json
import random
import runpy
import sys

import pytest

from common.errors import DataError, UserError
from data.tokenizer import load_tokenizer
from llm.evaluation import asking, gsm8k
from llm.evaluation.gsm8k import Problem
from llm.evaluation.question_report import ProblemResults
from llm.evaluation.report import Result
from llm.llama.build import build_model, save_model
from llm.llama.config import TINY_NAME, load_config

# An answer, what is read strictly and flexibly, and which of both is right where 1,200 is.
ANSWERS = [
    ("so many\n#### 1,200", "1,200", "1,200", "sf"),
    ("#### 1200.", "1200.", "1200.", "sf"),
    ("#### 7\n#### 1200", "7", "1200", "f"),
    ("#### 1200\n\nQuestion 2: 3 + 4", "1200", "4", "s"),
    ("It is $1,200.", "[invalid]", "$1,200.", "f"),
    ("####1200", "[invalid]", "1200", "f"),
    ("#### -1200", "-1200", "-1200", ""),
    ("#### $1200", "[invalid]", "$1200", "f"),
    ("twelve hundred", "[invalid]", "[invalid]", ""),
    ("1200 ...", "[invalid]", "...", ""),
    ("1200, 5", "[invalid]", "5", ""),
    ("", "[invalid]", "[invalid]", ""),
]


@pytest.mark.parametrize(("answer", "marked", "last", "right"), ANSWERS)
def test_numbers_in_answers(answer, marked, last, right):
    assert (gsm8k.strict(answer), gsm8k.flexible(answer)) == (marked, last)
    assert gsm8k.score(answer, Problem("?", "so\n#### 1,200")) == {
        "exact_match_strict": float("s" in right),
        "exact_match_flexible": float("f" in right),
    }


def test_prompts():
    one, two = Problem("Q1", "a\n#### 1"), Problem("Q2", "b\n#### 2")
    assert gsm8k.prompt(two, [one]) == ("Question: Q1\nAnswer: a\n#### 1\n\nQuestion: Q2\nAnswer:")
    assert [(turn["role"], turn["content"]) for turn in gsm8k.conversation(two, [one])] == [
        ("user", "Question: Q1\nAnswer:"),
        ("assistant", "a\n#### 1"),
        ("user", "Question: Q2\nAnswer:"),
    ]


def test_examples_are_the_first_ones_or_drawn_for_each():
    pool = [Problem(str(number), "#### 1") for number in range(9)]
    assert gsm8k.draw_examples(pool, 2, 3, None) == [pool[:2]] * 3
    drawn = gsm8k.draw_examples(pool, 3, 4, 7)
    rng = random.Random(7)
    assert [[one.question for one in shown] for shown in drawn] == [
        [str(number) for number in rng.sample(range(9), 3)] for _ in range(4)
    ]


@pytest.mark.parametrize(
    "answer", ["#### 5", "#### $1,005\n", "#### -5.", "#### .5 ", "x #### 5\n"]
)
def test_an_answer_of_the_file_is_right(tmp_path, answer):
    (read,) = gsm8k.read_problems(write(tmp_path / "rows.jsonl", [problem(1, answer=answer)]))
    shown = answer.replace("$", "")
    assert gsm8k.score(shown, read) == {"exact_match_strict": 1.0, "exact_match_flexible": 1.0}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def problem(number, **changes):
    return {
        "question": f"What is {number} + {number}?",
        "answer": f"So\n#### {2 * number}",
    } | changes


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [problem(1), {"question": "?"}],
            r"rows.jsonl:2: answer has to be non-empty text, not None",
        ),
        ([problem(1, question=" ")], r"rows.jsonl:1: question has to be non-empty text, not ' '"),
        ([problem(1, answer=3)], r"rows.jsonl:1: answer has to be non-empty text, not 3"),
        (
            [problem(1), problem(2, answer="4")],
            r"rows.jsonl:2: the answer '4' has no '#### NUMBER'",
        ),
        ([problem(1), [1]], r"rows.jsonl:2: a record must be a JSON object, not list"),
        (
            [problem(1, answer="#### 3 dollars")],
            r"rows.jsonl:1: the answer '#### 3 dollars' has no",
        ),
        ([problem(1, answer="#### .")], r"rows.jsonl:1: the answer '#### .' has no"),
        ([problem(1, question="\ud800")], r"rows.jsonl:1: the text holds the lone surrogate"),
    ],
)
def test_records_that_are_no_problems(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        gsm8k.read_problems(write(tmp_path / "rows.jsonl", rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("problems")
    model = build_model(load_config(TINY_NAME).replace(max_position_embeddings=256), seed=4)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.set_value(parameter * 8)
    save_model(model, root / "model")
    load_tokenizer(TINY_NAME).save(root / "model")
    write(root / "test.jsonl", [problem(number) for number in range(6)])
    write(root / "train.jsonl", [problem(number) for number in range(10, 13)])
    return root


def run_main(repo, *words):
    script = runpy.run_path(str(repo / "evaluate_generation.py"))
    old, sys.argv = sys.argv, ["x", *map(str, words)]
    try:
        script["main"]()
    finally:
        sys.argv = old


def words(place, *, few_shot=2, tokens=9, batch=2):
    return (
        *("--model_name_or_path", place / "model", "--task", "gsm8k"),
        *("--data_file", place / "test.jsonl", "--few_shot_file", place / "train.jsonl"),
        *("--num_few_shot", few_shot, "--max_answer_tokens", tokens, "--batch_size", batch),
    )


def test_a_run_that_ended_early_goes_on_with_the_next_question(place, repo, tmp_path, monkeypatch):
    file, partial = tmp_path / "out.json", tmp_path / "out.json.partial"
    whole, asked = asking.ProblemTask.score, []

    def score(self, answer):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(self.settings["number"])
        return whole(self, answer)

    monkeypatch.setattr(asking.ProblemTask, "score", score)
    with pytest.raises(KeyboardInterrupt):
        run_main(repo, *words(place), "--output_file", file)
    assert not file.exists() and len(partial.read_text("utf-8").splitlines()) == 3
    others = ("--stop x", "--few_shot_seed 3", "--apply_chat_template", "--ops reference")
    for other in map(str.split, others):
        with pytest.raises(UserError, match=r"partial:1: this result is of another model, other q"):
            run_main(repo, *words(place), "--output_file", file, *other)
    shown = (place / "train.jsonl").read_text("utf-8")
    (place / "train.jsonl").write_text(shown.replace("So", "Thus"), "utf-8")
    with pytest.raises(UserError, match=r"partial:1: this result is of another model, other q"):
        run_main(repo, *words(place), "--output_file", file)
    (place / "train.jsonl").write_text(shown, "utf-8")
    monkeypatch.setattr(asking.ProblemTask, "score", whole)
    seen = []
    monkeypatch.setattr(asking, "generate_texts", lambda *args: seen.append(args) or texts(*args))
    texts = sys.modules["llm.engine.texts"].generate_texts
    run_main(repo, *words(place), "--output_file", file)
    assert len(seen[0][1]) == 3 and not partial.exists()
    again = tmp_path / "again.json"
    run_main(repo, *words(place, batch=5), "--output_file", again)
    one, other = (json.loads(each.read_text("utf-8")) for each in (file, again))
    assert one["averages"] == other["averages"] and one["averages"]["total"] == 6
    assert [r["settings"]["number"] for r in one["results"]] == [1, 2, 3, 4, 5, 6]
    for left, right in zip(one["results"], other["results"], strict=True):
        assert left["settings"]["answer"] == right["settings"]["answer"]
    assert one["settings"]["num_few_shot"] == 2 and not again.with_suffix(".png").exists()


def test_a_long_prompt_loses_its_beginning_and_is_counted(place, repo, capsys, monkeypatch):
    seen = []

    def texts(engine, requests, decoders, stops, on_answer):
        seen.extend(requests)
        for number in range(len(requests)):
            on_answer(number, "#### 2")

    monkeypatch.setattr(asking, "generate_texts", texts)
    run_main(repo, *words(place, tokens=220))
    said = capsys.readouterr().out
    assert [line.split()[-1] for line in said.splitlines() if "truncated" in line] == ["6"]
    assert "exact_match_strict           0.1667" in said  # of 0 to 5, twice one is two
    tokenizer = load_tokenizer(place / "model")
    for number, request in enumerate(seen):
        assert len(request.prompt_ids) == 256 - 220
        end = gsm8k.prompt(Problem(**problem(number)), ())
        assert list(request.prompt_ids)[-9:] == tokenizer.encode(end)[-9:]


def test_averages_by_hand():
    figures = {"exact_match_strict": 0.0, "exact_match_flexible": 1.0, "truncated": 1}
    better = figures | {"exact_match_strict": 1.0, "truncated": 0}
    results = [Result("gsm8k", "f", {}, one) for one in (figures, better, figures, figures)]
    assert ProblemResults.averages(results) == {
        "exact_match_strict": 0.25,
        "exact_match_strict_stderr": pytest.approx(0.25),  # the root of 1/4 x 3/4 / 3
        "exact_match_flexible": 1.0,
        "exact_match_flexible_stderr": 0.0,
        "total": 4,
        "truncated": 3,
    }


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"few_shot": 4}, (), "num_few_shot=4, but .*train.jsonl has only 3 problems"),
        ({}, ("--data_file", "other.jsonl"), "--task gsm8k measures one --data_file, not 2"),
        ({}, ("--task", "squad"), "gsm8k is measured alone"),
        ({}, ("--chat_template", "plain"), "add --apply_chat_template, or drop chat_template"),
        ({"tokens": 256}, (), "max_answer_tokens=256 leaves no room for a prompt in the model's"),
        ({}, ("--depths", "5"), "depths is given but task is not needle"),
    ],
)
def test_bad_input_is_refused_before_any_model(place, repo, changes, more, message, monkeypatch):
    monkeypatch.setattr("llm.engine.opening.open_model", pytest.fail)
    with pytest.raises(UserError, match=message):
        run_main(repo, *words(place, **changes), *more)


def test_files_without_problems(tmp_path):
    with pytest.raises(DataError, match="is a directory; name one of its files"):
        gsm8k.read_problems(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        gsm8k.read_problems(tmp_path / "none.jsonl")
