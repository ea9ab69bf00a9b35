"""A finetuning run from end to end, checked and its data opened before paddle is imported."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from common.errors import DataError, UserError
from data.conversations.instruct import OnBad
from data.conversations.instruct_dataset import Limits, OnLong
from data.conversations.instruct_store import is_store, open_instruct
from data.conversations.packing import PackedDataset, Samples, collate
from data.conversations.preference import PreferenceDataset, collate_preference, read_pairs
from data.conversations.tasks import TaskFiles, find_task
from data.order import Passes, keep_back
from data.tokenizer import Tokenizer, load_tokenizer
from llm.config.finetune import (
    DEFAULT_LENGTH,
    AdaptationArguments,
    FinetuneArguments,
    InstructArguments,
)
from llm.config.network import NetworkArguments
from llm.config.precision import refusal
from llm.llama.config import TINY_NAME, LlamaConfig
from llm.parallel.rules import sequence_unit
from llm.planner import Workload
from llm.train import adapter_start, checkpoints, checks, frozen_base
from llm.train.checks import BASE, BASE_WEIGHTS, SAMPLES_PER_STEP, Counts, as_json
from llm.train.frozen_base import FrozenBase
from llm.train.resuming import check_resume

ADAPTER_CONFIG = "adapter_config.json"
_MULTIPLE = 8  # row lengths that matrix units like


@dataclass
class FinetunePlan(checks.Plan):
    """A finetuning run that passed all checks.

    Args:
        run: the flags, without those that the device cannot follow.
        base: model directory or built-in name that training starts from; ``weights`` is None.
        frozen: how the base's weights lie.
        adapter: adapter to go on from.
        parts: the samples of one pass, ``train``, and those to evaluate on, ``eval`` or None.
        preference: samples are pairs of answers.
        referenced: the parts with the reference's scores, once they are known.
        collate: makes a batch.
        epoch_ends: updates that complete a pass.
        seq_length: tokens of an average sample, for figures.
    """

    run: FinetuneArguments = field(default_factory=FinetuneArguments)
    base: str | Path = ""
    frozen: FrozenBase = field(default_factory=FrozenBase)
    adapter: Path | None = None
    parts: dict[str, Samples | None] = field(default_factory=dict)
    preference: bool = False
    referenced: dict[str, Any] = field(default_factory=dict)
    collate: Callable[..., Any] = collate
    epoch_ends: frozenset[int] = frozenset()
    seq_length: int = 1

    @property
    def train(self) -> Samples:
        """The samples of one pass."""
        train = self.parts["train"]
        assert train is not None
        return train

    def use_parts(self, parts: dict[str, Any]) -> None:
        """Take these samples: the train part as a stream of passes, the other as it is."""
        train = None
        if self.run.do_train:
            train = Passes(
                parts["train"],
                self.start.sample_at(self.max_steps, self.run.samples_per_step),
                self.run.seed,
            )
        self.datasets = {"train": train, "eval": parts["eval"], "test": None}

    def use_references(self, parts: dict[str, Any]) -> None:
        """Take pairs that know the reference's scores (:class:`ReferencedPairs`)."""
        self.use_parts(parts)
        self.referenced = parts
        self.collate = parts["train"].collate

    @property
    def token_counts(self) -> Any:
        """Tokens of each sample of a pass, int64 ``[N]``; a pair has two rows."""
        part: Any = self.train
        return part.token_counts if self.preference else part.lengths

    def count(self, start: int, stop: int) -> Counts:
        """Count input tokens and loss weight of the run's samples ``[start, stop)``."""
        stream = self.datasets["train"]
        assert isinstance(stream, Passes)
        indices = [stream.index(place) for place in range(start, stop)]
        tokens = int(self.token_counts[indices].sum())
        # A pair counts once, whatever its length.
        labels = len(indices) if self.preference else self.train.label_counts[indices].sum()
        return Counts(tokens, float(labels))


