"""finetune_generation.py from the command line: the published lines, SIGKILL and resume, alpaca."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e import training_process
from tests.page_commands import bash_commands

TINY = "__internal_testing__/tiny-random-llama"


def run(repo, words, ranks=None):
    done = training_process.run([sys.executable, *words], repo, ranks=ranks)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def commands(repo, tmp_path_factory):
    """The commands of docs/finetune.md, writing into a temporary directory."""
    root = tmp_path_factory.mktemp("tuned")
    found = bash_commands(repo / "docs" / "finetune.md")
    replaced = [[w.replace("outputs/tuned", str(root)) for w in words[1:]] for words in found]
    assert len(replaced) == 6
    return root, replaced


@pytest.fixture(scope="module")
def tuned(repo, commands, trainers):
    """What the three published commands left behind, of which one is launched as it stands."""
    root, found = commands
    ways = [(found[0], None), (found[1], trainers), (found[2], trainers)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda way: run(repo, *way), ways))
    return root


def best_and_last(directory):
    records = [json.loads(line) for line in (directory / "train_log.jsonl").open()]
    measured = {r["step"]: r["eval_accuracy"] for r in records if "eval_accuracy" in r}
    best = max(measured, key=lambda step: (measured[step], -step))
    return best, max(r["step"] for r in records), measured[best]


@pytest.mark.parametrize(
    ("mode", "file"),
    [
        ("full", "model.safetensors"),
        ("lora", "adapter_model.safetensors"),
        ("prefix", "adapter_model.safetensors"),
    ],
)
def test_published_commands_end_with_the_best_model(tuned, mode, file):
    directory = tuned / mode
    best, last, accuracy = best_and_last(directory)
    assert last == 32
    kept = sorted(path.name for path in directory.glob("checkpoint-*"))
    assert kept == sorted({f"checkpoint-{best}", f"checkpoint-{last}"})
    final = (directory / file).read_bytes()
    assert final == (directory / f"checkpoint-{best}" / file).read_bytes()
    assert json.loads((directory / "eval_results.json").read_text())["eval_accuracy"] == accuracy


def test_later_stages_take_what_was_tuned(repo, commands, tuned, ranks):
    """Predict and export the adapter, evaluate the prefix; the full model in the same places."""
    _, found = commands
    full = [
        ["predict_generation.py", "--model_name_or_path", str(tuned / "full"), *found[3][5:]],
        ["evaluate_generation.py", "--model_name_or_path", str(tuned / "full"), *found[5][5:]],
    ]
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda words: run(repo, words, ranks), [*found[3:], *full]))
    assert "tokens/s" in said[0] and "checked in a fresh process: logits" in said[1]
    assert all("exact_match" in text for text in (said[2], said[4]))
    assert (tuned / "inference" / "llama.manifest.json").is_file()


def words_for(output_dir, *flags):
    base = ["finetune_generation.py", "--model_name_or_path", TINY, "--output_dir", str(output_dir)]
    base += ["--do_train", "--do_eval", "--evaluation_strategy", "steps", "--logging_steps", "5"]
    base += ["--threads", "1"]  # two run at the same time
    return [*base, *flags]


def run_whole_and_killed(repo, place, flags, checkpoint, ranks):
    """Run once as it is, and beside it once killed at a checkpoint and resumed."""
    killed = words_for(place / "killed", *flags)

    def kill_and_resume():
        words = [sys.executable, *killed]
        training_process.kill_after(words, repo, place / "killed" / checkpoint, ranks)
        run(repo, [*killed, "--resume_from_checkpoint", "true"], ranks)

    whole = words_for(place / "whole", *flags)
    return training_process.together(lambda: run(repo, whole, ranks), kill_and_resume)[0]


def figures(directory):
    names = ("step", "loss", "learning_rate", "grad_norm", "eval_loss", "eval_accuracy")
    lines = (directory / "train_log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k in names} for line in lines]


def test_a_killed_preference_run_goes_on_bit_for_bit(repo, tmp_path, trainers):
    """LoRA, DPO, dropout and a pass that ends inside an update, all in one."""
    flags = ["--task_name", "preference", "--dpo", "true", "--lora", "true"]
    flags += ["--lora_dropout", "0.1", "--learning_rate", "1e-3", "--per_device_train_batch_size"]
    flags += ["3", "--num_train_epochs", "2.5", "--save_steps", "6", "--eval_steps", "6"]
    run_whole_and_killed(repo, tmp_path, flags, "checkpoint-6", trainers)
    assert figures(tmp_path / "whole") == figures(tmp_path / "killed")
    name = "adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.timeout(900)
def test_alpaca(repo, tmp_path, shared_data, trainers):
    """400 examples to train on, 50 to measure: a loss below the pretrained model's, the best model
    of the log at the end, and a run that was killed equal to one that was not."""
    examples = json.loads((shared_data / "alpaca_en_1k.json").read_text())
    assert len(examples) == 999
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.json").write_text(json.dumps(examples[:400]))
    (data / "dev.json").write_text(json.dumps(examples[-50:]))
    flags = ["--dataset_path", str(data), "--chat_template", "alpaca", "--eval_on_start", "true"]
    flags += ["--on_long", "truncate", "--src_length", "256", "--tgt_length", "256"]
    flags += ["--packing", "true", "--max_seq_length", "1024", "--learning_rate", "3e-3"]
    flags += ["--per_device_train_batch_size", "4", "--num_train_epochs", "1"]
    flags += ["--save_steps", "20", "--eval_steps", "20", "--load_best_model_at_end", "true"]
    flags += ["--use_flash_attention", "true"]
    said = run_whole_and_killed(repo, tmp_path, flags, "checkpoint-20", trainers)
    assert figures(tmp_path / "whole") == figures(tmp_path / "killed")
    model = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert model == (tmp_path / "killed" / "model.safetensors").read_bytes()
    measured = {r["step"]: r["eval_loss"] for r in figures(tmp_path / "whole") if "eval_loss" in r}
    best = min(measured, key=measured.get)
    print(f"eval loss by step: {measured}")
    assert measured[best] < measured[0] - 0.5
    assert f"best model: {tmp_path / 'whole' / f'checkpoint-{best}'}" in said
    chosen = tmp_path / "whole" / f"checkpoint-{best}" / "model.safetensors"
    assert model == chosen.read_bytes()
