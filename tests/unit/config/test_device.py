"""--device auto: decided once, before paddle is imported, and then recorded as what it was."""

import importlib.metadata
from pathlib import Path

import pytest
import yaml

from common.errors import UserError
from common.flags import load, save_resolved
from llm.config.finetune import FinetuneArguments
from llm.config.training import PretrainArguments

WORDS = ("--do_train", "--max_steps", "1")


@pytest.fixture
def gpu_machine(monkeypatch):
    """Show a GPU wheel and a driver's device file."""
    version, exists = importlib.metadata.version, Path.exists
    wheel = "paddlepaddle-gpu"
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "3.0" if name == wheel else version(name)
    )
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidiactl" or exists(path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def cpu_machine(monkeypatch):
    """Hide every GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(params=[PretrainArguments, FinetuneArguments])
def run(request):
    """Read the flags of one script's runs."""
    return lambda *words: load([request.param], [*WORDS, *words], prog="test")[0]


def test_a_gpu_is_taken_where_there_is_one(run, gpu_machine):
    assert run().device == run("--device", "auto").device == run("--device", "gpu").device == "gpu"
    assert run("--device", "cpu").device == "cpu"
    assert run("--bf16").bf16  # asked about a GPU, not about auto


def test_elsewhere_auto_is_the_cpu(run, cpu_machine):
    assert run().device == run("--device", "auto").device == run("--device", "cpu").device == "cpu"
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        load([PretrainArguments], [*WORDS, "--fp16"], prog="test")


def test_what_is_recorded_is_a_device(run, gpu_machine, tmp_path):
    save_resolved([run()], tmp_path / "run_config.yaml")
    assert yaml.safe_load((tmp_path / "run_config.yaml").read_text("utf-8"))["device"] == "gpu"
