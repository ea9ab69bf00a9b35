"""What docs/parallel.md shows is what the planner says, what was measured, and what is there."""

import json
import re
import shlex
from pathlib import Path

import pytest

from llm.llama.config import PRESETS
from llm.parallel.layout import Layout
from llm.planner import Workload, predict
from llm.planner.__main__ import FINETUNE, PRETRAIN, PlanArguments, read_recipe
from llm.planner.workload import DEVICES, hardware
from tests.page_commands import bash_commands
from tests.unit.config.test_recipes import LAYOUTS, launch_line, launcher_arguments

REPO = Path(__file__).resolve().parents[3]
GUIDE = REPO / "docs" / "parallel.md"
TEXT = GUIDE.read_text(encoding="utf-8")
# Rows of 4096 tokens and 128 of them in an update: NVIDIA's runs.
PUBLISHED = {
    "Llama 2 7B": ("llama-2-7b", Layout(sharding=8, sharding_stage=1), 16),
    "Llama 2 13B": (
        "llama-2-13b",
        Layout(pipeline=4, virtual_pipeline=10, sharding=4, sharding_stage=1),
        32,
    ),
    "Llama 2 70B": (
        "llama-2-70b",
        Layout(
            tensor=4,
            pipeline=4,
            virtual_pipeline=20,
            sharding=4,
            sharding_stage=1,
            sequence_parallel=True,
        ),
        32,
    ),
}


def table(heading: str) -> list[list[str]]:
    """Return the rows of the table whose first heading is this one and that has the second."""
    lines = TEXT.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(heading))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def in_gb(amount: float) -> str:
    return f"{amount / 1e9:.1f}"


def test_published_runs_of_paddlenlp():
    for model, gigabytes, published, speed, published_speed, words in table("| model | predicted"):
        recipe = read_recipe(
            [str(REPO / "configs/pretrain_llama2_7b_8gpu.yaml"), *shlex.split(words.strip("`"))]
        )
        assert recipe.shape == PRESETS[model.lower().replace(" ", "-")]
        device = hardware(recipe.plan.gpu)
        found = predict(recipe.shape, recipe.layout, recipe.work, device)
        assert gigabytes == in_gb(found.bytes_per_rank)
        assert speed == f"{found.tokens_per_second:,.0f}"
        # Close enough to rank layouts by; the guide says why memory is lower.
        assert float(published) * 0.75 < float(gigabytes) < float(published) * 1.1
        measured = float(published_speed.replace(",", ""))
        assert found.tokens_per_second == pytest.approx(measured, rel=0.15)
    assert in_gb(52092 * 2**20) == "54.6" and in_gb(64294 * 2**20) == "67.4"


def test_published_layouts_of_nvidia():
    rows = table("| model | GPUs |")
    assert [row[0] for row in rows] == list(PUBLISHED)
    for model, gpus, layout, gigabytes, speed, _ in rows:
        name, degrees, accumulation = PUBLISHED[model]
        assert layout == degrees.describe() and int(gpus) == degrees.world_size
        work = Workload(1, accumulation, 4096, "bfloat16", flash=True, fused_norm=True)
        found = predict(PRESETS[name], degrees, work, hardware("H100"))
        assert found.tokens_per_step == 128 * 4096 and found.fits(80e9)
        assert gigabytes == in_gb(found.bytes_per_rank)
        assert speed == f"{found.tokens_per_second:,.0f}"


def test_measured_table_is_a_row_of_the_benchmark():
    shown = {name: cells for name, *cells in table("| layout | predicted")}
    results = (REPO / "benchmarks/results/memory.jsonl").read_text(encoding="utf-8")
    kept = []
    for line in results.splitlines():
        cases = {}
        for result in json.loads(line)["results"]:
            worst = max(result["ranks"], key=lambda row: row["allocated"])
            figures = [worst[name] / 1e6 for name in ("predicted", "allocated", "resident")]
            cases[result["case"]] = [*(f"{f:.1f}" for f in figures), f"{result['error']:+.1%}"]
        kept.append(cases)
    assert shown in kept
    assert all(abs(float(cells[-1].rstrip("%"))) <= 10 for cells in shown.values())


def test_scripts_table():
    rows = table("| script | recipe |")
    assert len(rows) == len(LAYOUTS)
    for script, recipe, gpus, _ in rows:
        path = recipe.strip("`")
        assert launch_line(REPO / script.strip("`"))[-1] == path
        assert int(gpus.split()[0]) == LAYOUTS[Path(path).stem][1]


@pytest.mark.parametrize("words", bash_commands(GUIDE), ids=" ".join)
def test_commands(words, monkeypatch):
    monkeypatch.chdir(REPO)
    rest = words[words.index("-m") + 2 :]
    if words[words.index("-m") + 1] == "llm.planner":
        assert read_recipe(rest).layout.world_size > 1
        return
    known = launcher_arguments(rest)
    config = known.training_script_args[0]
    devices = known.devices.split(",") if known.devices else [""] * known.nproc_per_node
    assert len(devices) * int(known.nnodes) == LAYOUTS[Path(config).stem][1]


def test_flags_exist():
    known = {"--gpus", "--rank", "--keep", "--shapes", "--master", "--nnodes"}
    for group in (PlanArguments, *PRETRAIN, *FINETUNE):
        for name, field in group.__dataclass_fields__.items():
            known |= {f"--{n}" for n in (name, *field.metadata.get("aliases", ()))}
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S)
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_]+", prose))
    assert flags and flags <= known, flags - known


def test_devices_are_listed():
    listed = re.search(r"another device \(([^)]+)\)", TEXT)[1]
    assert set(listed.split(", ")) == set(DEVICES)
