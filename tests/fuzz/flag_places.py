"""What the command lines of `tests.fuzz.flag_cases` name: small models, adapters, stores, files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

REPO = Path(__file__).resolve().parents[2]
SAMPLES = REPO / "data" / "assets" / "samples"
_EXAM = REPO / "tests" / "fixtures" / "ceval"
TINY = "__internal_testing__/tiny-random-llama"

Run = Callable[[str, list[str]], CompletedProcess[str]]

_QUESTIONS = [
    {"question": f"{a} and {b}?", "choices": [f"{a + b}", "none", "12"], "answer": 0}
    for a, b in ((2, 3), (4, 1), (7, 7))
]
_TEXT = "Document {0} says that {1} is the square of {0}. It is short, and it ends here. "


def asked(text: str) -> dict[str, object]:
    """Return a request of a batch file."""
    body = {"prompt": text, "temperature": 0}
    return {"custom_id": text, "method": "POST", "url": "/v1/completions", "body": body}


def _chat() -> dict[str, object]:
    """Return a request of a batch file that a chat template renders."""
    body = {"messages": [{"role": "user", "content": "Hello there"}], "temperature": 0}
    return {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": body}


def _texts(root: Path) -> dict[str, Path]:
    """Write files of text, prompts, examples and questions."""
    for name, first in (("text", 0), ("text2", 9)):
        pages = ["\n".join([_TEXT.format(n, n * n)] * 2) for n in range(first, 60)]
        (root / f"{name}.txt").write_text("\n\n".join(pages))
    for name, texts in (("batch", ("Hello there", "Bye", "Who")), ("batch2", ("Another word",))):
        requests = [asked(text) for text in texts]
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, requests)))
    (root / "chats.jsonl").write_text(json.dumps(_chat()))
    lines = [json.dumps({"text": _TEXT.format(n, n) + "It is well @-@ known ."}) for n in range(20)]
    (root / "lines.jsonl").write_text("\n".join(lines))
    (root / "prompts.jsonl").write_text('"The square of two"\n"Hello there"\n"A house"\n')
    (root / "prompts2.jsonl").write_text('"Another word"\n')
    for name, first in (("problems", 2), ("problems2", 11)):
        problems = [
            {"question": f"{n} houses have {n} doors each. How many?", "answer": f"#### {n * n}"}
            for n in range(first, first + 5)
        ]
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, problems)))
    (root / "choices.jsonl").write_text("\n".join(map(json.dumps, _QUESTIONS)))
    table = [f"{a} and {a * a % 7}?,{a + 1},it is {a * a},{'AB'[a % 3 % 2]}" for a in range(40)]
    (root / "questions.csv").write_text("\n".join(["question,A,B,answer", *table, ""]))
    examples = json.loads((SAMPLES / "alpaca" / "dev.json").read_text())
    (root / "alpaca.json").write_text(json.dumps(examples))
    (root / "alpaca2.json").write_text(json.dumps(examples[:2]))
    both = [{**example, "text": example["output"]} for example in examples]
    (root / "both.jsonl").write_text("\n".join(map(json.dumps, both)))
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    (root / "messages.jsonl").write_text(json.dumps({"messages": turns}))
    return {path.stem: path for path in root.iterdir() if path.is_file()}


def _questions(root: Path) -> dict[str, Path]:
    """Copy samples of sets, whole and in part, with two files of answers to SQuAD's."""
    shutil.copytree(SAMPLES / "squad", root / "squad")
    shutil.copytree(SAMPLES / "squad", root / "squad2")
    shutil.copytree(_EXAM, root / "exam")
    for file in (root / "exam" / "val").iterdir():
        file.write_text("".join(file.read_text("utf-8").splitlines(keepends=True)[:-1]), "utf-8")
    for name in ("train", "dev"):
        file = root / "squad2" / f"{name}.json"
        content = json.loads(file.read_text())
        content["data"] = content["data"][: max(1, len(content["data"]) // 2)]
        file.write_text(json.dumps(content))
    dev = json.loads((root / "squad" / "dev.json").read_text())
    asked = [
        question
        for page in dev["data"]
        for paragraph in page["paragraphs"]
        for question in paragraph["qas"]
    ]
    right = {question["id"]: question["answers"][0]["text"] for question in asked}
    (root / "predictions.json").write_text(json.dumps(right))
    (root / "predictions2.json").write_text(json.dumps(dict.fromkeys(right, "no")))
    return {
        "ceval": _EXAM,
        "exam": root / "exam",
        "squad": root / "squad",
        "squad2": root / "squad2",
        "predictions": root / "predictions.json",
        "predictions2": root / "predictions2.json",
    }


def _ending(model: Path, answers: Path, target: Path) -> None:
    """Copy a model; the second token of its first answer ends one, as `--ignore_eos` needs."""
    shutil.copytree(model, target)
    second = json.loads(answers.read_text().splitlines()[0])["ids"][1]
    for name in ("config.json", "generation_config.json"):
        content = json.loads((target / name).read_text())
        (target / name).write_text(json.dumps({**content, "eos_token_id": second}))


def make(root: Path, run: Run) -> dict[str, str]:
    """Make all places below a directory; returns their names and paths.

    Args:
        root: an empty directory.
        run: runs a script, or a module, with words to its end.
    """

    def done(script: str, line: str) -> None:
        result = run(script, line.format(root=root).split())
        assert result.returncode == 0, f"{script} {line}\n{result.stderr[-2000:]}"

    places = {**_texts(root), **_questions(root)}
    for name, text in (("store", "text"), ("store2", "text2")):
        done(
            "data.prepare",
            f"--input {{root}}/{text}.txt --tokenizer {TINY} --output_prefix {{root}}/{name}/s",
        )
    fit = "--do_train --per_device_train_batch_size 2 --learning_rate 1e-2"
    pretrain = f"--tokenizer_name_or_path {TINY} --input_dir {{root}}/store --max_seq_length 32"
    pretrain += f" --split 8,1,1 {fit}"
    for name, more in (("model", ""), ("other", "--seed 3"), ("model2", "")):
        done(
            "run_pretrain.py",
            f"--model_name_or_path {TINY} {pretrain} --max_steps 20 --output_dir {{root}}/{name} "
            f"--save_strategy no {more}",
        )
    done(
        "run_pretrain.py",
        f"--model_name_or_path {{root}}/model {pretrain} --max_steps 2 --logging_steps 1 "
        "--output_dir {root}/begun",
    )
    tune = f"--dataset_path {{root}}/squad --src_length 300 --tgt_length 60 --max_steps 2 {fit}"
    tune += " --model_name_or_path {root}/model --save_strategy no"
    done("finetune_generation.py", f"{tune} --lora --output_dir {{root}}/lora")
    done("finetune_generation.py", f"{tune} --lora --seed 9 --output_dir {{root}}/lora2")
    done(
        "finetune_generation.py",
        f"{tune} --prefix_tuning --num_prefix_tokens 4 --output_dir {{root}}/prefix",
    )
    for model, name in (("model", "w8"), ("other", "w8other")):
        done(
            "quantize_generation.py", f"--model_path {{root}}/{model} --output_dir {{root}}/{name}"
        )
    done(
        "convert_checkpoint.py",
        "--input_dir {root}/model --output_dir {root}/ranks --tensor_parallel_degree 2",
    )
    done(
        "predict_generation.py",
        "--model_path {root}/model --data_file {root}/prompts.jsonl --output_file {root}/said",
    )
    done(
        "predict_generation.py",
        "--model_path {root}/model --prompt Hello --chat --max_length 32 --output_file {root}/talk",
    )
    answer = json.loads((root / "talk").read_text())["output"]
    asked = [{"src": "Hello", "tgt": answer}, {"src": "Bye", "tgt": "no"}]
    (root / "ours.jsonl").write_text("\n".join(map(json.dumps, asked)))
    places["ours"] = root / "ours.jsonl"
    places["letter"] = Path(next(letter for letter in answer if letter.isalnum()))
    _ending(root / "model", root / "said", root / "ending")
    for name in ("ending", "other"):
        done(
            "export_generation_model.py",
            f"--model_path {{root}}/{name} --output_path {{root}}/program-{name}/llama --check no",
        )
    names = ("store", "store2", "model", "other", "model2", "lora", "lora2", "prefix", "w8")
    places |= {name: root / name for name in (*names, "w8other", "ranks", "ending")}
    places["checkpoint"] = root / "begun" / "checkpoint-2"
    places |= {"program": root / "program-ending", "program2": root / "program-other"}
    return {name: str(path) for name, path in places.items()}
