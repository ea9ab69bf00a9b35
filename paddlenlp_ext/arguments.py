"""Our schema to PaddleNLP's ``TrainingArguments``."""

from llm.config.training import TrainArguments
from paddlenlp_ext.logs import quiet_import

with quiet_import():
    from paddlenlp.trainer import TrainingArguments
    from paddlenlp.utils.log import logger as paddlenlp_logger

# Flags that mean in TrainingArguments exactly what they mean in the schema.
_SAME = (
    "output_dir",
    "do_train",
    "do_predict",
    "device",
    "seed",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "fp16",
    "bf16",
    "fp16_opt_level",
    "scale_loss",
    "recompute",
    "logging_steps",
    "logging_first_step",
    "ignore_data_skip",
    "dataloader_num_workers",
)


def training_arguments(run: TrainArguments, max_steps: int) -> TrainingArguments:
    """Translate a validated run into what PaddleNLP's Trainer reads.

    Schedules, progress bars, event logs, and when to evaluate and save are this package's own, so
    the fields behind them stay at values that make the Trainer leave them alone.
    """
    paddlenlp_logger.set_level("WARNING")
    return TrainingArguments(
        **{name: getattr(run, name) for name in _SAME},
        max_steps=max_steps,
        evaluation_strategy="no",
        save_strategy="no",
        lr_scheduler_type="constant",
        disable_tqdm=True,
        report_to="none",
        skip_memory_metrics=True,
    )
