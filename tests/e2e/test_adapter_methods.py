"""DoRA on PiSSA, whole layers, LoRA+ and NEFTune from the command line, from start to answer."""

import json
import math
import sys

import pytest

from tests.e2e import training_process
from tests.e2e.test_frozen_base_scripts import losses, tune

TINY = "__internal_testing__/tiny-random-llama"
METHODS = ("--use_dora", "true", "--pissa", "true", "--modules_to_save", "embed_tokens,norm")
FLAGS = (*METHODS, "--lora_plus_scale", 4, "--neftune_noise_alpha", 5, "--lora_dropout", 0.1)


def test_a_run_that_was_cut_ends_as_the_whole_one(repo, trainers, tmp_path):
    """Bit for bit; then the files go on, merge and answer, and are refused for single requests."""

    def run(script, *words, status=0):
        command = [sys.executable, script, *map(str, words)]
        done = training_process.run(command, repo, status, trainers)
        return done.stdout + done.stderr

    said = tune(run, TINY, tmp_path / "whole", *FLAGS)
    assert "memory is not predicted: the formulas know plain LoRA only" in said
    tune(run, TINY, tmp_path / "cut", *FLAGS, steps=2)
    tune(run, TINY, tmp_path / "cut", *FLAGS, "--resume_from_checkpoint", "true")
    for file in ("adapter_model.safetensors", "adapter_config.json", "pissa.json"):
        whole, cut = ((tmp_path / place / file).read_bytes() for place in ("whole", "cut"))
        assert whole == cut, file
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "adapter_config.json").read_text())["r"] == 16
    tune(run, TINY, tmp_path / "on", "--lora_path", tmp_path / "whole", steps=1)
    assert json.loads((tmp_path / "on" / "pissa.json").read_text())["r"] == 8

    adapter = ["--lora_path", tmp_path / "whole"]
    run("merge_lora.py", "--model_path", TINY, *adapter, "--output_dir", tmp_path / "merged")
    asked = ["--prompt", "Where is the harbour?", "--max_length", 8]
    answers = []
    for number, model in enumerate([[TINY, *adapter], [tmp_path / "merged"]]):
        file = tmp_path / f"{number}.jsonl"
        words = ["--model_name_or_path", *model, *asked, "--output_file", file]
        run("predict_generation.py", *words)
        answers.append(file.read_bytes())
    assert answers[0] == answers[1]
    words = ["--model_name_or_path", TINY, "--adapters", f"a={tmp_path / 'whole'}", *asked]
    refused = run("predict_generation.py", *words, status=2)
    assert "use_dora=True changes the base's own weights" in refused


# Each alone and all together; the last one's start is not the base's bits.
PREFERRED = {
    "dora": METHODS[:2],
    "pissa": METHODS[2:4],
    "modules": METHODS[4:],
    "all": METHODS,
}


@pytest.mark.parametrize("name", PREFERRED)
def test_preferences_are_learnt_from_the_model_as_it_was_given(name, repo, trainers, tmp_path):
    """The reference of a run that was cut is the start's, not that of what had been learnt."""

    def run(script, *words, status=0):
        command = [sys.executable, script, *map(str, words)]
        done = training_process.run(command, repo, status, trainers)
        return done.stdout + done.stderr

    flags, task = (*PREFERRED[name], "--dpo", "true"), {"task": "preference"}
    tune(run, TINY, tmp_path / "whole", *flags, **task)
    tune(run, TINY, tmp_path / "cut", *flags, steps=2, **task)
    tune(run, TINY, tmp_path / "cut", *flags, "--resume_from_checkpoint", "true", **task)
    found = losses(tmp_path / "whole")
    assert found[0] == pytest.approx(math.log(2), abs=1e-5), "policy and reference begin as one"
    assert found[-1] < 0.69 and losses(tmp_path / "cut") == found
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        whole, cut = ((tmp_path / place / file).read_bytes() for place in ("whole", "cut"))
        assert whole == cut, file
    if name == "all":
        adapter = ["--lora_path", tmp_path / "whole"]
        run("merge_lora.py", "--model_path", TINY, *adapter, "--output_dir", tmp_path / "merged")
        answers = []
        for number, model in enumerate([[TINY, *adapter], [tmp_path / "merged"]]):
            file = tmp_path / f"{number}.jsonl"
            words = ["--model_name_or_path", *model, "--prompt", "Hi", "--max_length", 8]
            run("predict_generation.py", *words, "--output_file", file)
            answers.append(file.read_bytes())
        assert answers[0] == answers[1]
