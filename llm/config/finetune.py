"""Arguments of finetuning: instruct data, what is trained, and the run itself."""

import math
from dataclasses import dataclass

from common.errors import UserError
from common.flags import arg
from llm.config.training import TrainArguments

DEFAULT_LENGTH = 1024  # of prompts and of answers, as in PaddleNLP
GENERATED_METRICS = ("exact_match", "f1", "rouge1", "rouge2", "rougel", "bleu4")
_MEASURED = ("loss", "perplexity", "accuracy")
_PREFERENCE = ("loss", "rewards_accuracy", "rewards_margin")


@dataclass
class InstructArguments:
    """Where the examples come from and how they become samples."""

    task_name: str | None = arg(
        None, "squad, alpaca, preference or another task; without dataset_path its built-in sample"
    )
    data_name: str | None = arg(None, "built-in data of the task; needs task_name")
    dataset_path: str | None = arg(
        None,
        "directory with train.* and dev.*, one file, or a store of `python -m data.prepare`",
        aliases=("dataset_name_or_path",),
    )
    raw_data: bool | None = arg(
        None,
        "true: tokenize on the fly, false: a prepared store; detected when not given",
        not_with="dpo",
    )
    dev_ratio: float = arg(
        0.0, "share of a single file kept for evaluation, from its end", minimum=0, maximum=0.9
    )
    src_length: int | None = arg(
        None, "longest prompt in tokens; 1024, or a store's own, when not given", minimum=1
    )
    tgt_length: int | None = arg(
        None, "longest answer in tokens; 1024, or a store's own, when not given", minimum=1
    )
    on_long: str = arg(
        "error",
        "longer examples: refuse the run, cut them, or leave them out",
        choices=("error", "truncate", "skip"),
    )
    on_bad_example: str = arg(
        "error",
        "examples or pairs that cannot be used: refuse the run, or leave them out and list them",
        choices=("error", "skip"),
    )
    chat_template: str | None = arg(
        None,
        "llama2, llama3, simple, alpaca, vicuna, chatml, plain, a Jinja file, or a name among the "
        "model's; its default, or plain, when not given. It is saved with the model and serves it",
    )
    packing: bool = arg(
        False,
        "several examples per row, apart from each other; fewer padded positions",
        aliases=("zero_padding",),
        only_with="do_train",
    )
    max_seq_length: int | None = arg(
        None,
        "tokens per packed row; src_length + tgt_length when not given",
        minimum=2,
        only_with=("do_train", "packing"),
    )

    def validate(self) -> None:
        """Refuse data that is named in no way or in two.

        Raises:
            UserError: the message names the flags and the fix.
        """
        if self.task_name is None and self.dataset_path is None:
            raise UserError(
                "no data: give --dataset_path (a file or directory) or --task_name (squad, alpaca, "
                "preference: a small built-in sample)"
            )
        if self.data_name is not None and self.task_name is None:
            raise UserError(f"data_name={self.data_name} needs --task_name, whose data it names")

    @property
    def row_length(self) -> int:
        """Most tokens in a packed row."""
        return self.max_seq_length or (
            (self.src_length or DEFAULT_LENGTH) + (self.tgt_length or DEFAULT_LENGTH)
        )


@dataclass
class AdaptationArguments:
    """What is trained: all weights, LoRA matrices or a prefix; on answers or on preferences."""

    # Untrained adapters measure the base, or nothing.
    lora: bool = arg(
        False,
        "train low-rank matrices beside frozen weights (LoRA)",
        only_with="do_train|lora_path|resume_from_checkpoint",
    )
    lora_rank: int = arg(8, "rank of the matrices", minimum=1, only_with="lora")
    lora_alpha: int | None = arg(
        None, "scale; twice the rank when not given", minimum=1, only_with="lora"
    )
    lora_dropout: float = arg(
        0.0, "dropout before the matrices", minimum=0, maximum=0.99, only_with=("do_train", "lora")
    )
    lora_target_modules: list[str] = arg(
        ["all-linear"],
        "linears to adapt: all-linear, names such as q_proj v_proj, or one regular expression",
        aliases=("target_modules",),
        only_with="lora",
    )
    weight_quantize_algo: str | None = arg(
        None,
        "round the frozen base while it is read: weight_only_int8, one scale per output, or "
        "weight_only_int4, in groups; a quantized model as model_name_or_path needs no flag",
        choices=("weight_only_int8", "weight_only_int4"),
        only_with="lora|prefix_tuning",
        not_with="qat",
    )
    base_dtype: str | None = arg(
        None,
        "type in which frozen weights lie while the run computes in float32; when not given, "
        "float32, and beside integers the type of the files",
        choices=("float32", "bfloat16"),
        spellings={"fp32": "float32", "bf16": "bfloat16"},
        only_with="lora|prefix_tuning",
        not_with="qat",
    )
    rslora: bool = arg(False, "divide alpha by the root of the rank (rsLoRA)", only_with="lora")
    lora_path: str | None = arg(None, "adapter to start from, in PEFT's layout", only_with="lora")
    merge_weights: bool = arg(
        False,
        "write the model with the adapter merged in, to output_dir/merged, too",
        only_with=("do_train", "lora"),
    )
    prefix_tuning: bool = arg(
        False,
        "train keys and values before every sequence",
        only_with="do_train|prefix_path|resume_from_checkpoint",
    )
    num_prefix_tokens: int = arg(128, "length of the prefix", minimum=1, only_with="prefix_tuning")
    prefix_projection: bool = arg(
        False, "make the prefix by a two-layer perceptron", only_with="prefix_tuning"
    )
    prefix_projection_hidden_size: int | None = arg(
        None,
        "its hidden size; the model's when not given",
        minimum=1,
        only_with=("prefix_tuning", "prefix_projection"),
    )
    prefix_path: str | None = arg(
        None, "prefix to start from, in PEFT's layout", only_with="prefix_tuning"
    )
    dpo: bool = arg(False, "direct preference optimization on pairs of answers")
    dpo_beta: float = arg(
        0.1, "how far the policy may leave the reference", minimum=1e-6, only_with="dpo"
    )
    dpo_loss_type: str = arg(
        "sigmoid", "DPO's loss", choices=("sigmoid", "hinge", "ipo"), only_with="dpo"
    )
    dpo_label_smoothing: float = arg(
        0.0,
        "share of pairs taken to be the wrong way round",
        minimum=0,
        maximum=0.49,
        only_with=("dpo", "dpo_loss_type=sigmoid"),
    )

    def validate(self) -> None:
        """Refuse modes that exclude each other.

        Raises:
            UserError: the message names the flags and the fix.
        """
        if self.lora and self.prefix_tuning:
            raise UserError("lora and prefix_tuning are both set; keep one")

    @property
    def mode(self) -> str:
        """``full``, ``lora`` or ``prefix``."""
        return "lora" if self.lora else "prefix" if self.prefix_tuning else "full"


