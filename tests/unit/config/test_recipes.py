"""Recipes for many GPUs, and the scripts that start them: each is parsed by what will read it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.flags import load
from llm.config.scripts import SCRIPTS
from llm.llama.config import PRESETS
from llm.planner import predict
from llm.planner.__main__ import PRETRAIN, Recipe, read_recipe

REPO = Path(__file__).resolve().parents[3]
CONFIGS = REPO / "configs"
LAUNCH_LINES = sorted((REPO / "scripts").glob("*.sh"))

# recipe: shape, GPUs, (tensor, pipeline, sharding, sharding stage)
LAYOUTS = {
    "pretrain_llama_7b_tp4pp2_gpu": ("llama-7b", 8, (4, 2, 1, 0)),
    "pretrain_llama2_7b_8gpu": ("llama-2-7b", 8, (2, 1, 4, 1)),
    "pretrain_llama2_13b_16gpu": ("llama-2-13b", 16, (2, 2, 4, 1)),
    "pretrain_llama2_70b_64gpu": ("llama-2-70b", 64, (4, 8, 2, 1)),
    "finetune_llama3.1_70b_lora_tp2pp2_gpu": ("llama-3.1-70b", 4, (2, 2, 1, 0)),
    "pretrain_tiny_tp2pp2_cpu": ("tiny-random-llama", 4, (2, 2, 1, 0)),
}
# PaddleNLP's run_trainer_tp4pp2.sh, in which --sharding stage1 meets no second replica.
ORIGINAL = {
    "model_name_or_path": "facebook/llama-7b",
    "split": "949,50,1",
    "max_seq_length": 2048,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "per_device_eval_batch_size": 4,
    "use_flash_attention": True,
    "use_fused_rms_norm": False,
    "fp16": True,
    "fp16_opt_level": "O2",
    "scale_loss": 512,
    "tensor_parallel_degree": 4,
    "pipeline_parallel_degree": 2,
    "virtual_pp_degree": 1,
    "sequence_parallel": False,
    "sharding": "stage1",
    "learning_rate": 1e-5,
    "min_learning_rate": 1e-6,
    "max_steps": 10000,
    "save_steps": 5000,
    "weight_decay": 0.01,
    "warmup_ratio": 0.01,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "dataloader_num_workers": 1,
    "eval_steps": 1000,
    "report_to": ["visualdl"],
    "disable_tqdm": True,
    "recompute": False,
    "recompute_granularity": "full",
    "do_train": True,
    "do_eval": True,
    "device": "gpu",
}


def recipe(name: str) -> Recipe:
    """Read a recipe; a model directory that it names is replaced by the shape of that name."""
    path = CONFIGS / f"{name}.yaml"
    named = re.search(r"^model_name_or_path: (\S+)$", path.read_text(), re.M)[1]
    return read_recipe([str(path), "--model_name_or_path", named.rsplit("/", 1)[-1]])


def test_every_recipe_for_several_processes_is_listed():
    several = set()
    for path in CONFIGS.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        if re.search(r"_parallel_degree: [^1-]", text):
            several.add(path.stem)
    assert several == set(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_what_they_are_called(name):
    shape, gpus, degrees = LAYOUTS[name]
    found = recipe(name)
    layout = found.layout
    assert found.shape == PRESETS[shape]
    assert layout.world_size == gpus
    degree = (layout.tensor, layout.pipeline, layout.sharding, layout.sharding_stage)
    assert degree == degrees


@pytest.mark.parametrize("name", LAYOUTS)
def test_scripts_accept_the_recipe(name, monkeypatch):
    """The training script's own checks of arguments, as a process of the launched job runs them."""
    kind = "finetune_generation.py" if name.startswith("finetune") else "run_pretrain.py"
    path = str(CONFIGS / f"{name}.yaml")
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(LAYOUTS[name][1]))
    run = load(SCRIPTS[kind], [path], prog=kind)[-1]
    assert run.layout == recipe(name).layout
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(LAYOUTS[name][1] - 1))
    with pytest.raises(ValueError, match=f"launched: {LAYOUTS[name][1] - 1}|does not make up"):
        load(SCRIPTS[kind], [path], prog=kind)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "cpu" not in name])
def test_recipes_fit_gpus_of_80_gb(name):
    found = recipe(name)
    assert predict(found.shape, found.layout, found.work).fits(80e9)


def test_tp4pp2_is_the_originals(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "8")
    path = CONFIGS / "pretrain_llama_7b_tp4pp2_gpu.yaml"
    groups = load(PRETRAIN, [str(path)], prog="run_pretrain.py")
    values = {name: getattr(g, name) for g in groups for name in ORIGINAL if hasattr(g, name)}
    assert values == ORIGINAL


def launch_line(script: Path) -> list[str]:
    """Return the words of a script's last command, with variables replaced."""
    text = script.read_text(encoding="utf-8").replace("\\\n", " ")
    line = text.strip().splitlines()[-1]
    for name, value in {"$MASTER": "10.0.0.1:8090", "$NODE_RANK": "1", '"$@"': ""}.items():
        line = line.replace(name, value)
    assert "$" not in line, line
    return shlex.split(line)


def launcher_arguments(words: list[str]):
    """Return what paddle's launcher makes of its words."""
    from paddle.distributed.launch.context.args_envs import parse_args

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["launch", *words])
        known, unknown = parse_args()
    assert not unknown, unknown
    return known


@pytest.mark.parametrize("script", LAUNCH_LINES, ids=lambda path: path.stem)
def test_launch_lines(script):
    words = launch_line(script)
    assert words[:4] == ["python", "-u", "-m", "paddle.distributed.launch"]
    known = launcher_arguments(words[4:])
    config, *rest = known.training_script_args
    assert not rest and (REPO / config).is_file() and known.training_script in SCRIPTS
    devices = known.devices.split(",") if known.devices else [""] * known.nproc_per_node
    assert len(devices) * int(known.nnodes) == LAYOUTS[Path(config).stem][1]
    assert (int(known.nnodes) > 1) == (known.master is not None) == (known.rank == 1)
    assert "finetune" in known.training_script or not Path(config).stem.startswith("finetune")


def test_every_recipe_has_a_script():
    started = {Path(launch_line(script)[-1]).stem for script in LAUNCH_LINES}
    assert started == set(LAYOUTS)


@pytest.mark.parametrize("script", LAUNCH_LINES, ids=lambda path: path.stem)
def test_scripts_are_programs(script):
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("no bash")
    done = subprocess.run([shell, "-n", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", [s for s in LAUNCH_LINES if "$MASTER" in s.read_text()])
def test_several_machines_need_an_address(script):
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        [str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "set MASTER=address:port" in done.stderr
