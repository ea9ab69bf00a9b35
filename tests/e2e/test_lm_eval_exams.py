"""C-Eval, CMMLU and MMLU beside lm-evaluation-harness's own tasks, on the same files and weights.

As tests/e2e/test_lm_eval.py, in the environment that ``LM_EVAL_PYTHON`` names; without it they
skip. The harness gets its own task files, in which only the source of the questions is another:
JSON lines of the same text, as its reader of csv files makes numbers of what looks like one.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_lm_eval import environment, harness_tasks, interpreter, trained_model

from data.tokenizer import load_tokenizer
from llm.evaluation.exams import ALL, EXAMS, read_papers
from llm.evaluation.subjects import Subject
from llm.llama.build import build_model, save_model
from llm.llama.config import TINY_NAME, load_config
from tests.unit.evaluation.exam_files import write_exam

SUBJECTS = {
    "ceval": ("law", "logic", "physician"),
    "cmmlu": ("agronomy", "chinese_driving_rule", "world_religions"),
    "mmlu": ("college_biology", "us_foreign_policy"),
}
FILES = {
    "ceval": "ceval/ceval-valid_{}.yaml",
    "cmmlu": "cmmlu/cmmlu_{}.yaml",
    "mmlu": "mmlu/default/mmlu_{}.yaml",
}
QUESTIONS = 9
FIELDS = ("question", "a", "b", "c", "d", "answer")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The sets, and a model whose likelihoods differ clearly."""
    root = tmp_path_factory.mktemp("exams")
    for name, subjects in SUBJECTS.items():
        write_exam(root / name, name, subjects, questions=QUESTIONS, seed=3)
    model = build_model(load_config(TINY_NAME).replace(max_position_embeddings=2048), seed=5)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.set_value(parameter * 6)
    save_model(model, root / "model")
    load_tokenizer(TINY_NAME).save(root / "model")
    return root


def documents(name, path):
    """A csv file's rows as the fields that the harness's task wants, all of them text."""
    with path.open(encoding="utf-8", newline="") as file:
        if name == "mmlu":
            for question, *choices, answer in csv.reader(file):
                yield {"question": question, "choices": choices, "answer": "ABCD".index(answer)}
        else:
            for row in csv.DictReader(file):
                yield {key: row[key] for key in row if key.lower() in FIELDS}


def write_tasks(name, root, tasks):
    """Write the harness's task files with local questions; return their names."""
    for subject in SUBJECTS[name]:
        file = tasks / FILES[name].format(subject)
        own = yaml.safe_load(file.read_text("utf-8"))
        whole = yaml.safe_load((file.parent / own.pop("include")).read_text("utf-8")) | own
        exam = EXAMS[name]
        assert (whole.get("validation_split") or whole["test_split"]) == exam.split
        files = {}
        for split in (exam.split, "dev"):
            source = exam.path(root / name, Subject(subject, "", ()), split)
            files[split] = str(root / f"{name}-{subject}-{split}.jsonl")
            lines = [json.dumps(one) for one in documents(name, source)]
            Path(files[split]).write_text("\n".join(lines), "utf-8")
        whole |= {"task": f"local_{name}_{subject}", "dataset_path": "json"}
        whole |= {"dataset_kwargs": {"data_files": files}}
        for key in ("dataset_name", "tag", "task_alias"):
            whole.pop(key, None)
        (root / "tasks").mkdir(exist_ok=True)
        (root / "tasks" / f"{name}_{subject}.yaml").write_text(yaml.safe_dump(whole), "utf-8")
    members = [f"local_{name}_{subject}" for subject in SUBJECTS[name]]
    means = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    group = {"group": f"local_{name}", "task": members, "aggregate_metric_list": means}
    (root / "tasks" / f"group_{name}.yaml").write_text(yaml.safe_dump(group), "utf-8")


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("trained", [False, True])
def test_figures_and_prompts_are_the_harness_own(place, repo, tmp_path, trained, shots):
    python = interpreter("LM_EVAL_PYTHON")
    model = trained_model(repo) if trained else place / "model"
    for name in SUBJECTS:
        write_tasks(name, place, harness_tasks(python))
    command = [python.parent / "lm_eval", "--model", "paddle-llama", "--device", "cpu"]
    command += ["--model_args", f"pretrained={model}", "--num_fewshot", str(shots)]
    command += ["--tasks", ",".join(f"local_{name}" for name in SUBJECTS), "--log_samples"]
    command += ["--include_path", place / "tasks", "--output_path", tmp_path / "theirs"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = tmp_path.glob("theirs/**/results_*.json")
    theirs = json.loads(file.read_text("utf-8"))
    for name, subjects in SUBJECTS.items():
        output = tmp_path / f"{name}.json"
        words = ["--model_name_or_path", model, "--task", name, "--subjects", *subjects]
        words += ["--data_dir", place / name, "--num_few_shot", str(shots)]
        words += ["--output_file", output]
        subprocess.run([sys.executable, repo / "evaluate_generation.py", *words], check=True)
        ours = json.loads(output.read_text("utf-8"))
        for one in ours["results"]:
            other = theirs["results"][f"local_{name}_{one['settings']['subject']}"]
            assert one["figures"]["acc"] == pytest.approx(other["acc,none"], abs=1e-12)
            assert one["figures"]["acc_stderr"] == pytest.approx(other["acc_stderr,none"])
        whole, group = ours["averages"][ALL], theirs["groups"][f"local_{name}"]
        assert whole["acc"] == pytest.approx(group["acc,none"], abs=1e-12)
        assert whole["acc_stderr"] == pytest.approx(group["acc_stderr,none"])
        print(f"{name}, {trained=}, {shots} shots: {whole['acc']:.4f}")
        for paper in read_papers(name, place / name, shots=shots, only=subjects):
            (file,) = tmp_path.glob(f"theirs/**/samples_local_{name}_{paper.subject.name}_*.jsonl")
            rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
            rows.sort(key=lambda row: row["doc_id"])
            asked = [row["arguments"]["gen_args_0"]["arg_0"] for row in rows]
            assert asked == [item.prompt for item in paper.items]
