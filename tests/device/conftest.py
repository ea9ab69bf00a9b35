"""Fixtures of tests on the rehearsal device: functions and scripts in forks, in either role."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.corpus.token_store_writer import TokenStoreWriter
from tests.device import build, rehearsal
from tests.device.forks import TRAINING, Device

TINY = "__internal_testing__/tiny-random-llama"
# What --device says in each role.
DEVICES = {"gpu": "gpu", "itself": rehearsal.TYPE}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """End ``make rehearse-all`` with a table: a row for what each function of tests shows."""
    if not os.environ.get("RUN_LONG"):
        return
    found: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: dict[str, float] = defaultdict(float)
    for kind in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(kind, []):
            shown = report.nodeid.removeprefix("tests/device/test_").partition("[")[0]
            shown = shown.replace(".py::test_", ": ").replace("_", " ")
            found[shown]["failed" if kind == "error" else kind] += 1
            seconds[shown] += report.duration
    columns = ("passed", "failed", "skipped")
    width = max(map(len, found), default=0)
    terminalreporter.write_sep("=", "what was rehearsed")
    heads = "".join(f"{name:>9}" for name in (*columns, "seconds"))
    terminalreporter.write_line(f"{'':{width}}{heads}")
    for shown, row in found.items():
        counts = "".join(f"{row[name] or '-':>9}" for name in columns)
        line = f"{shown:{width}}{counts}{seconds[shown]:9.0f}"
        terminalreporter.write_line(line, red=bool(row["failed"]))


@pytest.fixture(scope="session")
def device() -> Iterator[Device]:
    """The rehearsal device; tests skip where it is not built."""
    if not build.is_current():
        pytest.skip("the rehearsal device is not built from these sources: `make device`")
    made = Device()
    yield made
    made.close()


@pytest.fixture(scope="session")
def training_device(device: Device) -> Device:
    """The device, with the slow imports of training done."""
    device.server.preload(*TRAINING)
    return device


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Args:
        output: its directory.
        rows: what it logged at each step, without the timings.
    """

    output: Path
    rows: list[dict[str, float]]

    def __getitem__(self, name: str) -> list[float]:
        """Return a figure of all steps."""
        return [row[name] for row in self.rows]


def ended(output: Path) -> Run:
    """Read what a training run in a directory has logged."""
    names = ("step", "loss", "learning_rate", "grad_norm", "consumed_samples")
    lines = (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return Run(output, [{name: row[name] for name in names} for row in rows if "loss" in row])


def words_of(flags: dict[str, Any]) -> list[str]:
    """Return flags by name as words of a command line."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random documents over a small vocabulary."""
    prefix = tmp_path_factory.mktemp("store") / "corpus"
    random = np.random.default_rng(5)
    with TokenStoreWriter(prefix, "uint16", vocab_size=256) as writer:
        for _ in range(60):
            writer.add_document(random.integers(0, 256, random.integers(5, 60)))
    return prefix


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without weights; heads of 8, which FlashAttention takes."""
    directory = tmp_path_factory.mktemp("model")
    shape = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    (directory / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def pretrain(
    training_device: Device, store: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    """``pretrain(ranks=1, before=None, role="gpu", **flags)``: three updates of four rows."""

    def run(ranks: int = 1, before: str | None = None, role: str = "gpu", **flags: Any) -> Run:
        output = tmp_path_factory.mktemp("run")
        usual = {
            "model_type": "llama",
            "model_name_or_path": model,
            "input_dir": store,
            "output_dir": output,
            "max_seq_length": 16,
            "split": "949,50,1",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2 // ranks,
            "learning_rate": 0.01,
            "weight_decay": 0.1,
            "max_steps": 3,
            "logging_steps": 1,
            "use_flash_attention": 1,
            "use_fused_rms_norm": 1,
            "save_strategy": "no",
            "do_train": 1,
            "report_to": "none",
            "disable_tqdm": "true",
            "device": DEVICES[role],
        }
        line = words_of(usual | flags)
        training_device.script(role, "run_pretrain", line, ranks, before, timeout=100)
        return ended(output)

    return run


@pytest.fixture(scope="session")
def float32(pretrain: Callable[..., Run]) -> Run:
    """What one GPU gives in float32."""
    return pretrain()


@pytest.fixture(scope="session")
def finetune(
    training_device: Device, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    """``finetune(role="gpu", **flags)``: three updates of the built-in tiny model on questions."""

    def run(role: str = "gpu", **flags: Any) -> Run:
        output = tmp_path_factory.mktemp("finetuned")
        usual = {
            "model_name_or_path": TINY,
            "task_name": "squad",
            "output_dir": output,
            "src_length": 40,
            "tgt_length": 12,
            "on_long": "truncate",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 0.001,
            "max_steps": 3,
            "logging_steps": 1,
            "use_flash_attention": 1,
            "save_strategy": "no",
            "do_train": 1,
            "report_to": "none",
            "disable_tqdm": "true",
            "device": DEVICES[role],
        }
        line = words_of(usual | flags)
        training_device.script(role, "finetune_generation", line, timeout=100)
        return ended(output)

    return run
