"""Our schema to PaddleNLP's ``TrainingArguments``."""

from collections.abc import Iterator
from contextlib import contextmanager

from llm.config.training import TrainArguments
from llm.parallel.topology import Topology, single
from llm.train.logs import quiet_import

with quiet_import():
    import paddle.distributed
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


@contextmanager
def _as_one_process() -> Iterator[None]:
    """Let PaddleNLP see one process: what several do together is :mod:`llm.parallel`'s business.

    Its arguments would otherwise start fleet with degrees, groups and wrappers of their own.
    """
    real = paddle.distributed.get_world_size
    paddle.distributed.get_world_size = lambda group=None: 1
    try:
        yield
    finally:
        paddle.distributed.get_world_size = real


class _Arguments(TrainingArguments):
    """PaddleNLP's arguments, which know of data parallel ranks and of nothing else."""

    topology = single()

    @property
    def world_size(self) -> int:
        """One: the loop must not communicate by itself."""
        return 1

    @property
    def dataset_world_size(self) -> int:
        """Ranks that take other samples; the loop counts consumed samples with it."""
        return self.topology.layout.data_ranks

    @property
    def dataset_rank(self) -> int:
        """Which of them this is."""
        return self.topology.data_rank


def training_arguments(
    run: TrainArguments, max_steps: int, topology: Topology
) -> TrainingArguments:
    """Translate a validated run into what PaddleNLP's Trainer reads.

    Schedules, progress bars, event logs, and when to evaluate and save are this package's own, so
    the fields behind them stay at values that make the Trainer leave them alone.
    """
    paddlenlp_logger.set_level("WARNING")
    with _as_one_process():
        arguments = _Arguments(
            **{name: getattr(run, name) for name in _SAME},
            max_steps=max_steps,
            evaluation_strategy="no",
            save_strategy="no",
            lr_scheduler_type="constant",
            disable_tqdm=True,
            report_to="none",
            skip_memory_metrics=True,
        )
    arguments.topology = topology
    return arguments
