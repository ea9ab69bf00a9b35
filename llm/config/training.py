"""Arguments of training: what pretraining and finetuning share, and pretraining's own."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from common.devices import GPU
from common.errors import UserError
from common.flags import arg, meant
from common.foreign import Program
from llm.config import megatron, mindformers, paddlenlp_training
from llm.config.machine import DeviceArguments
from llm.config.parallel import ParallelArguments
from llm.config.precision import check_precision


@dataclass
class DataArguments:
    """Where the training tokens come from and how they become samples."""

    input_dir: list[str] = arg(
        [],
        "token stores: prefixes, or directories of them; 0.3 A 0.7 B are weights, without which "
        "all tokens count alike",
        aliases=("data_path", "train_data_path"),
    )
    valid_data_path: list[str] = arg([], "stores to validate on; input_dir is then not split")
    test_data_path: list[str] = arg([], "stores to test on, likewise")
    data_impl: str = arg(
        "mmap", "how the token store is read; it is always memory-mapped", choices=("mmap",)
    )
    split: str = arg(
        "949,50,1",
        "share of documents for training, validation and test",
        not_with="valid_data_path|test_data_path",
    )
    max_seq_length: int = arg(1024, "tokens per sample", minimum=1)
    data_cache: str | None = arg(
        None, "directory for the sample index; beside the token store when not given"
    )


@dataclass
class TrainArguments(DeviceArguments, ParallelArguments):
    """Optimisation, precision, logging and checkpoints of one training run."""

    output_dir: str = arg("outputs/run", "checkpoints, logs and the loss curve go here")
    overwrite_output_dir: bool = arg(False, "train from scratch although output_dir has contents")
    do_train: bool = arg(False, "train")
    do_eval: bool = arg(False, "evaluate on the validation part")
    do_predict: bool = arg(False, "evaluate on the test part after training")
    seed: int = arg(42, "seeds weights, sample order and dropout", minimum=0)
    per_device_train_batch_size: int = arg(
        8, "samples per step and device", minimum=1, only_with="do_train"
    )
    per_device_eval_batch_size: int = arg(
        8, "samples per evaluation step", minimum=1, only_with="do_eval|do_predict"
    )
    gradient_accumulation_steps: int = arg(
        1, "batches per weight update", minimum=1, only_with="do_train"
    )
    max_steps: int = arg(
        -1, "weight updates; -1 derives them from the data", minimum=-1, only_with="do_train"
    )
    learning_rate: float = arg(5e-5, "peak learning rate", minimum=0, only_with="do_train")
    min_learning_rate: float = arg(
        0.0,
        "where cosine, linear and wsd end",
        minimum=0,
        aliases=("min_lr",),
        only_with=("do_train", "lr_scheduler_type=linear|cosine|wsd"),
    )
    lr_scheduler_type: str = arg(
        "linear",
        "shape of the decay",
        choices=("linear", "cosine", "constant", "wsd"),
        only_with="do_train",
    )
    warmup_ratio: float = arg(
        0.0,
        "share of the steps that warm up",
        minimum=0,
        maximum=1,
        only_with="do_train",
        not_with="warmup_steps>0",
    )
    warmup_steps: int = arg(
        0, "steps that warm up, instead of warmup_ratio", minimum=0, only_with="do_train"
    )
    decay_steps: int | None = arg(
        None,
        "steps of the decay: to the end for cosine and linear, a tenth for wsd",
        minimum=1,
        only_with=("do_train", "lr_scheduler_type=linear|cosine|wsd"),
    )
    weight_decay: float = arg(
        0.0, "decoupled decay, not on norms and biases", minimum=0, only_with="do_train"
    )
    adam_beta1: float = arg(0.9, "first-moment decay", minimum=0, maximum=1, only_with="do_train")
    adam_beta2: float = arg(
        0.999, "second-moment decay", minimum=0, maximum=1, only_with="do_train"
    )
    adam_epsilon: float = arg(1e-8, "denominator's floor", minimum=0, only_with="do_train")
    max_grad_norm: float = arg(
        1.0, "clip the global gradient norm to this; 0 is off", minimum=0, only_with="do_train"
    )
    fp16: bool = arg(False, "train in float16 (GPU)")
    bf16: bool = arg(False, "train in bfloat16 (GPU)")
    fp16_opt_level: str = arg(
        "O1",
        "O1: listed ops in half precision; O2: weights too",
        choices=("O0", "O1", "O2"),
        only_with="fp16|bf16",
    )
    fp8: bool = arg(
        False,
        "decoder layers multiply in float8, a scale for each block (Hopper GPUs)",
        only_with=("do_train", "bf16"),
    )
    scale_loss: float = arg(
        32768.0, "first loss scale of float16 training", minimum=1, only_with=("do_train", "fp16")
    )
    recompute: bool = arg(
        False, "keep no activations inside layers; recompute them backward", only_with="do_train"
    )
    recompute_granularity: str = arg(
        "full",
        "what is recomputed: whole layers, attention with its matrices, or the attention core",
        choices=("full", "full_attn", "core_attn"),
        only_with=("do_train", "recompute"),
    )
    recompute_num_layers: int | None = arg(
        None,
        "recompute the first layers only; all when not given",
        minimum=1,
        only_with=("do_train", "recompute"),
    )
    recompute_offload: bool = arg(
        False,
        "the inputs of recomputed layers lie in host memory until the backward pass",
        only_with=("do_train", "recompute"),
    )
    amp_master_grad: bool = arg(
        False,
        "add gradients up in float32 (bf16 or fp16 with O2)",
        only_with=("do_train", "fp16|bf16", "fp16_opt_level=O2"),
    )
    async_save: bool = arg(
        False, "write checkpoints in a thread while training goes on", only_with="do_train"
    )
    distributed_timeout: int = arg(
        1800, "seconds after which a collective that hangs ends the job", minimum=1
    )
    logging_steps: int = arg(10, "steps between log lines", minimum=1, only_with="do_train")
    logging_first_step: bool = arg(False, "log the first step too", only_with="do_train")
    logging_dir: str | None = arg(
        None,
        "event files; output_dir/runs when not given",
        only_with=("do_train", "report_to=visualdl|tensorboard"),
    )
    evaluation_strategy: str = arg(
        "steps",
        "with do_eval, during training: every eval_steps, or not",
        choices=("steps", "no"),
        only_with=("do_train", "do_eval"),
    )
    eval_steps: int | None = arg(
        None,
        "steps between evaluations; save_steps when not given",
        minimum=1,
        only_with=("do_train", "do_eval", "evaluation_strategy=steps"),
    )
    eval_on_start: bool = arg(
        False,
        "measure the validation part before the first update too",
        only_with=("do_eval", "do_train"),
    )
    max_evaluate_steps: int = arg(
        -1, "batches per evaluation; -1 is all", minimum=-1, only_with="do_eval|do_predict"
    )
    save_strategy: str = arg(
        "steps",
        "checkpoints every save_steps and at the end, or none",
        choices=("steps", "no"),
        only_with="do_train",
    )
    save_steps: int = arg(500, "steps between checkpoints", minimum=1, only_with="do_train")
    save_total_limit: int | None = arg(
        None,
        "how many checkpoints to keep",
        minimum=1,
        only_with="do_train",
        not_with="save_strategy=no",
    )
    resume_from_checkpoint: str | None = arg(
        None, "checkpoint directory, or true for the newest complete one in output_dir"
    )
    ignore_data_skip: bool = arg(
        False,
        "start the data from the beginning on resume",
        only_with=("do_train", "resume_from_checkpoint"),
    )
    dataloader_num_workers: int = arg(0, "processes that load samples", minimum=0)
    report_to: list[str] = arg(
        ["none"],
        "event logs",
        choices=("none", "visualdl", "tensorboard"),
        only_with="do_train",
    )
    disable_tqdm: bool = arg(False, "no progress bar")

    def validate(self) -> None:
        """Refuse combinations that cannot run, before anything is loaded.

        Raises:
            UserError: the message names the flags and the fix.
        """
        super().validate()
        self._check_precision()
        _ = self.layout  # an impossible one raises
        if not (self.do_train or self.do_eval or self.do_predict):
            raise UserError("nothing to do: set --do_train, --do_eval or --do_predict")
        self._check_save_steps()
        if "none" in self.report_to and len(self.report_to) > 1:
            raise UserError(f"report_to={self.report_to}: 'none' excludes the others")
        self._check_length()
        for name in ("adam_beta1", "adam_beta2"):
            if getattr(self, name) == 1:
                raise UserError(f"{name}=1 would never update its moment; it has to be below 1")
        if self.min_learning_rate > self.learning_rate:
            raise UserError(
                f"min_learning_rate={self.min_learning_rate} exceeds "
                f"learning_rate={self.learning_rate}"
            )

    def _check_save_steps(self) -> None:
        """Refuse an interval that neither checkpoints nor evaluations follow."""
        evaluates = self.do_eval and self.evaluation_strategy == "steps" and not self.eval_steps
        if "save_steps" in meant(self) and self.save_strategy != "steps" and not evaluates:
            raise UserError(
                f"save_steps={self.save_steps} would have no effect beside "
                f"save_strategy={self.save_strategy}; drop one of them"
            )

    def _check_precision(self) -> None:
        if self.fp16 and self.bf16:
            raise UserError("fp16 and bf16 are both set; keep one")
        if self.fp8 and self.device_kind != GPU:
            raise UserError(
                f"fp8 multiplies with kernels of NVIDIA's Hopper GPUs, which device={self.device} "
                "is not; drop --fp8"
            )

    def _check_length(self) -> None:
        for name in ("max_steps", "max_evaluate_steps"):
            if getattr(self, name) == 0:
                raise UserError(f"{name}=0: give a positive number, or -1")

    @property
    def precision(self) -> str:
        """Type of the matrix products."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"

    @property
    def weight_type(self) -> str:
        """Type in which the network's weights lie: at O2 that of the products."""
        return self.precision if self.fp16_opt_level == "O2" else "float32"

    @property
    def best_by(self) -> tuple[str, bool] | None:
        """The metric by which a best checkpoint is kept, and whether more is better."""
        return None

    @property
    def samples_per_step(self) -> int:
        """Samples that one weight update consumes."""
        per_rank = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return per_rank * self.layout.data_ranks

    def total_warmup_steps(self, max_steps: int) -> int:
        """Return the warm-up in updates; warmup_steps wins over warmup_ratio."""
        return self.warmup_steps if self.warmup_steps > 0 else int(self.warmup_ratio * max_steps)

    @property
    def total_decay_steps(self) -> int | None:
        """The decay in updates, as decay_steps has it."""
        return self.decay_steps

    def evaluates_at(self, step: int, max_steps: int, epoch_ends: frozenset[int]) -> bool:
        """Whether the validation part is measured after update ``step``."""
        if not self.do_eval:
            return False
        interval = self.eval_steps or self.save_steps
        return _due(self.evaluation_strategy, interval, step, max_steps, epoch_ends)

    def saves_at(self, step: int, max_steps: int, epoch_ends: frozenset[int]) -> bool:
        """Whether a checkpoint is written after update ``step``."""
        return _due(self.save_strategy, self.save_steps, step, max_steps, epoch_ends)


