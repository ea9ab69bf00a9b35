"""Arguments of finetuning: instruct data, what is trained, and the run itself."""

import math
from dataclasses import dataclass
from typing import ClassVar

from common.errors import UserError
from common.flags import arg, meant
from common.foreign import Program
from llm.config import llama_factory, mindformers, paddlenlp_training
from llm.config.training import TrainArguments

DEFAULT_LENGTH = 1024  # of prompts and of answers, as in PaddleNLP
DEFAULT_NOISE = 5.0  # alpha of NEFTune, as in PaddleNLP and the paper's first table
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
        aliases=("dataset_name_or_path", "train_dataset_path"),
    )
    dev_dataset_path: str | None = arg(
        None,
        "file to evaluate on, instead of a dev file beside dataset_path's",
        only_with=("dataset_path", "do_eval"),
    )
    max_samples: int | None = arg(
        None,
        "examples to use, the first of the train and of the dev part; all when not given",
        minimum=1,
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
    max_length: int | None = arg(
        None,
        "longest example in tokens, prompt and answer together, instead of tgt_length; also of a "
        "packed row",
        minimum=2,
        not_with="tgt_length",
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
        "tokens per packed row; max_length, or src_length + tgt_length, when not given",
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
        if self.max_length is not None and self.max_length <= self.longest_prompt:
            raise UserError(
                f"max_length={self.max_length} leaves no room for answers to prompts of "
                f"src_length={self.longest_prompt}; raise it, or lower src_length"
            )

    @property
    def longest_prompt(self) -> int:
        """Most tokens of a prompt, where no store has its own."""
        return self.src_length or DEFAULT_LENGTH

    @property
    def longest_answer(self) -> int:
        """Most tokens of an answer, where no store has its own."""
        if self.max_length is not None:
            return self.max_length - 1
        return self.tgt_length or DEFAULT_LENGTH

    @property
    def longest(self) -> int:
        """Most tokens of an example, where no store has its own."""
        return self.max_length or self.longest_prompt + self.longest_answer

    @property
    def row_length(self) -> int:
        """Most tokens in a packed row."""
        return self.max_seq_length or self.longest


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
        None,
        "scale; twice the rank, with pissa the rank, when not given",
        minimum=1,
        only_with="lora",
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
    use_dora: bool = arg(
        False,
        "learn the length of each output's weights, too (DoRA)",
        aliases=("dora",),
        only_with="lora",
    )
    pissa: bool = arg(
        False,
        "start the matrices as the principal part of their weight, which then trains (PiSSA)",
        aliases=("pissa_init",),
        only_with="lora",
    )
    pissa_iter: int = arg(
        16,
        "iterations that find that part; -1 computes all singular values, which takes long",
        minimum=-1,
        only_with=("lora", "pissa"),
    )
    lora_plus_scale: float = arg(
        1.0,
        "learning rate of B, as a multiple of learning_rate (LoRA+)",
        minimum=1e-6,
        aliases=("loraplus_lr_ratio",),
        only_with=("do_train", "lora"),
    )
    modules_to_save: list[str] = arg(
        [],
        "layers that train whole beside the matrices and lie in the adapter, such as embed_tokens "
        "lm_head",
        aliases=("additional_target",),
        only_with="lora",
    )
    neftune: bool = arg(
        False, "add noise to embeddings while training (NEFTune)", only_with="do_train"
    )
    neftune_noise_alpha: float | None = arg(
        None,
        "its strength, divided by the root of tokens x hidden size; given alone it switches the "
        "noise on, 5 when only neftune is given",
        minimum=1e-6,
        only_with="do_train",
    )
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
        if self.pissa_iter == 0:
            raise UserError(
                "pissa_iter=0 finds no principal part; give iterations, or -1 for all values"
            )
        if "neftune" in meant(self) and not self.neftune and self.neftune_noise_alpha is not None:
            raise UserError(
                f"neftune=false, and neftune_noise_alpha={self.neftune_noise_alpha:g} has no "
                "effect; drop one of the two"
            )
        # LLaMA-Factory writes lists with commas.
        self.modules_to_save = [
            name for words in self.modules_to_save for name in words.split(",") if name
        ]

    @property
    def targets(self) -> tuple[str, ...] | str:
        """The linears to adapt as ``LoRAConfig`` takes them."""
        names = tuple(self.lora_target_modules)
        # A regular expression and all-linear are single words.
        single = len(names) == 1 and not names[0].replace("_", "").isalnum()
        return names[0] if single else names

    @property
    def noise_alpha(self) -> float | None:
        """Strength of NEFTune's noise; None adds none."""
        if self.neftune_noise_alpha is not None:
            return self.neftune_noise_alpha
        return DEFAULT_NOISE if self.neftune else None

    @property
    def init_lora_weights(self) -> bool | str:
        """How the matrices start, as PEFT says it."""
        if not self.pissa:
            return True
        return "pissa" if self.pissa_iter < 0 else f"pissa_niter_{self.pissa_iter}"

    @property
    def mode(self) -> str:
        """``full``, ``lora`` or ``prefix``."""
        return "lora" if self.lora else "prefix" if self.prefix_tuning else "full"


@dataclass
class FinetuneArguments(TrainArguments):
    """Optimisation, precision, logging and checkpoints of one finetuning run."""

    FOREIGN: ClassVar[tuple[Program, ...]] = (
        paddlenlp_training.FINETUNE,
        llama_factory.FINETUNE,
        mindformers.FINETUNE,
    )

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
        False,
        "the final model is the best checkpoint",
        only_with=("do_train", "do_eval", "evaluation_strategy=steps|epoch"),
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
