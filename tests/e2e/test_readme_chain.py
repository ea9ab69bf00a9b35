"""The README's chain as it stands, from text to tokens that two ways of generating agree on."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.training_process import run
from tests.page_commands import bash_commands

# Unequal lengths, the longest over several cache blocks of 16 tokens.
PROMPTS = [
    "A",
    "The store holds",
    "Line 7 of the text says that the seventh",
    "is the end",
    "tokens " * 30 + "and then",
]
ANSWER = 24


def readme_command(repo, script, root):
    """Return the README's first command that runs ``script``, writing below ``root``."""
    for words in bash_commands(repo / "README.md"):
        if words[0] == "python" and script in words:
            return [sys.executable, *(w.replace("outputs/first", str(root)) for w in words[1:])]
    raise AssertionError(f"the README has no command with {script}")


def replaced(words, flag, *values):
    """Return the command with other values of a flag, which is added where it is not given."""
    start = words.index(flag) if flag in words else len(words)
    end = start + 1
    while end < len(words) and not words[end].startswith("--"):
        end += 1
    return [*words[:start], flag, *map(str, values), *words[end:]]


@pytest.fixture(scope="module")
def root(repo, trainers, tmp_path_factory):
    """Text, store, model and program, each by the README's command on a small text."""
    root = tmp_path_factory.mktemp("readme")
    text = root / "text.txt"
    lines = [f"Line {n} of the text says that {n} is the end." for n in range(30)]
    text.write_text("\n\n".join(lines), encoding="utf-8")
    run(replaced(readme_command(repo, "data.prepare", root), "--input", text), repo)
    train = readme_command(repo, "run_pretrain.py", root)
    shorter = {"--max_steps": 60, "--eval_steps": 30, "--save_steps": 30, "--max_seq_length": 32}
    for flag, value in {**shorter, "--split": "8,2,0"}.items():
        train = replaced(train, flag, value)
    run(train, repo, ranks=trainers)
    said = run(readme_command(repo, "export_generation_model.py", root), repo, ranks=trainers)
    assert "alone and together" in said.stderr
    return root


@pytest.mark.parametrize("batch_size", [1, len(PROMPTS)])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_predict_and_infer_give_the_same_tokens(repo, root, ranks, batch_size, ignore_eos):
    def answers(script):
        out = root / f"{script}-{batch_size}-{ignore_eos}.jsonl"
        words = readme_command(repo, script, root)
        changes = {
            "--prompt": PROMPTS,
            "--max_length": [ANSWER],
            "--batch_size": [batch_size],
            "--ignore_eos": [ignore_eos],
            "--output_file": [out],
            "--threads": [1],  # both run at the same time
        }
        for flag, values in changes.items():
            words = replaced(words, flag, *values)
        # Once as users start them, else as forks.
        run(words, repo, ranks=ranks if batch_size > 1 or ignore_eos else None)
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]

    scripts = ("predict_generation.py", "infer_generation.py")
    with ThreadPoolExecutor(2) as pool:
        predicted, inferred = pool.map(answers, scripts)
    assert [answer["prompt"] for answer in predicted] == PROMPTS
    assert [answer["ids"] for answer in predicted] == [answer["ids"] for answer in inferred]
    lengths = {len(answer["prompt_ids"]) for answer in predicted}
    assert len(lengths) == len(PROMPTS) and max(lengths) > 32
    reasons = [answer["finish_reason"] for answer in predicted]
    if ignore_eos:
        assert reasons == ["length"] * len(PROMPTS)
        assert all(len(answer["ids"]) == ANSWER for answer in predicted)
    else:
        assert "stop" in reasons  # else the two cases would be one
