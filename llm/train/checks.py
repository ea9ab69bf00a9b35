"""What pretraining and finetuning check before paddle is imported, and what a checked run is.

:mod:`llm.train.pretrain_plan` and :mod:`llm.train.finetune_plan` call these functions in this
order, add what is their own, and return a :class:`Plan`.
"""

import dataclasses
import importlib.util
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from common.devices import CPU
from common.errors import UserError
from common.files import check_directory, holds_something
from common.flags import save_resolved
from common.gguf import gguf_file
from data.tokenizer import Tokenizer, check_vocabulary, has_vocabulary, load_tokenizer
from llm.config.network import NetworkArguments
from llm.config.training import TrainArguments
from llm.llama.config import LlamaConfig, load_config
from llm.parallel.layout import Layout
from llm.parallel.rules import check_micro_batches, check_shape, parse_options
from llm.parallel.topology import Topology
from llm.planner import Prediction, Workload, predict
from llm.train import checkpoints
from llm.train.checkpoints import Checkpoint, Place, Samples
from llm.train.logs import logger
from llm.train.schedules import rate_of

SAMPLES_PER_STEP = "samples_per_step"  # of the data's state; a part of it that may change
LAID_OUT = "samples_laid_out"  # of the data's state; grows where a run is made longer
BASE = "base_model"  # of the data's state: the architecture that an adapter is trained on
FP8_BLOCK = 128  # external_ops.fp8 has it too, but imports paddle
BASE_WEIGHTS = "base_weights"  # and how its weights lie
BEGINS = "data_begins"  # of the data's state: where a longer run took up other data
# How a process begins, not what is trained.
BEGINNING = frozenset({"resume_from_checkpoint", "overwrite_output_dir", "ignore_data_skip"})


class Counts(NamedTuple):
    """What some samples hold: input tokens, and the weight of their loss in labels or pairs."""

    tokens: int
    weight: float


@dataclass
class Plan:
    """A run that passed all checks.

    Args:
        config: the architecture.
        weights: model directory to start from; None starts from random weights.
        resume: checkpoint to continue.
        max_steps: updates in the whole run.
        datasets: ``train``, ``eval`` and ``test``; None where not asked for.
        tokenizer: saved beside the model; None when there is none.
        data_state: identifies the data in checkpoints.
        messages: what the user should read before the run starts.
        start: where the run is in its samples.
        new_data: the run is made longer, on other data than the checkpoint's.
        prediction: of memory; None when nothing is trained.
    """

    config: LlamaConfig
    weights: Path | None
    resume: Checkpoint | None
    max_steps: int
    datasets: dict[str, Samples | None] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    data_state: dict[str, Any] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    start: Place = field(default_factory=Place)
    new_data: bool = False
    prediction: Prediction | None = None

    @property
    def samples(self) -> dict[str, Any]:
        """What a trainer's task has to know of the data."""
        return {"datasets": self.datasets, "data_state": self.data_state, "start": self.start}


def check_environment(run: TrainArguments) -> None:
    """Refuse event logs whose package is missing."""
    for kind, package in (("visualdl", "visualdl"), ("tensorboard", "tensorboardX")):
        if kind in run.report_to and importlib.util.find_spec(package) is None:
            raise UserError(
                f"report_to={kind} needs a package that is not installed: pip install {package}"
            )


def check_output_dir(
    output_dir: Path, model: NetworkArguments, run: TrainArguments, resume: Checkpoint | None
) -> None:
    """Refuse a directory that cannot be written, or holds another run."""
    check_directory(output_dir, "output_dir")
    if not run.do_train or _continues(output_dir, resume):
        return
    if run.overwrite_output_dir:
        source = resume.path if resume is not None else Path(model.model_name_or_path or "")
        inside = source.resolve().is_relative_to(output_dir.resolve())
        if source != Path() and source.is_dir() and inside:
            raise UserError(
                f"overwrite_output_dir would delete the model to start from: {source} lies in "
                f"output_dir={output_dir}; choose another output_dir"
            )
    elif holds_something(output_dir):
        complete, problems = checkpoints.find_checkpoints(output_dir)
        go_on = "continue with --resume_from_checkpoint true, " if complete else ""
        found = "".join(f" ({problem})" for problem in problems)
        raise UserError(
            f"output_dir={output_dir} is not empty{found}; {go_on}"
            "start over with --overwrite_output_dir true, or choose another directory"
        )


def _continues(output_dir: Path, resume: Checkpoint | None) -> bool:
    """Whether the checkpoint to resume is one of this output directory."""
    return resume is not None and resume.path.resolve().parent == output_dir.resolve()