def plan_finetune(groups: tuple[Any, ...]) -> FinetunePlan:
    """Check a run from end to end and open its data.

    Args:
        groups: instances of the script's row in :data:`llm.config.scripts.SCRIPTS`.

    Raises:
        UserError: the first thing that is wrong, with the fix.
        DataError: examples or a tokenizer that cannot be used.
    """
    network, data, adaptation, qat, run = groups
    checks.check_environment(run)
    run.check_metric(adaptation.dpo)
    if run.do_predict:
        raise UserError("do_predict: finetuning has no test part; run evaluate_generation.py")
    output_dir = Path(run.output_dir)
    resume, messages = checkpoints.find_resume(output_dir, run.resume_from_checkpoint)
    checks.check_output_dir(output_dir, network, run, resume)
    run = _without_half(run, messages)
    adapter_start.check_mode(adaptation, resume)
    adapter = adapter_start.find_adapter(adaptation, resume)
    full_resume = resume if adaptation.mode == "full" else None
    base = _base(network, full_resume)
    config = checks.architecture(network, full_resume)
    plan = FinetunePlan(
        config, None, resume, 0, run=run, base=base, adapter=adapter, messages=messages
    )
    plan.frozen = frozen_base.plan_base(base, adaptation, run, config)
    if adaptation.mode != "full":
        plan.data_state[BASE] = as_json(config)
        _use_base(plan)
    plan.start = checks.data_start(run, resume, messages)
    plan.preference = adaptation.dpo
    plan.tokenizer = tokenizer = _tokenizer(network, data, config, messages)
    _open_data(plan, tokenizer, data, adaptation)
    _check_lengths(plan, adaptation)
    messages += checks.check_layout(run, config, sequence_unit(run.layout))
    _check_whole(run, adaptation, qat.qat)
    checks.check_fp8(run, config)
    if run.do_train:
        trained = adapter_start.trained_weights(adaptation, config, adapter)
        checks.check_training(run, plan.max_steps, plan.frozen.float32_weights(config), trained)
    if resume is not None:
        check_resume(plan, resume, (*groups[:-1], run))
    if run.do_train:
        _predict(plan, network, adaptation, rounds=qat.qat)
    plan.messages.append(_summary(plan))
    return plan


def _use_base(plan: FinetunePlan) -> None:
    """Say how the weights under an adapter lie, and hold a checkpoint to it."""
    frozen = plan.frozen
    if plan.resume is not None:
        stored = checkpoints.read_json(plan.resume.path / checkpoints.LOADER_STATE)
        frozen_base.check_same(frozen, stored, plan.resume.path)
    else:
        frozen_base.check_adapter(frozen, plan.adapter, plan.messages)
    plan.data_state[BASE_WEIGHTS] = frozen.describe()
    if frozen.unusual:
        plan.messages.append(f"the frozen base lies in {frozen.describe()}")


