"""--device auto: decided once, before paddle is imported, and then recorded as what it was."""

import importlib.metadata
from pathlib import Path

import pytest
import yaml

from common.devices import KINDS, how_to_get
from common.errors import UserError
from common.flags import load, save_resolved
from llm import runtime
from llm.config.finetune import FinetuneArguments
from llm.config.machine import DeviceArguments
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


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.nodes])
def test_auto_is_whatever_has_wheel_and_driver(run, monkeypatch, kind):
    version, exists = importlib.metadata.version, Path.exists
    own = KINDS[kind]
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "3.3" if name == own.wheel else version(name)
    )
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == own.nodes[0] or exists(path))
    assert run().device == kind
    monkeypatch.setenv(own.hides, "")
    assert run().device == "cpu"


@pytest.mark.parametrize("device", ["gpu:1", "npu", "npu:7", "iluvatar_gpu:0", "unheard_of", "dcu"])
def test_a_kind_or_a_card_of_any_kind_is_taken(run, device):
    found = run("--device", device)
    assert (found.device, found.device_kind) == (device, device.partition(":")[0])


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("gpu:", "device='gpu:' is not a device; write a kind such as cpu, gpu or npu"),
        ("gpu:x", "is not a device"),
        ("gpu:-1", "is not a device"),
        ("GPU", "is not a device"),
        ("cpu:0", "device='cpu:0': cpu has no numbers; write --device cpu"),
        ("auto:1", "auto has no numbers"),
        ("cuda", "device='cuda' is called 'gpu' here; --device gpu"),
        ("ascend:3", "is called 'npu:3' here; --device npu:3"),
    ],
)
def test_other_words_are_refused_with_the_right_one(run, device, said):
    with pytest.raises(UserError) as refused:
        run("--device", device)
    assert said in str(refused.value)


def test_a_card_beside_a_launcher_that_chooses_cards(run, monkeypatch):
    monkeypatch.setenv("FLAGS_selected_npus", "1")
    assert run("--device", "npu:1").device == "npu:1"
    with pytest.raises(UserError, match="device=npu:0, but the launcher gave this process card 1"):
        run("--device", "npu:0")
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    for device in ("npu:1", "npu:0"):
        with pytest.raises(UserError, match="names one card, but 2 processes were launched"):
            run("--device", device)
    words = ["--device", "npu", "--data_parallel_degree", "2"]
    assert run(*words).device == "npu"


def test_cards_of_the_launcher_where_there_are_none(monkeypatch):
    monkeypatch.setattr(runtime, "resolve_device", lambda device: "cpu")
    monkeypatch.setenv("FLAGS_selected_gpus", "1")
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    with pytest.raises(UserError, match=r"gpu 1 \(--gpus\).* --nproc_per_node 2 in the place of"):
        load((DeviceArguments,), [], prog="x")
    (asked,) = load((DeviceArguments,), ["--device", "cpu"], prog="x")
    assert asked.device == "cpu"


def test_every_kind_says_what_to_install():
    for name, kind in KINDS.items():
        said = how_to_get(name, ["cpu"])
        assert f"make setup DEVICE={name}" in said and kind.install in said
        assert kind.is_plugin == ("beside it" in said)


def test_what_is_recorded_is_a_device(run, gpu_machine, tmp_path):
    save_resolved([run()], tmp_path / "run_config.yaml")
    assert yaml.safe_load((tmp_path / "run_config.yaml").read_text("utf-8"))["device"] == "gpu"