def _due(
    strategy: str, interval: int, step: int, max_steps: int, epoch_ends: frozenset[int]
) -> bool:
    """Whether something happens after update ``step``; the last update always counts."""
    if strategy == "no":
        return False
    regular = step in epoch_ends if strategy == "epoch" else step % interval == 0
    return regular or step >= max_steps


@dataclass
class PretrainArguments(TrainArguments):
    """Optimisation, precision, logging and checkpoints of one pretraining run."""

    NOT_WITH: ClassVar[dict[str, tuple[str, ...]]] = {
        "warmup_steps": ("warmup_tokens",),
        "warmup_ratio": ("warmup_tokens",),
        "decay_steps": ("decay_tokens",),
    }
    FOREIGN: ClassVar[tuple[Program, ...]] = (
        paddlenlp_training.PRETRAIN,
        megatron.PRETRAIN,
        mindformers.PRETRAIN,
    )

    output_dir: str = arg("outputs/pretrain", "checkpoints, logs and the loss curve go here")
    max_steps: int = arg(
        -1, "weight updates; -1 derives them from train_tokens", minimum=-1, only_with="do_train"
    )
    train_tokens: int | None = arg(
        None, "token budget, instead of max_steps", minimum=1, only_with="do_train"
    )
    warmup_tokens: int | None = arg(
        None,
        "warm-up in tokens, instead of warmup_steps and warmup_ratio",
        minimum=1,
        only_with="do_train",
    )
    decay_tokens: int | None = arg(
        None,
        "decay in tokens, instead of decay_steps",
        minimum=1,
        only_with=("do_train", "lr_scheduler_type=linear|cosine|wsd"),
    )

    def _check_precision(self) -> None:
        super()._check_precision()
        flag = "bf16" if self.bf16 else "fp16"
        check_precision("training", self.precision, self.device_kind, flag=flag)

    def _check_length(self) -> None:
        if self.max_steps > 0 and self.train_tokens is not None:
            raise UserError("max_steps and train_tokens are both set; keep one")
        if self.do_train and self.max_steps <= 0 and self.train_tokens is None:
            raise UserError("training needs --max_steps or --train_tokens")
        super()._check_length()

    def total_steps(self, seq_length: int) -> int:
        """Return the number of weight updates: max_steps, or what train_tokens pays for."""
        if self.train_tokens is None:
            return max(self.max_steps, 0)
        return math.ceil(self.train_tokens / (self.samples_per_step * seq_length))

    def count_tokens(self, per_update: int, steps_at: Callable[[int], int]) -> None:
        """Learn what an update takes, which makes steps of the budgets in tokens.

        Args:
            per_update: tokens.
            steps_at: the update with which a run has taken so many tokens.
        """
        if self.warmup_tokens is not None:
            self._warmup = max(steps_at(self.warmup_tokens), 0)
        if self.decay_tokens is not None:  # of wsd a length, of others the place where they end
            length, end = math.ceil(self.decay_tokens / per_update), steps_at(self.decay_tokens)
            self._decay = length if self.lr_scheduler_type == "wsd" else max(end, 1)

    def total_warmup_steps(self, max_steps: int) -> int:
        """Return the warm-up in updates, of whichever flag sets it."""
        if self.warmup_tokens is None:
            return super().total_warmup_steps(max_steps)
        return self._warmup

    @property
    def total_decay_steps(self) -> int | None:
        """The decay in updates, of whichever flag sets it."""
        return self.decay_steps if self.decay_tokens is None else self._decay