def _most(part: Samples, batch: int, run: FinetuneArguments) -> tuple[int, int]:
    """Return the longest row of a part, padded, and the most labels that a batch can have."""
    unit = math.lcm(_MULTIPLE, sequence_unit(run.layout))
    counts = np.asarray(part.label_counts)
    most = np.partition(counts, len(counts) - min(batch, len(counts)))[-batch:].sum()
    return -(-int(part.lengths.max()) // unit) * unit, int(most)


def _predict(
    plan: FinetunePlan, network: NetworkArguments, adaptation: AdaptationArguments, *, rounds: bool
) -> None:
    """Predict memory as if the longest samples, and those with most labels, met in one batch."""
    run = plan.run
    if rounds or plan.frozen.unusual:
        plan.messages.append("memory is not predicted: the formulas know float32 weights only")
        return
    if adaptation.use_dora or adaptation.pissa or adaptation.modules_to_save:
        plan.messages.append("memory is not predicted: the formulas know plain LoRA only")
        return
    longest, scored = _most(plan.train, run.per_device_train_batch_size, run)
    work = Workload.of(plan.config, network, run, longest, adaptation).replace(scored=scored)
    dev = plan.parts["eval"]
    if dev is not None:
        length, labels = _most(dev, run.per_device_eval_batch_size, run)
        work = work.replace(eval_length=length, eval_scored=labels)
    checks.use_prediction(plan, run, work)


def _without_half(run: FinetuneArguments, messages: list[str]) -> FinetuneArguments:
    """Published command lines say fp16; on a CPU they run all the same, and are told so."""
    why = refusal("training", run.precision, run.device_kind)
    if not why:
        return run
    flag = "bf16" if run.bf16 else "fp16"
    messages.append(f"{flag} is not used: {why}, this run computes in float32")
    default = FinetuneArguments()
    names = ("fp16", "bf16", "fp16_opt_level", "scale_loss", "amp_master_grad")
    return dataclasses.replace(run, **{name: getattr(default, name) for name in names})


def _base(network: NetworkArguments, resume: checkpoints.Checkpoint | None) -> str | Path:
    if resume is not None:
        return resume.path
    name = network.model_name_or_path
    if name is None:
        raise UserError("model_name_or_path is missing: give the directory of the model to tune")
    path = Path(name)
    if name == TINY_NAME:
        return name
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
        raise UserError(
            f"model_name_or_path={name} is an adapter: give its base model there, and the adapter "
            "with --lora_path or --prefix_path"
        )
    if not path.is_dir():
        raise UserError(
            f"model_name_or_path={name} is not a directory: finetuning starts from weights, so "
            f"give a model directory in the Hugging Face layout (or {TINY_NAME} to try things)"
        )
    if not any(path.glob("model*.safetensors")):
        raise UserError(f"model_name_or_path={name} has no model*.safetensors")
    return path


def _tokenizer(
    network: NetworkArguments, data: InstructArguments, config: LlamaConfig, messages: list[str]
) -> Tokenizer:
    name = network.tokenizer_name_or_path or str(network.model_name_or_path)
    template = data.chat_template
    found = checks.check_tokenizer(load_tokenizer(name, chat_template=template), config)
    if found.chat_template is not None:
        return found
    messages.append(
        "the tokenizer has no chat template: training with 'plain', prompt and answer with nothing "
        "between them (--chat_template names another)"
    )
    return checks.check_tokenizer(load_tokenizer(name, chat_template="plain"), config)


def _open_data(
    plan: FinetunePlan,
    tokenizer: Tokenizer,
    data: InstructArguments,
    adaptation: AdaptationArguments,
) -> None:
    run = plan.run
    own_pairs = adaptation.dpo and data.dataset_path is not None and data.task_name is None
    name = "preference" if own_pairs else data.task_name
    task = find_task(name, data.data_name, data.dataset_path, data.dev_dataset_path)
    if task.built_in:
        plan.messages.append(
            f"task_name={data.task_name} without dataset_path: training on the small sample that "
            "comes with the suite; --dataset_path names your own data"
        )
    elif data.task_name is not None and task.format != "preference":
        plan.messages.append(
            f"task_name={data.task_name} has no effect: the data and its format are dataset_path's"
        )
    if (task.format == "preference") != adaptation.dpo:
        raise UserError(
            f"task_name={data.task_name} is for preferences; add --dpo true"
            if not adaptation.dpo
            else "dpo trains on pairs of answers; use --task_name preference"
        )
    parts = _preferences if adaptation.dpo else _examples
    train, dev = parts(plan, tokenizer, data, task)
    if run.do_train and not len(train):
        raise DataError(f"{data.dataset_path or data.task_name}: no example is left to train on")
    if run.do_eval and dev is None:
        raise UserError(
            f"do_eval: {data.dataset_path} has no dev part; put a dev file beside the train file, "
            "or keep a share of it with --dev_ratio 0.1"
        )
    plan.max_steps = run.total_steps(len(train)) if run.do_train else 0
    if run.do_train and run.max_steps <= 0:
        samples = run.num_train_epochs * len(train)
        plan.max_steps = plan.start.step_at(samples, run.samples_per_step)
    plan.parts = {"train": train, "eval": dev if run.do_eval else None}
    plan.use_parts(plan.parts)
    plan.epoch_ends = _epoch_ends(plan, len(train)) if run.do_train else frozenset()
    plan.seq_length = max(int(np.mean(train.lengths)), 1)
    plan.data_state |= {
        "num_samples": len(train),
        "mode": adaptation.mode,
        "seed": run.seed,
        SAMPLES_PER_STEP: run.samples_per_step,
    }


def _epoch_ends(plan: FinetunePlan, num_samples: int) -> frozenset[int]:
    """Return the updates still to come with which a pass over the samples is complete."""
    per_update, start = plan.run.samples_per_step, plan.start
    passes = start.sample_at(plan.max_steps, per_update) // num_samples
    ends = (start.step_at(number * num_samples, per_update) for number in range(1, passes + 1))
    return frozenset(end for end in ends if end > start.step)


def _padding(
    collate: Callable[..., Any], run: FinetuneArguments, tokenizer: Tokenizer
) -> Callable[..., Any]:
    """Pad rows to lengths that the layout can cut."""
    unit = math.lcm(_MULTIPLE, sequence_unit(run.layout))
    return partial(collate, pad_id=tokenizer.pad_id or 0, multiple_of=unit)


def _parts(task: TaskFiles, opened: Callable[[list[Path]], Any], ratio: float) -> tuple[Any, Any]:
    """Open the train and the dev part; the latter may be kept back from the former."""
    train = opened(task.train)
    if task.dev:
        if ratio:
            raise UserError(
                f"dev_ratio={ratio} keeps a share of the train file, but there is a dev file, "
                f"{task.dev[0]}; drop the flag, or give the train file alone as dataset_path"
            )
        return train, opened(task.dev)
    return keep_back(train, ratio) if ratio else (train, None)


def _examples(
    plan: FinetunePlan, tokenizer: Tokenizer, data: InstructArguments, task: TaskFiles
) -> tuple[Any, Any]:
    """Open prompts and answers: samples to train on, and one per example to evaluate on."""

    def opened(paths: list[Path]) -> Any:
        default = None if any(map(is_store, paths)) else DEFAULT_LENGTH
        return open_instruct(
            paths,
            tokenizer,
            raw=data.raw_data,
            format=task.format,
            src_length=data.src_length or default,
            tgt_length=data.tgt_length or (None if data.max_length else default),
            max_length=data.max_length,
            max_samples=data.max_samples,
            on_long=cast(OnLong, data.on_long),
            on_bad=cast(OnBad, data.on_bad_example),
        )

    train, dev = _parts(task, opened, data.dev_ratio)
    plan.collate = _padding(collate, plan.run, tokenizer)
    plan.data_state["data"] = train.fingerprint()
    if not data.packing:
        return train, dev
    packed = PackedDataset(train, data.row_length)
    plan.data_state["row_length"] = data.row_length
    plan.messages.append(
        f"packing: {len(train):,} examples in {len(packed):,} rows, {packed.fill:.1%} full"
    )
    return packed, dev


def _preferences(
    plan: FinetunePlan, tokenizer: Tokenizer, data: InstructArguments, task: TaskFiles
) -> tuple[Any, Any]:
    """Open pairs of answers."""
    answer = data.tgt_length or (None if data.max_length else DEFAULT_LENGTH)
    on_long = cast(OnLong, data.on_long)
    limits = Limits(data.longest_prompt, answer, on_long, data.max_length)
    on_bad = cast(OnBad, data.on_bad_example)

    def opened(paths: list[Path]) -> Any:
        pairs = read_pairs(paths, on_bad=on_bad)[: data.max_samples]
        return PreferenceDataset(pairs, tokenizer, limits=limits, on_bad=on_bad)

    if data.packing:
        raise UserError("packing does not work for pairs of answers; drop it with --dpo")
    if data.raw_data is False:
        raise UserError("raw_data=false: pairs of answers have no prepared store; drop it")
    plan.collate = _padding(collate_preference, plan.run, tokenizer)
    train, dev = _parts(task, opened, data.dev_ratio)
    plan.data_state["data"] = train.fingerprint()
    return train, dev


def _check_lengths(plan: FinetunePlan, adaptation: AdaptationArguments) -> None:
    prefix = adaptation.num_prefix_tokens if adaptation.prefix_tuning else 0
    parts = [part for part in plan.parts.values() if part is not None]
    # The last token of an example is a label and never goes in.
    longest = max(int(part.lengths.max()) for part in parts)
    if longest + prefix > plan.config.context:
        beside = f" and a prefix of {prefix}" if prefix else ""
        raise UserError(
            f"a sample of {longest} tokens{beside} exceeds the model's "
            f"{plan.config.described_context}; lower src_length or tgt_length with --on_long "
            "truncate or skip"
        )


def _check_whole(run: FinetuneArguments, adaptation: AdaptationArguments, qat: bool) -> None:
    """Refuse what needs the whole network, or whole rows, in one process, or plain linears."""
    layout = run.layout
    if run.fp8 and (qat or adaptation.mode != "full"):
        beside = "qat" if qat else adaptation.mode
        raise UserError(f"fp8 trains all weights of a plain network, not {beside}; drop one")
    if qat and layout.tensor > 1:
        raise UserError(
            f"qat rounds whole matrices, of which each process of {layout.describe()} has a part; "
            "use pipeline parallelism and sharding"
        )
    if adaptation.dpo and layout.context > 1:
        raise UserError(
            f"dpo compares whole answers, of which each process of {layout.describe()} has a part; "
            "use tensor or pipeline parallelism and sharding"
        )
    if adaptation.merge_weights and layout.tensor * layout.pipeline > 1:
        raise UserError(
            f"merge_weights needs the whole model in one process, not {layout.describe()}; drop "
            "it and run merge_lora.py on the result"
        )
    if run.eval_with_do_generation and layout.pipeline * layout.context > 1:
        raise UserError(
            f"eval_with_do_generation needs whole layers and sequences in every process, not "
            f"{layout.describe()}; drop it and run evaluate_generation.py on the checkpoints"
        )


def _summary(plan: FinetunePlan) -> str:
    run = plan.run
    tokens, labels = int(plan.token_counts.sum()), int(plan.train.label_counts.sum())
    parts = [
        f"model: {plan.config.num_parameters / 1e6:.2f} million parameters",
        f"data: {len(plan.train):,} samples, {tokens:,} tokens, {labels:,} of them to be learnt",
    ]
    if run.do_train:
        samples = plan.start.sample_at(plan.max_steps, run.samples_per_step)
        parts.append(
            f"run: {plan.max_steps:,} updates of {run.samples_per_step} samples, "
            f"{samples / len(plan.train):.2f} passes"
        )
    return "; ".join(parts)
