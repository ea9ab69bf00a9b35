"""C-Eval, CMMLU and MMLU: directories, prompts, averages by hand, and going on after an end."""

import json
import math
import random
import runpy
import shutil
import sys

import pytest

from common.errors import UserError
from data.tokenizer import load_tokenizer
from llm.evaluation import exam_report, report
from llm.evaluation.exams import EXAMS, averages, read_papers
from llm.evaluation.subjects import CHINA_SPECIFIC, CMMLU, Subject
from llm.evaluation.tasks import SubjectTask
from llm.llama.build import build_model, save_model
from llm.llama.config import TINY_NAME, load_config
from tests.unit.evaluation.exam_files import write_exam


def test_the_sets_have_all_their_subjects():
    sizes = {name: len(exam.subjects) for name, exam in EXAMS.items()}
    assert sizes == {"ceval": 52, "cmmlu": 67, "mmlu": 57}
    assert sum(CHINA_SPECIFIC in subject.categories for subject in CMMLU) == 15
    for exam in EXAMS.values():
        assert len({subject.name for subject in exam.subjects}) == len(exam.subjects)


def test_a_prompt_names_its_subject_and_shows_the_first_examples(tmp_path):
    write_exam(tmp_path, "ceval", ["law"])
    (paper,) = read_papers("ceval", tmp_path, shots=1, only=["law"], limit=1)
    rng = random.Random(0)
    _val = [rng.randrange(90) for _ in range(6)]
    c, d = rng.randrange(90), rng.randrange(90)
    a, b = _val[:2]

    def asked(x, y):
        return f'{x}, "和" {y}\n= ?\nA. {x + y}\nB. {x - y - 1}\nC.  {x}\nD. none\n答案：'

    assert paper.items[0].prompt == (
        "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n"
        f"{asked(c, d)} A\n\n{asked(a, b)}"
    )
    write_exam(tmp_path / "mmlu", "mmlu", ["college_biology"])
    (paper,) = read_papers("mmlu", tmp_path / "mmlu", shots=0, only=["college_biology"])
    assert paper.items[0].prompt.startswith(
        "The following are multiple choice questions (with answers) about college biology.\n\n"
    )
    assert paper.items[2].prompt.endswith("\nAnswer:") and paper.items[2].gold == 2


def damaged(root, what):
    write_exam(root, "cmmlu", [subject.name for subject in CMMLU])
    file = root / "test" / "logical.csv"
    text = file.read_text("utf-8")
    if what == "subject":
        file.unlink()
    elif what == "dev":
        (root / "dev" / "logical.csv").unlink()
    elif what == "few":
        (root / "dev" / "logical.csv").write_text(text, "utf-8")
    elif what == "fields":
        file.write_text(text + "3,one more,B\n", "utf-8")
    elif what == "quote":
        file.write_text(text + '3,"one more,a,b,c,d,B\n', "utf-8")
    elif what == "answer":
        file.write_text(text + "3,one more,a,b,c,d,E\n", "utf-8")
    elif what == "header":
        file.write_text(text.partition("\n")[2], "utf-8")
    elif what == "empty":
        file.write_text(text.partition("\n")[0] + "\n", "utf-8")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("subject", "1 of 67 subjects have no test file .*logical.csv does not exist.*--subjects"),
        ("dev", "1 of 67 subjects have no dev file .*: logical; .*--num_few_shot 0"),
        ("few", "num_few_shot=5, but .*logical.csv has only 3 questions"),
        ("fields", "logical.csv:8: 3 cells where there are 7 columns"),
        ("quote", "logical.csv:8: the row that begins here is no CSV: unexpected end of data"),
        ("answer", "logical.csv:8: answer 'E' is not one of A, B, C and D"),
        ("header", "logical.csv:1: the header has no 'question'"),
        ("empty", "logical.csv has no questions"),
    ],
)
def test_what_is_missing_or_malformed_is_named(tmp_path, what, message):
    damaged(tmp_path, what)
    with pytest.raises(UserError, match=message):
        read_papers("cmmlu", tmp_path)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("subject", "1 of 67 subjects have no test file"),
        ("dev", "1 of 67 subjects have no dev file"),
        ("fields", "logical.csv:8: 3 cells where there are 7 columns"),
    ],
)
def test_they_are_named_before_any_model_is_opened(
    place, repo, tmp_path, monkeypatch, what, message
):
    damaged(tmp_path, what)
    monkeypatch.setattr("llm.engine.opening.open_model", pytest.fail)
    words = ("--model_name_or_path", place / "model", "--task", "cmmlu", "--data_dir", tmp_path)
    with pytest.raises(UserError, match=message):
        run_main(repo, *words)


