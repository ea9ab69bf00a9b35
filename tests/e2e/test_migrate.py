"""What other programs publish for Llama, run to its end on a tiny model: `make migrate`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.tokenizer import load_tokenizer
from llm.llama.adapters.lora import LoRAConfig, add_lora, save_lora
from llm.llama.build import load_model, save_model
from llm.llama.config import TINY_NAME
from tests.e2e import training_process
from tests.unit.config.published_others import OTHERS
from tests.unit.config.published_paddlenlp import PADDLENLP

pytestmark = pytest.mark.long

PUBLISHED = PADDLENLP | OTHERS
# What a processor and a moment allow of each script: half precision and layouts are for GPUs.
_ALONE = (
    "--tensor_parallel_degree 1 --sharding_parallel_degree 1 --data_parallel_degree 1 --device cpu "
    "--bf16 false --threads 1 --max_steps 2 --warmup_steps 0 --warmup_ratio 0 "
    "--gradient_accumulation_steps 1 --per_device_train_batch_size 2 --output_dir {out}"
)
_TEXT = "--tokenizer_name_or_path {model} --split 8,1,1 --data_cache {out}-cache"
SMALL: dict[str, str] = {
    "run_pretrain.py": f"{_ALONE} {_TEXT} --model_name_or_path {{model}} --input_dir {{store}} "
    "--max_seq_length 64",
    "finetune_generation.py": f"{_ALONE} --model_name_or_path {{model}} --src_length 900 "
    "--chat_template alpaca",
    "quantize_generation.py": "--model_name_or_path {model} --output_dir {out} --dataset_path "
    "{data} --calibration_samples 2 --calibration_length 64 --threads 1",
    "predict_generation.py": "--model_name_or_path {model} --prompt Hello --max_length 4",
    "export_generation_model.py": "--model_name_or_path {model} --output_path {out}/inference "
    "--threads 1 --device cpu",
    "infer_generation.py": "--model_name_or_path {program} --prompt Hello --max_length 4",
    "merge_lora.py": "--model_name_or_path {model} --lora_path {lora} --output_dir {out}",
}
_PAIRS = "--train_dataset_path {data}/pairs.jsonl"
_BOTH = f"{_PAIRS} --dev_dataset_path {{data}}/pairs.jsonl --eval_steps 2 --save_steps 2"
# Beside that: what one of them needs.
BESIDE: dict[str, str] = {
    "dpo": _BOTH,
    "dpo_lora": _BOTH,
    "flashmask dpo": _PAIRS,
    "lf lora dpo": "--dataset_path {data}/pairs.jsonl",
    "lf qlora sft": "--dataset_path {data}/train/part.json",
    "pretrain": "--eval_steps 2 --save_steps 2",
    "lf inference": "--lora_path {lora} --chat_template alpaca",
}
_SHORT = (
    "--model_name_or_path {model} --tokenizer_model {model} --data_path {store} --save {out} "
    "--data_cache_path {out}-cache --seq_length 64 --micro_batch_size 2 --global_batch_size 4 "
    "--eval_interval 2 --save_interval 2 --eval_iters 1 --tensorboard_dir {out}-logs --device cpu "
    "--threads 1 --bf16 false --split 8,1,1"
)
# In place of it, in the words of the command line.
INSTEAD: dict[str, str] = {
    "megatron": f"{_SHORT} --train_samples 8 --lr_decay_samples 8 --lr_warmup_samples 0",
    "pai": f"{_SHORT} --train_iters 2 --lr_decay_iters 2 --lr_warmup_iters 0",
    "merge": "--model_name_or_path {model} --lora_path {lora} --output_path {out}",
    "fp8_ptq": "--model_name_or_path {model} --output_dir {out} --threads 1",
}
RUNS = [
    name
    for name, one in PUBLISHED.items()
    if (one.without or not one.refused) and one.script in SMALL
]


@pytest.fixture(scope="module")
def run(repo, trainers):
    """Run a script to its end, as a fork of the rank server."""

    def run(script: str, words: list[str]) -> subprocess.CompletedProcess[str]:
        return training_process.run([sys.executable, script, *words], repo, ranks=trainers)

    return run


@pytest.fixture(scope="module")
def places(repo, run, tmp_path_factory) -> dict[str, Path]:
    """A model, its LoRA and its program, a token store, and data as PaddleNLP's users have it."""
    root = tmp_path_factory.mktemp("migrate")
    data = root / "data"
    for part, count in (("train", 24), ("dev", 4)):
        (data / part).mkdir(parents=True)
        records = [{"src": f"What is {n}?", "tgt": f"{n} is {n}."} for n in range(count)]
        (data / part / "part.json").write_text("\n".join(map(json.dumps, records)))
    pair = {"src": ["What is it?"], "tgt": [], "sort": [0, 1]}
    pairs = [{**pair, "response": ["Nothing.", f"It is {n}."]} for n in range(8)]
    (data / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    model = load_model(TINY_NAME)
    save_model(model, root / "model")
    load_tokenizer(TINY_NAME).save(root / "model")
    add_lora(model, LoRAConfig(r=4), seed=0)
    save_lora(model, root / "lora")
    text = (repo / "README.md").read_text(encoding="utf-8")
    (root / "text.txt").write_text(text)
    (root / "s").mkdir()
    prepared = f"--input {root}/text.txt --tokenizer {root}/model --output_prefix {root}/s/x"
    words = [sys.executable, "-m", "data.prepare", *prepared.split()]
    training_process.run([*words, "--txt_documents", "line"], repo)
    exported = f"--model_name_or_path {root}/model --inference_model --output_path {root}/program"
    run("export_generation_model.py", [*exported.split(), "--threads", "1"])
    names = ("model", "lora", "program", "data")
    return {name: root / name for name in names} | {"store": root / "s"}


@pytest.mark.parametrize("name", RUNS)
def test_it_runs(name, places, run, tmp_path):
    one = PUBLISHED[name]
    out = tmp_path / "out"
    small = INSTEAD.get(name) or f"{SMALL[one.script]} {_beside(name, one.script)}"
    flags: dict[str, list[str]] = {}
    for part in f" {small.format(**places, out=out)}".split(" --")[1:]:
        flag, *values = part.split()
        flags[flag] = values
    kept = _without(one.words(tmp_path, mended=True), flags)
    more = [word for flag, values in flags.items() for word in (f"--{flag}", *values)]
    done = run(one.script, [*kept, *more])
    # Nothing of the merge's settings is without effect: its files are safetensors, as asked.
    assert ("without effect" in done.stderr) == (name != "merge")
    if {"output_dir", "output_path", "save"} & set(flags):
        assert any(out.iterdir())


def _beside(name: str, script: str) -> str:
    """What the script needs beside the small settings."""
    if name in BESIDE:
        return BESIDE[name]
    return "--dataset_path {data}" if script == "finetune_generation.py" else ""


def _without(words: list[str], flags: dict[str, Any]) -> list[str]:
    """The words of a command line without flags that are given anew."""
    kept: list[str] = []
    drops = False
    for word in words:
        if word.startswith("--"):
            drops = word[2:].replace("-", "_") in flags
        if not drops:
            kept.append(word)
    return kept