def architecture(model: NetworkArguments, resume: Checkpoint | None) -> LlamaConfig:
    """Return the shape of the network; it has to be that of the checkpoint to resume."""
    name = model.model_name_or_path
    if resume is None and name is None:
        raise UserError(
            "model_name_or_path is missing: give a model directory, or a built-in shape such as "
            "meta-llama/Llama-3.2-1B or __internal_testing__/tiny-random-llama"
        )
    asked = None if name is None else load_config(name)
    config = load_config(resume.path) if resume is not None else asked
    assert config is not None
    if resume is not None and asked is not None:
        check_same_model(resume, as_json(config), asked, name)
    return config


def as_json(config: LlamaConfig) -> dict[str, Any]:
    """Return an architecture as a state file holds it."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return found


def check_same_model(
    resume: Checkpoint, there: dict[str, Any], asked: LlamaConfig, name: str | None
) -> None:
    here = as_json(asked)
    changed = [
        f"{k}: {there.get(k)} there, {here[k]} here" for k in here if here[k] != there.get(k)
    ]
    if changed:
        raise UserError(
            f"{resume.path} holds another model than model_name_or_path={name} "
            f"({'; '.join(changed)}); resume with the same model"
        )


def data_start(run: TrainArguments, resume: Checkpoint | None, messages: list[str]) -> Place:
    """Return where a run is in its samples.

    A checkpoint counts samples, not updates, so a run with more or fewer data ranks, or another
    batch, takes up the next sample; that changes what the run computes, and the user is told.
    """
    if resume is None or not run.do_train:
        return Place()
    if run.ignore_data_skip:
        return Place(resume.step, 0)
    stored = checkpoints.read_json(resume.path / checkpoints.LOADER_STATE)
    consumed, before = int(stored["consumed_samples"]), stored.get(SAMPLES_PER_STEP)
    if before != run.samples_per_step:
        messages.append(
            f"an update took {before} samples, now it takes {run.samples_per_step}: going on at "
            f"sample {consumed:,}, none twice and none left out; the learning rate goes on by "
            f"updates. For the same updates set per_device_train_batch_size x "
            f"gradient_accumulation_steps x {run.layout.data_ranks} data ranks to {before}"
        )
    return Place(resume.step, consumed)


def check_layout(run: TrainArguments, config: LlamaConfig, seq_length: int) -> list[str]:
    """Refuse a layout that the network or its batches cannot be cut into.

    Args:
        run: the flags.
        config: the architecture.
        seq_length: tokens of a row.

    Returns:
        What the user should read before the run starts.

    Raises:
        UserError: names the flag, the rule and the nearest value that fits.
    """
    layout = run.layout
    batches = run.gradient_accumulation_steps
    check_shape(layout, config, seq_length=seq_length, micro_batches=batches)
    options, messages = parse_options(run.pipeline_parallel_config)
    check_micro_batches(layout, batches, options)
    layers = config.num_hidden_layers
    if run.recompute_num_layers is not None and run.recompute_num_layers > layers:
        raise UserError(
            f"recompute_num_layers={run.recompute_num_layers} exceeds the model's {layers} layers; "
            "leave it out to recompute all"
        )
    if run.pipeline_parallel_config and layout.pipeline == 1:
        messages.append("pipeline_parallel_config is not used: pipeline_parallel_degree is 1")
    if run.sharding and layout.sharding == 1:
        messages.append(f"sharding={run.sharding} is not used: there is one process to shard over")
    if run.overlap_communication:
        messages += _about_overlap(run, layout)
    if layout.world_size > 1:
        messages.append(
            f"layout: {layout.describe()}, {layout.data_ranks} x {run.per_device_train_batch_size} "
            f"samples in each of {batches} micro-batches"
        )
    if layout.pipeline > 1:
        messages.append(
            f"pipeline: stages wait {layout.bubble(batches):.0%} of the time; more "
            "gradient_accumulation_steps or virtual_pp_degree lower that"
        )
    return messages


def _about_overlap(run: TrainArguments, layout: Layout) -> list[str]:
    """Return what overlap does not do in a run."""
    if layout.data_ranks * layout.context == 1 and run.offload_mode == "off":
        return [
            "overlap_communication is not used: no process sees other tokens, and nothing is "
            "offloaded"
        ]
    if run.device == CPU:
        return [
            "overlap_communication: on a CPU each sum and copy ends where it begins; the order and "
            "the numbers are those of a GPU, and nothing is faster"
        ]
    return []


def check_fp8(run: TrainArguments, config: LlamaConfig) -> None:
    """Refuse float8 products of matrices that cannot be cut into whole blocks.

    Raises:
        UserError: names the flag or the size.
    """
    if not run.fp8:
        return
    if run.layout.tensor > 1:
        raise UserError(
            f"fp8 multiplies whole matrices, of which each process of {run.layout.describe()} has "
            "a part; use pipeline parallelism and sharding, or drop --fp8"
        )
    sizes = {
        "hidden_size": config.hidden_size,
        "num_attention_heads x head_dim": config.num_attention_heads * config.head_dim,
        "num_key_value_heads x head_dim": config.num_key_value_heads * config.head_dim,
        "intermediate_size": config.intermediate_size,
    }
    for name, size in sizes.items():
        if size % FP8_BLOCK:
            raise UserError(
                f"fp8 multiplies blocks of {FP8_BLOCK} x {FP8_BLOCK}, and the model's {name} is "
                f"{size}; drop --fp8, or take a model whose sizes are multiples of {FP8_BLOCK}"
            )


def bytes_per_process(layout: Layout, weights: int, trained: int) -> float:
    """Return what float32 weights, gradients and moments take in each process.

    Args:
        layout: the degrees.
        weights: parameters of the network.
        trained: those that have gradients and moments.
    """
    model = layout.tensor * layout.pipeline
    held = [layout.sharding if layout.sharding_stage >= stage else 1 for stage in (3, 2, 1)]
    return (4 * weights / held[0] + 4 * trained / held[1] + 8 * trained / held[2]) / model


def machine_bytes() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_training(run: TrainArguments, max_steps: int, weights: int, trained: int) -> None:
    """Refuse a schedule that does not fit the run, and a run that does not fit the machine.

    Args:
        run: the flags.
        max_steps: updates in the whole run.
        weights: parameters of the network.
        trained: those that have gradients and moments.
    """
    rate_of(run, max_steps)
    if run.device == CPU:
        local = int(os.environ.get("PADDLE_LOCAL_SIZE", "1"))
        memory = local * bytes_per_process(run.layout, weights, trained)
        available = machine_bytes()
        if memory > available:
            raise UserError(
                f"training needs {memory / 1e9:.0f} GB for weights, gradients and moments alone; "
                f"this machine has {available / 1e9:.0f} GB. Choose a smaller model_name_or_path"
            )


def model_tokenizer(
    model: NetworkArguments, resume: Checkpoint | None, config: LlamaConfig, messages: list[str]
) -> Tokenizer | None:
    """Load the named tokenizer, or else the one that lies in the model's directory."""
    name = model.tokenizer_name_or_path
    if name is None:
        named = [Path(model.model_name_or_path)] if model.model_name_or_path is not None else []
        places = [*named, resume.path] if resume is not None else named
        found = [p for p in places if has_vocabulary(p) or gguf_file(p) is not None]
        if not found:
            messages.append("no tokenizer_name_or_path: saved models will hold none")
            return None
        name = str(found[0])
    return check_tokenizer(load_tokenizer(name), config)