def test_the_cures_work(tmp_path):
    damaged(tmp_path, "dev")
    assert len(read_papers("cmmlu", tmp_path, shots=0)) == 67
    assert len(read_papers("cmmlu", tmp_path, only=["agronomy", "virology"])) == 2
    with pytest.raises(UserError, match=r"subjects='law' is not one of the 67 of cmmlu: "):
        read_papers("cmmlu", tmp_path, only=["law"])


def test_averages_by_hand():
    first, second = Subject("a", "", ("STEM", "x")), Subject("b", "", ("STEM",))
    one = {"acc": 0.5, "total": 4, "acc_stderr": math.sqrt(0.25 / 3)}
    other = {"acc": 1.0, "total": 12, "acc_stderr": 0.0}
    found = averages([(first, one), (second, other)])
    assert found["STEM"] == found["all"]
    assert found["all"]["acc"] == 14 / 16
    assert found["all"]["acc_of_subjects"] == 0.75
    # Variances of samples: a third and none, pooled over 3 + 11 degrees of freedom.
    assert found["all"]["acc_stderr"] == pytest.approx(math.sqrt(3 * (1 / 3) / 14 / 16))
    assert found["x"] == {"subjects": 1, "acc_of_subjects": 0.5, **one}


def test_a_table_by_hand(tmp_path):
    results = [
        report.Result("cmmlu", "f", {"subject": name, "title": title, "categories": kinds}, figures)
        for name, title, kinds, figures in (
            ("arts", "艺术学", ["Humanities"], {"acc": 0.5, "total": 1000}),
            ("chinese_history", "中国历史", ["Humanities", "China"], {"acc": 0.75, "total": 3000}),
        )
    ]
    rows = [line.split() for line in exam_report.table(results).splitlines()]
    mean = ["mean", "of", "subjects"]
    assert rows[2:4] + rows[5:] == [
        ["arts", "Humanities", "1,000", "0.5000", "艺术学"],
        ["chinese_history", "Humanities", "3,000", "0.7500", "中国历史"],
        ["Humanities", "subjects:", "2", "4,000", "0.6875", *mean, "0.6250"],
        ["China", "subjects:", "1", "3,000", "0.7500", *mean, "0.7500"],
        ["all", "subjects:", "2", "4,000", "0.6875", *mean, "0.6250"],
    ]
    results[0].figures["truncated"] = 12
    *_, last = exam_report.table(results).splitlines()
    assert last.startswith("12 of 16,000 choices stood behind a prompt that lost its beginning")
    # One question's spread may be unknown.
    exam_report.draw(results).savefig(tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 5000


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("exams")
    model = build_model(load_config(TINY_NAME).replace(max_position_embeddings=1024), seed=4)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.set_value(parameter * 8)
    save_model(model, root / "model")
    load_tokenizer(TINY_NAME).save(root / "model")
    write_exam(root / "ceval", "ceval", [subject.name for subject in EXAMS["ceval"].subjects])
    return root


def run_main(repo, *words):
    script = runpy.run_path(str(repo / "evaluate_generation.py"))
    old, sys.argv = sys.argv, ["x", *map(str, words)]
    try:
        script["main"]()
    finally:
        sys.argv = old


def test_a_run_that_ended_early_goes_on(place, repo, tmp_path, monkeypatch, capsys):
    file, partial = tmp_path / "out.json", tmp_path / "out.json.partial"
    words = [
        *("--model_name_or_path", place / "model", "--task", "ceval", "--num_few_shot", "1"),
        *("--data_dir", place / "ceval", "--subjects", "law", "logic", "physician"),
    ]
    measured = []
    whole = SubjectTask.run

    def run(self, model, scorer):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(self.subject.name)
        return whole(self, model, scorer)

    monkeypatch.setattr(SubjectTask, "run", run)
    with pytest.raises(KeyboardInterrupt):
        run_main(repo, *words, "--output_file", file)
    assert measured == ["logic", "law"] and not file.exists()
    assert len(partial.read_text("utf-8").splitlines()) == 2
    with pytest.raises(UserError, match=r"partial:1: this result is of another model, other q"):
        run_main(repo, *words, "--limit", "2", "--output_file", file)
    measured[:] = ["before"]
    run_main(repo, *words, "--output_file", file)
    assert measured == ["before", "physician"] and not partial.exists()
    again = tmp_path / "again.json"
    measured[:] = []
    monkeypatch.setattr(SubjectTask, "run", whole)
    run_main(repo, *words, "--output_file", again)
    one, other = (json.loads(each.read_text("utf-8")) for each in (file, again))
    assert one["results"] == other["results"] and one["averages"] == other["averages"]
    assert set(one["averages"]) == {"Humanities", "Other", "all"}
    assert one["averages"]["all"]["total"] == 9
    assert one["results"][0]["settings"]["title"] == "逻辑学"
    said = capsys.readouterr().out
    assert "医师资格" in said and "subjects: 3" in said and "again.png" in said
    assert again.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    run_main(repo, *words, "--output_file", file)  # what is finished is measured anew


def test_results_may_lie_in_the_directory_of_the_model(place, repo, monkeypatch):
    """They and packed weights come while it is measured, and are no other model."""
    model = place / "itself"
    shutil.copytree(place / "model", model)
    words = [
        *("--model_name_or_path", model, "--task", "ceval", "--num_few_shot", "0"),
        *("--data_dir", place / "ceval", "--subjects", "law", "logic"),
        *("--output_file", model / "figures.json"),
    ]
    measured = []
    whole = SubjectTask.run

    def run(self, model, scorer):
        measured.append(self.subject.name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return whole(self, model, scorer)

    monkeypatch.setattr(SubjectTask, "run", run)
    with pytest.raises(KeyboardInterrupt):
        run_main(repo, *words)
    (model / "model-bfloat16.packed").write_bytes(b"as an export in another type leaves it")
    run_main(repo, *words)
    assert measured == ["logic", "law", "law"] and (model / "figures.png").is_file()
    # Its own files are another matter.
    measured.clear()
    monkeypatch.setattr(SubjectTask, "run", whole)
    line = json.dumps(json.loads((model / "figures.json").read_text("utf-8"))["results"][0])
    (model / "figures.json.partial").write_text(f"{line}\n", "utf-8")
    config = (model / "config.json").read_text("utf-8")
    (model / "config.json").write_text(config + "\n", "utf-8")
    with pytest.raises(UserError, match=r"partial:1: this result is of another model, other q"):
        run_main(repo, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task ceval", "--task ceval needs --data_dir"),
        (
            "--task ceval --data_dir d --data_file f",
            "give --data_dir in place of --data_file",
        ),
        ("--task ceval choices --data_dir d --data_file f", "ceval is measured alone"),
        ("--task choices --data_dir d --data_file f", "data_dir is given but task is not ceval"),
        ("--task ceval --data_dir d --few_shot_file f", "few_shot_file is given but task is not"),
        ("--task ceval --data_dir nowhere", "data_dir='nowhere' is not a directory"),
        ("--task ceval --data_dir d --subjects law law", "subjects=law is given twice"),
    ],
)
def test_flags_that_do_not_go_together(place, repo, words, message):
    with pytest.raises(UserError, match=message):
        run_main(repo, "--model_name_or_path", place / "model", *words.split())


def test_a_chart_needs_another_name_than_the_figures():
    with pytest.raises(UserError, match=r"name it \.json"):
        exam_report.ExamResults.chart_of("figures.png")
    assert exam_report.ExamResults.chart_of("/dev/stdout") is None
