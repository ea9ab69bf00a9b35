"""Plan a run: python -m llm.parallel.plan CONFIG.yaml [--gpu A100] [--gpu_memory 80] [--gpus N]."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from llm.config.loader import run_script
from llm.errors import UserError
from llm.files import replacing
from llm.parallel.plan import report
from llm.parallel.plan.hardware import Hardware, hardware
from llm.parallel.plan.prediction import OUTSIDE, Prediction, needs_offload, predict
from llm.parallel.plan.recipe import Recipe, read_recipe
from llm.parallel.plan.search import propose


def _record(found: Prediction) -> dict[str, Any]:
    """Return a prediction as JSON values."""
    return {
        "layout": dataclasses.asdict(found.layout),
        "workload": dataclasses.asdict(found.work),
        "bytes_per_rank": found.bytes_per_rank,
        "stages": [dataclasses.asdict(memory) for memory in found.stages],
        "bubble": found.bubble,
        "communication": found.communication(),
        "flops_per_rank": found.flops_per_rank(),
        "seconds": None if found.seconds is None else dataclasses.asdict(found.seconds),
        "tokens_per_second_and_rank": found.tokens_per_second,
    }


def _write(path: Path, asked: Prediction, others: list[Prediction]) -> None:
    content = {"asked": _record(asked), "proposed": [_record(one) for one in others]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _too_large(found: Prediction, device_bytes: float) -> str:
    name, size = next(iter(found.worst.parts().items()))
    needed = found.bytes_per_rank + OUTSIDE
    return (
        f"this does not fit: a rank takes {report.gigabytes(needed)} GB, "
        f"{report.gigabytes(OUTSIDE)} GB of it outside paddle's allocator, of "
        f"{report.gigabytes(device_bytes)} GB; the largest part: {name}, "
        f"{report.gigabytes(size)} GB"
    )


def _asked(recipe: Recipe, device: Hardware | None, device_bytes: float) -> Prediction:
    """Predict the recipe itself; with offload_optim auto, offloaded where that makes it fit."""
    per_machine = recipe.plan.gpus_per_node
    found = predict(recipe.shape, recipe.layout, recipe.work, device, per_machine)
    if needs_offload(recipe.offload_mode, found, device_bytes) and not recipe.work.offload:
        work = recipe.work.replace(offload=True)
        found = predict(recipe.shape, recipe.layout, work, device, per_machine)
    return found


def _plan_gpus(recipe: Recipe) -> None:
    """Print what a recipe takes on GPUs and what fits; refuse what does not."""
    plan, device = recipe.plan, hardware(recipe.plan.gpu)
    device_bytes = device.memory if plan.gpu_memory is None else plan.gpu_memory * 1e9
    asked = _asked(recipe, device, device_bytes)
    fitting = propose(
        recipe.shape,
        recipe.layout,
        recipe.work,
        device,
        device_bytes=device_bytes,
        per_machine=plan.gpus_per_node,
    )
    shown = fitting[: plan.num_proposals]
    pages = [report.summary(asked), report.timing(asked, device, device_bytes)]
    if shown:
        pages += [
            f"\nlayouts that fit, the fastest {len(shown)} of {len(fitting)}:\n",
            report.proposals(shown, device),
            f"\nthe first one's flags: {report.flags(shown[0])}",
        ]
    print("\n".join(pages))
    if plan.plan_file is not None:
        _write(Path(plan.plan_file), asked, shown)
    if not asked.fits(device_bytes):
        advice = (
            "choose one of the layouts above"
            if fitting
            else "no layout of these GPUs fits: take more of them, or shorter sequences"
        )
        raise UserError(f"{_too_large(asked, device_bytes)}; {advice}")


def main() -> None:
    """Read a recipe, print what it takes and what fits; refuse what does not."""
    recipe = read_recipe(sys.argv[1:])
    if recipe.device == "gpu":
        _plan_gpus(recipe)
        return
    asked = _asked(recipe, None, float("inf"))
    everything = asked.bytes_per_rank * recipe.layout.world_size
    print(
        f"{report.summary(asked)}\na rehearsal on CPUs: at most {report.gigabytes(everything)} GB "
        "for all processes, and no time is predicted"
    )
    if recipe.plan.plan_file is not None:
        _write(Path(recipe.plan.plan_file), asked, [])


if __name__ == "__main__":
    run_script(main)
