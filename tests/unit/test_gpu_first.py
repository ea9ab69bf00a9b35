"""What `make gpu-first` runs: commands that the scripts take, and what its table says."""

import json

import pytest

from benchmarks import gpu_first
from common.flags import load
from llm.config.scripts import SCRIPTS

PLACE = {"out": "/tmp/none"}


@pytest.mark.parametrize("step", gpu_first.steps(), ids=lambda step: step.name)
def test_steps_are_commands(step, monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(step.gpus))
    script, *words = [word.format(**PLACE) for word in step.words]
    if script != "-m":
        assert load(SCRIPTS[script], words, prog=script)
        assert words[words.index("--device") + 1] == "gpu"
    known = {other.name for other in gpu_first.steps()}
    assert not step.like or step.like in known


@pytest.mark.parametrize("size", gpu_first.SIZES)
def test_measured_networks_are_set_beside_their_prediction(size, tmp_path):
    for one in gpu_first.SIZES[size]:
        words = one.words(tmp_path)
        load(SCRIPTS["run_pretrain.py"], words, prog="test")
        row = {"loss": 1.0, "tokens_per_second": 1000.0, "mfu": 0.25, "peak_memory_gb": 3.5}
        log = tmp_path / "log" / "train_log.jsonl"
        log.parent.mkdir(exist_ok=True)
        log.write_text("\n".join([json.dumps(row)] * 12), encoding="utf-8")
        gpu, _ = gpu_first.card("NVIDIA H100 80GB HBM3")
        found = gpu_first.measured_row(one, words, log.parent, gpu)
        assert 0 < found["predicted_mfu"] < 1 and found["predicted_gb"] > 0
        line = gpu_first.table([found]).splitlines()[1].split()
        assert line[:2] == [one.shape, "1000"] and line[3] == "25.0%" and line[5] == "3.50"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA H200", "H200"),
        ("Tesla V100-SXM2-32GB", "V100"),
    ],
)
def test_cards_by_their_names(name, known):
    assert gpu_first.card(name)[0].name == known
    assert "unknown" in gpu_first.card("Some GPU")[1]


def test_losses_that_differ_are_a_failure(tmp_path):
    for name, loss in (("a", 1.0), ("b", 1.002), ("c", 1.1)):
        (tmp_path / name).mkdir()
        rows = [json.dumps({"step": step, "loss": loss}) for step in (1, 2)]
        (tmp_path / name / "train_log.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert gpu_first.differs(tmp_path / "b", tmp_path / "a") == ""
    assert "differ by 1.0e-01" in gpu_first.differs(tmp_path / "c", tmp_path / "a")
