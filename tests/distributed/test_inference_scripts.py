"""The scripts as they are launched: one process prints and reads, all compute."""

import io
import json
import subprocess
import sys

import pytest

from common.errors import UserError
from common.flags import load
from data.tokenizer import load_tokenizer
from llm.config.evaluation import EvaluateArguments
from llm.config.generation import (
    OpenArguments,
    PromptArguments,
    SamplingArguments,
    SharingArguments,
)
from llm.engine.finding import find_model
from llm.engine.opening import open_model, open_network
from llm.evaluation.scorer import open_scorer
from llm.evaluation.tasks import read_tasks
from llm.llama.build import load_model, save_model
from llm.llama.config import TINY_NAME
from llm.llama.files.checkpoint import open_checkpoint
from llm.llama.files.conversion import convert
from llm.llama.files.rank_layout import RankLayout
from llm.serving.terminal import chat_on_stdin

LAUNCH = ("-m", "paddle.distributed.launch", "--nproc_per_node", "2")
TALK = "The sky is\n\n/reset\nwords words\n/exit\nnever read\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model with its tokenizer in both layouts, and a text."""
    root = tmp_path_factory.mktemp("scripts")
    save_model(load_model(TINY_NAME), root / "hf")
    load_tokenizer(TINY_NAME).save(root / "hf")
    convert(open_checkpoint(root / "hf"), root / "ranks", layout=RankLayout(2, 2))
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return root


def run(repo, root, name, *words, processes=1, status=0, said=""):
    launch = (*LAUNCH, "--log_dir", root / f"log-{name}") if processes > 1 else ()
    done = subprocess.run(
        [sys.executable, *map(str, launch), *map(str, words)],
        cwd=repo,
        input=said,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def chat_here(root, monkeypatch, capsys):
    """Return what one process, this one, prints in the chat."""
    model = open_network(load_model(root / "hf"), load_tokenizer(root / "hf"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(TALK))
    chat_on_stdin(model, PromptArguments(), SamplingArguments(max_length=8))
    return capsys.readouterr().out


def test_a_chat_over_two_processes(repo, root, monkeypatch, capsys):
    expected = chat_here(root, monkeypatch, capsys)
    assert len(expected.splitlines()) >= 2
    words = ("predict_generation.py", "--model_name_or_path", root / "ranks", "--max_length", 8)
    done = run(repo, root, "chat", *words, processes=2, said=TALK)
    log = (root / "log-chat" / "workerlog.0").read_text(encoding="utf-8", errors="replace")
    assert expected in done.stdout and expected in log
    assert "holds PaddleNLP's files of parallel ranks" in log
    other = (root / "log-chat" / "workerlog.1").read_text(encoding="utf-8", errors="replace")
    for quiet in (expected.splitlines()[0], "holds PaddleNLP's files"):
        assert quiet not in other


def test_figures_of_two_processes(repo, root):
    file, out = root / "text.txt", root / "figures.json"
    which = OpenArguments(model_name_or_path=str(root / "hf"))
    which.validate()
    found = find_model(which)
    args = EvaluateArguments(["perplexity"], [str(file)], max_length=64)
    (task,) = read_tasks(args, found)
    model = open_model(which, found)
    expected = task.run(model, open_scorer(model))
    words = ("--model_name_or_path", root / "ranks", "--data_file", file, "--output_file", out)
    words += ("--task", "perplexity", "--max_length", 64)
    done = run(repo, root, "figures", "evaluate_generation.py", *words, processes=2)
    assert done.stdout.count("token_perplexity") == 1
    figures = json.loads(out.read_text(encoding="utf-8"))["results"][0]["figures"]
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-6), name


def test_questions_over_two_processes(repo, root):
    """Needles and their prompts are read by all, asked and reported by one."""
    file, out = root / "text.txt", root / "needles.json"
    words = ("--model_name_or_path", root / "ranks", "--data_file", file, "--output_file", out)
    words += ("--task", "needle", "--context_lengths", 150, 200, "--depths", 0, 100)
    words += ("--max_answer_tokens", 8)
    done = run(repo, root, "needles", "evaluate_generation.py", *words, processes=2)
    assert done.stdout.count("needles found, of 4") == 1
    said = json.loads(out.read_text(encoding="utf-8"))
    which = OpenArguments(model_name_or_path=str(root / "hf"))
    which.validate()
    found = find_model(which)
    args = EvaluateArguments(["needle"], [str(file)], max_answer_tokens=8)
    args.context_lengths, args.depths = [150, 200], [0, 100]
    model = open_model(which, found)
    for task, result in zip(read_tasks(args, found), said["results"], strict=True):
        figures = task.run(model, open_scorer(model))
        assert task.settings == {k: v for k, v in result["settings"].items() if k != "key"}
        assert figures == result["figures"]


def test_merging_ends_with_a_complete_model(repo, root):
    words = ("predict_generation.py", "--model_name_or_path", root / "ranks")
    target = root / "merged"
    done = run(repo, root, "merge", *words, "--merge_tensor_parallel_path", target)
    assert f"wrote {target}" in done.stderr and not done.stdout
    assert (target / "model.safetensors").read_bytes() != b""
    before, after = (open_checkpoint(root / name).tensors for name in ("hf", "merged"))
    for name, tensor in before.items():
        assert (tensor.read() == after[name].read()).all(), name
    assert load_tokenizer(target).fingerprint == load_tokenizer(root / "hf").fingerprint


@pytest.mark.parametrize("processes, degree", [(1, 2), (4, 2), (2, 1)])
def test_a_degree_that_was_not_launched(monkeypatch, processes, degree):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(processes))
    words = ["--tensor_parallel_degree", str(degree)]
    with pytest.raises(UserError, match=rf"{processes} process.* --nproc_per_node {degree}, or"):
        load((SharingArguments,), words, prog="predict_generation.py")


def test_kept_weights_are_of_one_process(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    words = ["--model_name_or_path", TINY_NAME, "--packed_cache", "kept"]
    with pytest.raises(UserError, match="packed_cache=kept has no effect over 2 processes"):
        load((OpenArguments,), words, prog="predict_generation.py")


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ("predict_generation.py", "--model_name_or_path", "hf", "--prompt", "a"),
            "tensor_parallel_degree=3 does not divide the model's num_key_value_heads=2",
        ),
        (
            *(("evaluate_generation.py", "--model_dir", "hf", "--task", "perplexity"),),
            "3 processes were launched, but an exported program runs in one",
        ),
    ],
)
def test_models_that_cannot_be_shared(repo, root, monkeypatch, words, message):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "3")
    script, flag, model, *others = words
    others += ["--data_file", root / "text.txt"] if "--task" in others else []
    done = run(repo, root, "refused", script, flag, root / model, *others, status=2)
    assert message in done.stderr


def test_merging_ranks_does_not_merge_adapters(repo, root):
    words = ("predict_generation.py", "--model_name_or_path", root / "ranks", "--lora_path", root)
    words += ("--merge_tensor_parallel_path", root / "never")
    done = run(repo, root, "adapter", *words, status=2)
    assert "merges ranks, not the adapter" in done.stderr and not (root / "never").exists()
