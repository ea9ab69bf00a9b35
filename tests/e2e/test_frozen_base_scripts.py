"""LoRA over bases of few bits from the command line: losses, resume, what is written, merging."""

import json
import sys

import numpy as np
import pytest

from data.tokenizer import load_tokenizer
from llm.llama.build import load_model, save_model
from llm.llama.config import TINY_NAME
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.network import dequantize_model
from tests.e2e import training_process

# As the flags round the built-in model: its sizes take groups of 16.
GROUP = 16
STEPS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One model as W4 and W8 in bfloat16, and widened to float32: the same function thrice."""
    root = tmp_path_factory.mktemp("bases")
    for kind in ("W4", "W8"):
        config = QuantConfig.of_type(kind, GROUP if kind == "W4" else None)
        model = load_model(TINY_NAME, dtype="bfloat16", frozen=True, round_to=config)
        save_model(model, root / kind)
        wide = dequantize_model(load_model(root / kind))
        save_model(wide, root / f"{kind}-widened")
    plain = load_model(TINY_NAME)
    for parameter in plain.parameters():
        parameter.set_value(parameter.astype("bfloat16").astype("float32"))
    save_model(plain, root / "bfloat16")
    for place in root.iterdir():
        load_tokenizer(TINY_NAME).save(place)
    return root


@pytest.fixture(scope="module")
def run(repo, trainers):
    def run(script, *words, status=0):
        command = [sys.executable, script, *map(str, words)]
        done = training_process.run(command, repo, status, trainers)
        return done.stdout + done.stderr

    return run


def tune(run, model, out, *flags, steps=STEPS, status=0, task="squad"):
    words = ["--model_name_or_path", model, "--output_dir", out, "--task_name", task, "--lora"]
    words += ["true", "--do_train", "--max_steps", steps, "--logging_steps", 1, "--save_steps", 2]
    words += ["--learning_rate", "1e-2", "--lr_scheduler_type", "constant", "--threads", 1]
    words += ["--per_device_train_batch_size", 2, "--src_length", 64, "--on_long", "truncate"]
    return run("finetune_generation.py", *words, *flags, status=status)


def losses(place):
    lines = (place / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.parametrize("kind", ["W4", "W8", "bfloat16"])
def test_losses_are_those_over_the_widened_weights(run, root, tmp_path, kind):
    flags = ["--base_dtype", "bfloat16"] if kind == "bfloat16" else []
    said = tune(run, root / kind, tmp_path / "low", *flags)
    wide = root / ("bfloat16" if kind == "bfloat16" else f"{kind}-widened")
    tune(run, wide, tmp_path / "wide")
    low, wanted = losses(tmp_path / "low"), losses(tmp_path / "wide")
    assert len(low) == STEPS and low[0] != low[-1]
    np.testing.assert_allclose(low, wanted, rtol=2e-4)
    assert "the frozen base lies in " in said
    record = tmp_path / "low" / "base_quantization.json"
    assert record.exists() == (kind != "bfloat16")
    if kind != "bfloat16":
        assert json.loads(record.read_text())["weight_quantize_algo"] is None


def test_rounded_while_read_resumed_and_merged(run, root, tmp_path):
    """Bits after a resume; the adapter merges into the integers that it was trained over."""
    flags = ["--weight_quantize_algo", "weight_only_int4"]
    tune(run, root / "bfloat16", tmp_path / "whole", *flags)
    tune(run, root / "bfloat16", tmp_path / "cut", *flags, steps=2)
    resume = ["--resume_from_checkpoint", "true"]
    tune(run, root / "bfloat16", tmp_path / "cut", *flags, *resume)
    file = "adapter_model.safetensors"
    assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    said = tune(run, root / "bfloat16", tmp_path / "cut", *resume, steps=4, status=2)
    assert "its base lay in W4 in groups of 16, the rest in float32, this run's lies in" in said
    raw = json.loads((tmp_path / "whole" / "base_quantization.json").read_text())
    assert raw["weight_quantize_algo"] == "weight_only_int4"
    words = ["--model_path", root / "bfloat16", "--lora_path", tmp_path / "whole"]
    said = run(
        *("merge_lora.py", *words, "--output_dir", tmp_path / "merged"),
        *("--quantize_merged", "true", "--dtype", "bfloat16"),
    )
    assert "merged weights rounded to W4: weights change by" in said
    assert load_model(tmp_path / "merged").config == load_model(root / "W4").config
    plain = ["--model_name_or_path", root / "bfloat16", "--lora_path", tmp_path / "whole"]
    said = run("predict_generation.py", *plain, "--prompt", "A", "--max_length", 2)
    assert "the adapter was trained over a base in W4 in groups of 16, this one is not" in said


def test_integers_are_not_rounded_again(run, root, tmp_path):
    flags = ["--weight_quantize_algo", "weight_only_int8"]
    said = tune(run, root / "W4", tmp_path / "out", *flags, status=2)
    assert "holds integers already (W4 in groups of 16)" in said and "leave it out" in said
    assert not (tmp_path / "out").exists()
