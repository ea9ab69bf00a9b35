"""From a recipe, the file that a training script takes, to what the planner computes with."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm.config import finetune
from llm.config.loader import arg, load, read_config_file
from llm.config.training import DataArguments, ModelArguments, PretrainArguments
from llm.errors import UserError
from llm.llama.config import LlamaConfig, load_config
from llm.parallel.layout import Layout
from llm.parallel.plan.hardware import DEVICES
from llm.parallel.plan.workload import Workload
from llm.parallel.rules import check_shape, resolve

PRETRAIN = (ModelArguments, DataArguments, PretrainArguments)
_PROG = "python -m llm.parallel.plan"
_DESCRIPTION = (
    "Predict memory, communication and time of a recipe, and propose layouts that fit. The recipe "
    "is the file that run_pretrain.py or finetune_generation.py takes; their flags override it."
)


@dataclass
class PlanArguments:
    """The machines to plan for, and how much to print."""

    gpu: str = arg("H100", "device", choices=tuple(DEVICES))
    gpu_memory: float | None = arg(
        None, "GB of memory of a GPU; the device's own when not given", minimum=0.001
    )
    gpus: int | None = arg(
        None, "GPUs; what the recipe's degrees multiply to when not given", minimum=1
    )
    gpus_per_node: int = arg(8, "GPUs of a machine", minimum=1)
    num_proposals: int = arg(10, "layouts to show", minimum=0)
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
        device: cpu or gpu.
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


def _names(groups: Sequence[type]) -> set[str]:
    return {
        name
        for group in groups
        for field in dataclasses.fields(group)
        for name in (field.name, *field.metadata.get("aliases", ()))
    }


def _groups(words: Sequence[str]) -> Sequence[type]:
    """Return the groups of the script that a recipe is for."""
    given = {word[2:].partition("=")[0].replace("-", "_") for word in words if word[:2] == "--"}
    if words and words[0].endswith((".yaml", ".yml", ".json")):
        given |= set(read_config_file(words[0]))
    own = given - _names((PlanArguments,))
    finetunes = own <= _names(finetune.GROUPS) and not own <= _names(PRETRAIN)
    return finetune.GROUPS if finetunes else PRETRAIN


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
    if data.packing:
        return int(data.row_length)
    default = finetune.DEFAULT_LENGTH
    return int((data.src_length or default) + (data.tgt_length or default))


def read_recipe(words: Sequence[str]) -> Recipe:
    """Read a recipe and flags.

    Raises:
        UserError: what the training script would refuse of the layout, or unknown names.
    """
    kinds = _groups(words)
    plan, *groups = load(
        (PlanArguments, *map(_unchecked, kinds)), words, prog=_PROG, description=_DESCRIPTION
    )
    model, run = groups[0], groups[-1]
    if model.model_name_or_path is None:
        raise UserError("model_name_or_path is missing: name a built-in shape or a model directory")
    shape = load_config(model.model_name_or_path)
    layout = resolve(run, plan.gpus or world_of(run))
    length = _row_length(groups)
    adaptation = groups[2] if kinds is finetune.GROUPS else None
    work = Workload.of(model, run, length, adaptation)
    check_shape(layout, shape, seq_length=length, micro_batches=work.accumulation)
    return Recipe(plan, shape, layout, work, run.offload_mode, run.device)
