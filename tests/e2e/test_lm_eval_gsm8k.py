"""GSM8K beside lm-evaluation-harness's own task, on the same files and weights.

As tests/e2e/test_lm_eval.py, in the environment that ``LM_EVAL_PYTHON`` names; without it they
skip. The harness gets its own task file, in which only the source of the problems is another.
"""

import json
import subprocess
import sys

import pytest
import yaml
from test_lm_eval import environment, harness_tasks, interpreter, trained_model

from data.tokenizer import load_tokenizer
from llm.llama.build import build_model, save_model
from llm.llama.config import TINY_NAME, load_config

QUESTIONS = 8
ANSWER = 48  # tokens


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Problems, and a model whose logits differ clearly."""
    root = tmp_path_factory.mktemp("problems")
    model = build_model(load_config(TINY_NAME).replace(max_position_embeddings=2048), seed=5)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.set_value(parameter * 6)
    save_model(model, root / "model")
    load_tokenizer(TINY_NAME).save(root / "model")
    write(root / "train.jsonl", [problem(number) for number in range(30, 42)])
    return root


def problem(number, right=None):
    said = 3 * number if right is None else right
    return {
        "question": f"A box holds {number} pens, {2 * number} more are bought. How many are there?",
        "answer": f"{number} + {2 * number} = <<{number}+{2 * number}={said}>>{said}\n#### {said}",
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def ours(repo, place, model, output, *words):
    command = [sys.executable, repo / "evaluate_generation.py", "--model_name_or_path", model]
    command += ["--task", "gsm8k", "--data_file", place / "test.jsonl", "--output_file", output]
    command += ["--max_answer_tokens", str(ANSWER), *words]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads(output.read_text("utf-8"))


def harness(python, place, model, output, shots, *words):
    """Run its task file on our problems; returns figures and samples by filter."""
    whole = yaml.safe_load((harness_tasks(python) / "gsm8k" / "gsm8k.yaml").read_text("utf-8"))
    files = {split: str(place / f"{split}.jsonl") for split in ("train", "test")}
    whole |= {"task": "local_gsm8k", "dataset_path": "json"}
    whole |= {"dataset_kwargs": {"data_files": files}}
    for key in ("dataset_name", "tag"):
        whole.pop(key)
    (place / "tasks").mkdir(exist_ok=True)
    (place / "tasks" / "gsm8k.yaml").write_text(yaml.safe_dump(whole), "utf-8")
    command = [python.parent / "lm_eval", "--model", "paddle-llama", "--device", "cpu"]
    command += ["--model_args", f"pretrained={model},max_gen_toks={ANSWER}"]
    command += ["--num_fewshot", str(shots), "--tasks", "local_gsm8k", "--log_samples"]
    command += ["--include_path", place / "tasks", "--output_path", output, *words]
    done = subprocess.run(
        command, cwd=place, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = output.glob("**/results_*.json")
    (said,) = output.glob("**/samples_local_gsm8k_*.jsonl")
    samples = {}
    for line in said.read_text("utf-8").splitlines():
        row = json.loads(line)
        samples[row["filter"], row["doc_id"]] = row
    return json.loads(file.read_text("utf-8"))["results"]["local_gsm8k"], samples


@pytest.mark.parametrize("way", ["0 shots", "5 shots", "5 shots in a chat"])
@pytest.mark.parametrize("trained", [False, True])
def test_figures_answers_and_prompts_are_the_harness_own(place, repo, tmp_path, trained, way):
    python = interpreter("LM_EVAL_PYTHON")
    model = trained_model(repo) if trained else place / "model"
    shots, chat = int(way[0]), "chat" in way
    words = ["--apply_chat_template"] if chat else []
    asked = [*words, "--num_few_shot", str(shots), "--few_shot_file", place / "train.jsonl"]
    asked += ["--few_shot_seed", "1234"]
    # What the model says becomes right for every second problem, so that some are right.
    write(place / "test.jsonl", [problem(number) for number in range(QUESTIONS)])
    first = ours(repo, place, model, tmp_path / "first.json", *asked)
    said = [one["settings"]["flexible"] for one in first["results"]]
    numbers = [text if text[-1:].isdigit() and "$" not in text else None for text in said]
    rows = [problem(n, text if n % 2 else None) for n, text in enumerate(numbers)]
    write(place / "test.jsonl", rows)
    mine = ours(repo, place, model, tmp_path / "ours.json", *asked)
    theirs, samples = harness(python, place, model, tmp_path / "theirs", shots, *words)
    for name, filter_ in (("strict", "strict-match"), ("flexible", "flexible-extract")):
        figure = f"exact_match_{name}"
        assert mine["averages"][figure] == pytest.approx(theirs[f"exact_match,{filter_}"])
        spread = theirs[f"exact_match_stderr,{filter_}"]
        assert mine["averages"][f"{figure}_stderr"] == pytest.approx(spread)
        for number, one in enumerate(mine["results"]):
            row = samples[filter_, number]
            assert one["settings"]["answer"] == row["resps"][0][0]
            assert one["settings"][name] == row["filtered_resps"][0]
            assert one["figures"][figure] == row["exact_match"]
    prompt = samples["strict-match", 0]["arguments"]["gen_args_0"]["arg_0"]
    assert mine["settings"]["first_prompt"].endswith(prompt)
    print(f"{way}, {trained=}: {mine['averages']}")
    if any(numbers[1::2]):
        assert mine["averages"]["exact_match_flexible"] > 0