def check_tokenizer(tokenizer: Tokenizer, config: LlamaConfig) -> Tokenizer:
    """Return the tokenizer, unless it makes ids that the model has no embedding for."""
    check_vocabulary(tokenizer, config.vocab_size)
    return tokenizer


def save_settings(groups: tuple[Any, ...], directory: Path) -> None:
    """Write a run's flags, but for those that say how it began: the file begins a run anew."""
    save_resolved(groups, directory / checkpoints.RESOLVED_CONFIG, leave_out=BEGINNING)


def use_prediction(plan: Plan, run: TrainArguments, work: Workload) -> None:
    """Predict a run's memory, and say so."""
    plan.prediction = predict(plan.config, run.layout, work)
    plan.messages.append(plan.prediction.describe())


def claim_output_dir(run: TrainArguments, plan: Plan, topology: Topology) -> None:
    """Make the first change on disk: create the output directory, and clear what is left there.

    One process of a job does it, while the others wait.
    """
    if topology.rank == 0:
        _claim(run, plan)
    topology.barrier()


def _claim(run: TrainArguments, plan: Plan) -> None:
    output_dir = Path(run.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if run.do_train and run.overwrite_output_dir and not _continues(output_dir, plan.resume):
        checkpoints.clear_run(output_dir)
    if run.do_train:
        # It will be made again; what is there belongs to another adapter.
        shutil.rmtree(output_dir / checkpoints.MERGED, ignore_errors=True)
        for message in checkpoints.sweep(output_dir):
            logger.info("%s", message)
