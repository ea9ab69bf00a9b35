"""Whether a checkpoint is of this run's data and model, and what is not as it was."""

import dataclasses
import math
from typing import Any

from common.errors import UserError
from common.flags import read_config_file
from llm.config.training import PretrainArguments, TrainArguments
from llm.train import checkpoints
from llm.train.adapter_start import SETTLED
from llm.train.checkpoints import Checkpoint, order_fingerprint
from llm.train.checks import (
    BASE,
    BASE_WEIGHTS,
    BEGINNING,
    BEGINS,
    LAID_OUT,
    SAMPLES_PER_STEP,
    Plan,
    check_same_model,
)
from llm.train.schedules import rate_of

# Of the data's state: what may differ, or is checked by itself.
_FREE = frozenset({SAMPLES_PER_STEP, LAID_OUT, BASE, BASE_WEIGHTS, BEGINS})
# And what may differ only where a run that has ended goes on with other data.
OF_STORES = frozenset({"num_documents", "num_tokens", "store", "weights", "split"})
OTHER_DATA = "a run that has ended may go on with other data, where max_steps is raised too"
_JUMP = 1.05
# Settings that may differ when a run goes on, without a word: they change no number.
_SILENT = BEGINNING | {
    "output_dir",
    "logging_dir",
    "disable_tqdm",
    "report_to",
    "data_cache",
}


def check_resume(plan: Plan, resume: Checkpoint, groups: tuple[Any, ...]) -> None:
    """Refuse a checkpoint of other data or another model; say which settings changed."""
    run: TrainArguments = groups[-1]
    if run.do_train and resume.step > plan.max_steps:
        raise UserError(
            f"{resume.path} has done {resume.step} steps already, max_steps is {plan.max_steps}"
        )
    stored = checkpoints.read_json(resume.path / checkpoints.LOADER_STATE)
    if BASE in stored:
        name = groups[0].model_name_or_path
        check_same_model(resume, stored[BASE], plan.config, name)
    if run.do_train and not run.ignore_data_skip:
        _check_same_data(plan, resume, stored)
    before = read_config_file(resume.path / checkpoints.RESOLVED_CONFIG)
    now = {f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group)}
    changed = [
        f"{name} {before[name]!r} -> {value!r}"
        for name, value in now.items()
        if name in before
        and name not in _SILENT | SETTLED
        and before[name] not in (value, *_alone(value))
    ]
    if run.fp16 and before.get("fp16") and before["scale_loss"] != run.scale_loss:
        raise UserError(
            f"scale_loss={run.scale_loss} is the first loss scale of a run; {resume.path} began "
            f"with {before['scale_loss']} and goes on with its own: give that, or leave it out"
        )
    plan.messages.append(f"resuming {resume.path} after step {resume.step}")
    if changed and run.do_train:
        plan.messages.append("settings changed since the checkpoint: " + ", ".join(changed))
    if run.do_train:
        length = now.get("max_seq_length") or 0
        per_update = int(stored.get(SAMPLES_PER_STEP, run.samples_per_step)) * length
        plan.messages += _rate_changes(plan, resume, before, run, per_update)


def _alone(value: Any) -> list[Any]:
    """What an earlier version wrote for a list of one."""
    return list(value) if isinstance(value, list) and len(value) == 1 else []


def _rate_changes(
    plan: Plan, resume: Checkpoint, before: dict[str, Any], run: TrainArguments, per_update: int
) -> list[str]:
    """Say where the learning rate of the next update is not what the checkpoint's run had.

    ``per_update`` are the tokens of an update there.
    """
    if resume.step >= plan.max_steps:
        return []
    length = int(checkpoints.read_json(resume.path / checkpoints.TRAINER_STATE)["max_steps"])
    names = [field.name for field in dataclasses.fields(run)]
    there = type(run)(**{name: before.get(name, getattr(run, name)) for name in names})
    if isinstance(there, PretrainArguments):
        there.count_tokens(per_update, lambda tokens: math.ceil(tokens / per_update))
    old = rate_of(there, length)(resume.step)
    new = rate_of(run, plan.max_steps)(resume.step)
    if math.isclose(old, new):
        return []
    said = (
        f"the learning rate changes here: update {resume.step + 1} takes {new:.3g}, on a "
        f"{run.lr_scheduler_type} schedule over {plan.max_steps} updates, where the checkpoint's, "
        f"{there.lr_scheduler_type} over {length}, had {old:.3g}"
    )
    if new > _JUMP * old and resume.step >= there.total_warmup_steps(length):
        less = (
            f"--lr_scheduler_type constant --learning_rate {old:.3g} goes on without"
            if old
            else "a lower --learning_rate makes it smaller"
        )
        said += f": a jump up, after which the loss rises for a while; {less}"
    return [said]


def _check_same_data(plan: Plan, resume: Checkpoint, stored: dict[str, Any]) -> None:
    escape = "restore it, or start the data over with --ignore_data_skip true"
    free = _FREE | OF_STORES if plan.new_data else _FREE
    for name, value in plan.data_state.items():
        if stored.get(name) != value and name not in free:
            other = f"; {OTHER_DATA}" if name in OF_STORES else ""
            raise UserError(
                f"cannot continue {resume.path} exactly: {name} was {stored.get(name)}, now it is "
                f"{value}; {escape}{other}"
            )
    if plan.new_data:
        return
    consumed, train = int(stored["consumed_samples"]), plan.datasets["train"]
    assert train is not None
    if order_fingerprint(train, consumed) != stored["order"]:
        raise UserError(
            f"cannot continue {resume.path} exactly: the samples come in another order than before "
            f"(another store, or a checkpoint of an earlier version); {escape}"
        )
