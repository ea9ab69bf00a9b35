"""Adapters from the command line: predict, merge, export and infer answer alike."""

import json
import sys

import numpy as np
import pytest

from data.tokenizer import load_tokenizer
from llm.llama.adapters.lora import LoRAConfig, LoRALinear, add_lora, save_lora
from llm.llama.adapters.prefix import PrefixConfig, add_prefix, save_prefix
from llm.llama.build import load_model, save_model
from llm.llama.config import TINY_NAME
from tests.e2e import training_process
from tests.e2e.training_process import together

PROMPTS = ["A", "The quick brown fox jumps", "words " * 20]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base model with tokenizer and template, and an adapter of each kind."""
    root = tmp_path_factory.mktemp("adapters")
    model = load_model(TINY_NAME)
    save_model(model, root / "base")
    load_tokenizer(TINY_NAME).save(root / "base")
    add_lora(model, LoRAConfig(r=4), seed=0)
    rng = np.random.default_rng(0)
    for layer in model.sublayers():
        if isinstance(layer, LoRALinear):
            value = rng.standard_normal(layer.lora_B.shape, dtype=np.float32)
            layer.lora_B.set_value(0.3 * value)
    save_lora(model, root / "lora")
    save_prefix(add_prefix(load_model(TINY_NAME), PrefixConfig(20), seed=0), root / "prefix")
    prompts = [json.dumps({"prompt": prompt}) for prompt in PROMPTS]
    (root / "prompts.jsonl").write_text("\n".join(prompts), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def run(repo, ranks):
    """Run a script, as a fork of the rank server unless ``alone``; return its standard error."""

    def run(script, *words, status=0, alone=False):
        command = [sys.executable, script, *words]
        return training_process.run(command, repo, status, None if alone else ranks).stderr

    return run


def answers(run, root, name, script, *words):
    """Return what a script answers to all prompts."""
    out = root / f"{name}.jsonl"
    asked = ("--data_file", root / "prompts.jsonl", "--output_file", out, "--max_length", 12)
    run(script, *words, *asked)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_merged_and_exported_models_answer_as_the_adapter_does(run, root):
    base = ("--model_name_or_path", root / "base")
    lora = ("--lora_path", root / "lora")
    predict = "predict_generation.py"
    adapted, plain, said = together(
        lambda: answers(run, root, "adapted", predict, *base, *lora),
        lambda: answers(run, root, "plain", predict, *base),
        lambda: run("merge_lora.py", *base, *lora, "--output_dir", root / "merged", alone=True),
    )
    assert adapted != plain
    assert said == f"wrote {root / 'merged'}\n"
    names = {path.name for path in (root / "merged").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    merged = ("--model_name_or_path", root / "merged")
    place = ("--output_path", root / "program" / "llama")
    answered, said = together(
        lambda: answers(run, root, "merged-answers", predict, *merged),
        lambda: run("export_generation_model.py", *base, *lora, *place),
    )
    assert answered == adapted
    assert "checked in a fresh process: logits" in said
    program = ("--model_dir", root / "program", "--model_prefix", "llama")
    assert answers(run, root, "infer", "infer_generation.py", *program) == adapted


def test_a_prefix_answers(run, root):
    base = ("--model_name_or_path", root / "base")
    prefix = ("--prefix_path", root / "prefix")
    given = answers(run, root, "prefix-answers", "predict_generation.py", *base, *prefix)
    assert len(given) == len(PROMPTS)
    assert given != answers(run, root, "plain", "predict_generation.py", *base)


BAD = {
    "two adapters": (
        ("predict_generation.py", "--lora_path", "lora", "--prefix_path", "prefix"),
        "lora_path and prefix_path are both given; a model takes one adapter",
    ),
    "a prefix as LoRA": (
        ("predict_generation.py", "--lora_path", "prefix"),
        "peft_type='PREFIX_TUNING' is not 'LORA'; give it as --prefix_path",
    ),
    "LoRA as a prefix": (
        ("predict_generation.py", "--prefix_path", "lora"),
        "peft_type='LORA' is not 'PREFIX_TUNING'; give it as --lora_path",
    ),
    "a model as an adapter": (
        ("merge_lora.py", "--lora_path", "base", "--output_dir", "new"),
        "is a model, not an adapter",
    ),
    "no adapter": (
        ("export_generation_model.py", "--lora_path", "absent", "--output_path", "new/llama"),
        "is not a directory with an adapter",
    ),
    "an exported prefix": (
        ("export_generation_model.py", "--prefix_path", "prefix", "--output_path", "new/llama"),
        "prefix_path cannot be exported",
    ),
    "a place that is taken": (
        ("merge_lora.py", "--lora_path", "lora", "--output_dir", "base"),
        "is not empty; give a new directory for the merged model",
    ),
    "nowhere to merge": (("merge_lora.py", "--lora_path", "lora"), "--output_dir is needed"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_commands_say_what_is_wrong_in_one_line(run, root, case):
    (script, *words), message = BAD[case]
    words = [word if word.startswith("--") else root / word for word in words]
    said = run(script, "--model_name_or_path", root / "base", *words, status=2)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in said
    assert not (root / "new").exists()


def test_an_adapter_as_a_model(run, root):
    said = run("predict_generation.py", "--model_name_or_path", root / "lora", status=2)
    assert "is an adapter, not a model; give the model that it was trained on" in said
