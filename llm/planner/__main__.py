"""Plan a run: python -m llm.planner CONFIG.yaml [--gpu A100] [--gpu_memory 80] [--gpus N]."""

from common.ending import run_script  # isort: split

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.devices import AUTO, CPU, GPU, kind_of
from common.errors import UserError
from common.files import check_target, write_whole
from common.flags import arg, load, unknown_names
from llm.config.scripts import SCRIPTS
from llm.config.training import DataArguments
from llm.llama.config import LlamaConfig, load_config
from llm.parallel.layout import Layout
from llm.parallel.rules import check_shape, resolve
from llm.planner import report
from llm.planner.prediction import OUTSIDE, Prediction, needs_offload, predict, propose
from llm.planner.workload import DEVICES, Hardware, Workload, hardware

PRETRAIN, FINETUNE = SCRIPTS["run_pretrain.py"], SCRIPTS["finetune_generation.py"]
_PROG = "python -m llm.planner"
_DESCRIPTION = (
    "Predict memory, communication and time of a recipe, and propose layouts that fit. The recipe "
    "is the file that run_pretrain.py or finetune_generation.py takes; their flags override it."
)


@dataclass
class PlanArguments:
    """The machines to plan for, and how much to print."""

    gpu: str = arg("H100", "device", choices=tuple(DEVICES), only_with="device=gpu")
    gpu_memory: float | None = arg(
        None,
        "GB of memory of a GPU; the device's own when not given",
        minimum=0.001,
        only_with="device=gpu",
    )
    gpus: int | None = arg(
        None, "GPUs; what the recipe's degrees multiply to when not given", minimum=1
    )
    gpus_per_node: int = arg(8, "GPUs of a machine", minimum=1, only_with="device=gpu")
    num_proposals: int = arg(10, "layouts to show", minimum=0, only_with="device=gpu")
    plan_file: str | None = arg(None, "write the plan as JSON, too")


@dataclass(frozen=True)
class Recipe:
    """What a recipe says.

    Args:
        plan: the planner's own flags.
        shape: the network.
        layout: degrees of parallelism.
        work: what a rank computes.
        offload_mode: where the optimizer's state lies: off, static or auto.
        device: its kind.
    """

    plan: PlanArguments
    shape: LlamaConfig
    layout: Layout
    work: Workload
    offload_mode: str
    device: str


def _unchecked(group: type) -> type:
    """Return a group whose values are not validated: they are for other processes than this."""
    made: type = dataclasses.make_dataclass(
        group.__name__, [], bases=(group,), namespace={"validate": lambda self: None}
    )
    made.__doc__ = group.__doc__
    return made


def script_of(words: Sequence[str]) -> Sequence[type]:
    """Return the groups of the script that a recipe is for."""
    others = unknown_names((PlanArguments, *PRETRAIN), words)
    finetunes = others and not unknown_names((PlanArguments, *FINETUNE), words)
    return FINETUNE if finetunes else PRETRAIN


def world_of(run: Any) -> int:
    """Return the processes that a run's degrees multiply to, counting what is not given as one."""
    names = (
        "tensor_parallel_degree",
        "pipeline_parallel_degree",
        "context_parallel_degree",
        "sep_parallel_degree",
        "sharding_parallel_degree",
        "data_parallel_degree",
    )
    world = 1
    for name in names:
        world *= max(getattr(run, name), 1)
    return world


def _row_length(groups: Sequence[Any]) -> int:
    """Return the longest row of a batch in tokens."""
    data = groups[1]
    if isinstance(data, DataArguments):
        return data.max_seq_length
    return int(data.row_length if data.packing else data.longest)


def read_recipe(words: Sequence[str]) -> Recipe:
    """Read a recipe and flags.

    Raises:
        UserError: what the training script would refuse of the layout, or unknown names.
    """
    kinds = script_of(words)
    if not any(word.partition("=")[0].replace("-", "_") == "__do_train" for word in words):
        words = [*words, "--do_train"]  # a recipe that only evaluates is planned as one that trains
    plan, *groups = load(
        (PlanArguments, *map(_unchecked, kinds)), words, prog=_PROG, description=_DESCRIPTION
    )
    model, run = groups[0], groups[-1]
    if model.model_name_or_path is None:
        raise UserError("model_name_or_path is missing: name a built-in shape or a model directory")
    shape = load_config(model.model_name_or_path)
    layout = resolve(run, plan.gpus or world_of(run))
    length = _row_length(groups)
    adaptation = groups[2] if kinds is FINETUNE else None
    work = Workload.of(shape, model, run, length, adaptation)
    check_shape(layout, shape, seq_length=length, micro_batches=work.accumulation)
    return Recipe(plan, shape, layout, work, run.offload_mode, kind_of(run.device))


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


def _write(path: str, asked: Prediction, others: list[Prediction]) -> None:
    content = {"asked": _record(asked), "proposed": [_record(one) for one in others]}
    write_whole(path, json.dumps(content, indent=1) + "\n")


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
        _write(plan.plan_file, asked, shown)
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
    if recipe.plan.plan_file is not None:
        check_target(recipe.plan.plan_file, "plan_file")
    if recipe.device == GPU:
        _plan_gpus(recipe)
        return
    asked = _asked(recipe, None, float("inf"))
    everything = asked.bytes_per_rank * recipe.layout.world_size
    on = (
        f"a rehearsal on CPUs: at most {report.gigabytes(everything)} GB for all processes"
        if recipe.device in (CPU, AUTO)
        else f"on {recipe.device}: at most {report.gigabytes(asked.bytes_per_rank)} GB a device"
    )
    print(f"{report.summary(asked)}\n{on}, and no time is predicted")
    if recipe.plan.plan_file is not None:
        _write(recipe.plan.plan_file, asked, [])


if __name__ == "__main__":
    run_script(main)
