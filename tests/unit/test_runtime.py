"""Process settings before paddle is imported."""

import os
import runpy
import subprocess
import sys

import pytest

from llm import runtime

NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
SCRIPT = f"""
import os
from llm import runtime
runtime.prepare(3)
print([os.environ.get(name) for name in {NAMES}])
"""


@pytest.mark.parametrize(
    ("exported", "expected"),
    [
        ({}, ["3", "3", "PASSIVE", "1"]),
        ({"KMP_BLOCKTIME": "7"}, ["3", "3", "PASSIVE", "7"]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ["3", "3", "ACTIVE", None]),
    ],
    ids=str,
)
def test_how_idle_threads_wait_unless_exported(repo, exported, expected):
    environment = {k: v for k, v in os.environ.items() if k not in NAMES} | exported
    command = [sys.executable, "-c", SCRIPT]
    found = subprocess.run(
        command, cwd=repo, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    assert found.stdout.strip() == str(expected)


DETERMINISTIC = ("FLAGS_cudnn_deterministic", "FLAGS_embedding_deterministic")


@pytest.mark.parametrize(
    ("words", "exported", "expected"),
    [
        ("device='gpu', deterministic=True", {}, ["1", "1"]),
        ("device='gpu', deterministic=True", {"FLAGS_cudnn_deterministic": "0"}, ["0", "1"]),
        ("device='gpu'", {}, [None, None]),
        ("device='cpu', deterministic=True", {}, [None, None]),
    ],
)
def test_training_on_a_gpu_adds_up_in_one_order_unless_exported(repo, words, exported, expected):
    script = f"""
import os
from llm import runtime
runtime.prepare(1, {words})
print([os.environ.get(name) for name in {DETERMINISTIC}])
"""
    environment = {k: v for k, v in os.environ.items() if k not in DETERMINISTIC} | exported
    command = [sys.executable, "-c", script]
    found = subprocess.run(
        command, cwd=repo, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    assert found.stdout.strip() == str(expected)


@pytest.mark.parametrize("script", ["run_pretrain.py", "finetune_generation.py"])
def test_scripts_that_train_ask_for_that(repo, script, monkeypatch):
    """Before Paddle is loaded, which reads its flags then."""
    asked = {}

    class AskedError(Exception):
        """Ends the script where the settings are made."""

    def prepare(threads, device, **options):
        asked.update(options, device=device)
        raise AskedError

    monkeypatch.setattr(runtime, "prepare", prepare)
    monkeypatch.chdir(repo)
    words = ["--do_train", "true", "--max_steps", "1", "--device", "gpu", "--task_name", "squad"]
    monkeypatch.setattr(sys, "argv", [script, *words[: 6 if script == "run_pretrain.py" else 8]])
    with pytest.raises(AskedError):
        runpy.run_path(str(repo / script))["main"]()
    assert asked == {"deterministic": True, "device": "gpu"}