@dataclass
class FinetuneArguments(TrainArguments):
    """Optimisation, precision, logging and checkpoints of one finetuning run."""

    output_dir: str = arg("outputs/finetune", "checkpoints, logs and the loss curve go here")
    num_train_epochs: float = arg(
        3.0,
        "passes over the examples, fractions too",
        minimum=1e-6,
        only_with="do_train",
        not_with="max_steps>0",
    )
    max_steps: int = arg(
        -1, "weight updates, instead of num_train_epochs", minimum=-1, only_with="do_train"
    )
    evaluation_strategy: str = arg(
        "no",
        "with do_eval, during training: every eval_steps, after each epoch, or not",
        choices=("steps", "epoch", "no"),
        aliases=("eval_strategy",),
        only_with=("do_train", "do_eval"),
    )
    save_strategy: str = arg(
        "steps",
        "checkpoints every save_steps, after each epoch, or none",
        choices=("steps", "epoch", "no"),
        only_with="do_train",
    )
    load_best_model_at_end: bool = arg(
        False, "the final model is the best checkpoint", only_with="do_train"
    )
    metric_for_best_model: str = arg(
        "loss",
        "what best means, with or without eval_",
        only_with=("do_train", "load_best_model_at_end"),
    )
    greater_is_better: bool | None = arg(
        None,
        "whether more is better; not for loss and perplexity, yes otherwise, when not given",
        only_with=("do_train", "load_best_model_at_end"),
    )
    eval_with_do_generation: bool = arg(
        False,
        "evaluation also generates answers and scores them: " + ", ".join(GENERATED_METRICS),
        only_with="do_eval",
    )

    def _check_length(self) -> None:
        super()._check_length()
        if not self.load_best_model_at_end:
            return
        if not (self.do_eval and self.evaluation_strategy != "no"):
            raise UserError(
                "load_best_model_at_end compares evaluations during training: set --do_eval and "
                "--evaluation_strategy steps or epoch"
            )
        if self.save_strategy != self.evaluation_strategy:
            raise UserError(
                "load_best_model_at_end needs a checkpoint for each evaluation, but "
                f"evaluation_strategy={self.evaluation_strategy} and "
                f"save_strategy={self.save_strategy}; make them equal"
            )
        interval = self.eval_steps or self.save_steps
        if self.save_strategy == "steps" and self.save_steps % interval:
            raise UserError(
                f"load_best_model_at_end: save_steps={self.save_steps} has to be a multiple of "
                f"eval_steps={interval}, so that each checkpoint was measured"
            )

    def check_metric(self, preference: bool) -> None:
        """Refuse a metric that no evaluation of this run measures.

        Raises:
            UserError: with the names there are.
        """
        known: tuple[str, ...] = _PREFERENCE if preference else _MEASURED
        if self.eval_with_do_generation:
            if preference:
                raise UserError("eval_with_do_generation scores answers; drop it with --dpo")
            known += GENERATED_METRICS
        if self.best_by is not None and self.best_by[0] not in known:
            generated = self.best_by[0] in GENERATED_METRICS
            hint = "; add --eval_with_do_generation true" if generated else ""
            raise UserError(
                f"metric_for_best_model={self.metric_for_best_model} is not measured; there are "
                f"{', '.join(known)}{hint}"
            )

    @property
    def best_by(self) -> tuple[str, bool] | None:
        """The metric by which a best checkpoint is kept, and whether more is better."""
        if not self.load_best_model_at_end:
            return None
        name = self.metric_for_best_model.removeprefix("eval_")
        default = name not in ("loss", "perplexity")
        return name, default if self.greater_is_better is None else self.greater_is_better

    def total_steps(self, num_samples: int) -> int:
        """Return the number of weight updates for that many samples per epoch."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(round(self.num_train_epochs * num_samples, 6) / self.samples_per_step)
