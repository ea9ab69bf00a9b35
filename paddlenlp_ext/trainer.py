"""PaddleNLP's Trainer with exact resume, atomic checkpoints, a watchdog and honest figures.

The training loop, gradient accumulation and mixed precision are PaddleNLP's; what this class
replaces is where paddlenlp 3.0.0b4 is inexact or drops information, by overriding methods:
data order, optimizer and schedule, saving and loading, evaluation, and logging.
"""

import math
import time
from contextlib import closing, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import Work
from llm.config.training import TrainArguments
from llm.parallel import faults
from llm.parallel.gradients import keep_master_gradients
from llm.parallel.offload import Offload
from llm.parallel.scaling import LossScale
from llm.parallel.updater import Updater
from llm.train import checkpoints, state
from llm.train.checkpoints import Best
from llm.train.checks import Counts
from llm.train.figures import Meter, Watchdog, peak_rate, peak_tensor_bytes
from llm.train.logs import logger, quiet_import
from llm.train.objectives import Figures
from llm.train.saver import Saver
from llm.train.schedules import make_scheduler, rate_of
from llm.train.task import Task
from paddlenlp_ext.answer_scores import answer_scores
from paddlenlp_ext.arguments import training_arguments
from paddlenlp_ext.callbacks import Calendar, Clock, EventFiles, Progress, Report
from paddlenlp_ext.loaders import Loader, evaluation_loader, training_loader

with quiet_import():
    import paddle
    from paddle.distributed.fleet.utils.mix_precision_utils import MixPrecisionOptimizer
    from paddlenlp.trainer import Trainer
    from paddlenlp.trainer.trainer_callback import PrinterCallback
from tqdm import tqdm


class LanguageModelTrainer(Trainer):
    """Trains a :class:`Task` as a :class:`TrainArguments` says.

    Args:
        run: the validated flags.
        task: model and data.
        max_steps: updates in the whole run.
    """

    def __init__(self, run: TrainArguments, task: Task, max_steps: int) -> None:
        self.run = run
        self.task = task
        self.output_dir = Path(run.output_dir)
        self.watchdog = Watchdog(self.output_dir)
        self.topology = task.topology
        self.main = task.topology.rank == 0  # the process that logs and writes
        self._guard: faults.Guard | None = None
        self._waiting: list[dict[str, Any]] = []  # micro-batches of the update under way
        super().__init__(
            model=task.model,
            args=training_arguments(run, max_steps, task.topology),
            data_collator=task.collate,
            train_dataset=task.datasets.get("train"),
            eval_dataset=task.datasets.get("eval"),
            callbacks=[Calendar(run, task.epoch_ends), *self._reports()],
        )
        self.scaler = LossScale(run.scale_loss)
        self.remove_callback(PrinterCallback)
        self.best = Best(run, self.output_dir)
        self.saver = Saver(
            self.output_dir,
            self.topology,
            limit=run.save_total_limit,
            in_background=run.async_save,
        )
        # Every micro-batch of an update asks again, and an answer looks at all of its samples.
        self._counts = lru_cache(maxsize=1)(self._count_update)
        self._step_loss = 0.0
        self._counted = 0
        self._step_rate = 0.0
        self._evaluated: dict[str, float] = {}
        # Of one process: the update's tokens are the work of all of them.
        share = task.flops_per_token / task.topology.layout.world_size
        self.meter = Meter(flops_per_token=share, peak=None)

    def _reports(self) -> list[Any]:
        if not self.main:
            self._quiet, self._closing = True, []
            return [Clock(self)]
        directory = Path(self.run.logging_dir or self.output_dir / "runs")
        events = [EventFiles(kind, directory) for kind in self.run.report_to if kind != "none"]
        self._quiet = True if self.run.disable_tqdm else None
        self._closing = [Progress(self.run.disable_tqdm), *events]
        return [
            Clock(self),
            Report(self.output_dir, self.run.do_train, self.task.unit),
            *self._closing,
        ]

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Run the updates; the model must already hold the weights of the checkpoint.

        Raises:
            UserError: nan or inf (:class:`DivergedError`), a checkpoint cannot be written, or the
                job was told to stop and has saved one.
        """
        peak = peak_rate(self.run.fp16 or self.run.bf16)
        self.meter.peak = peak
        logger.info("peak for MFU: %s", peak.describe())
        try:
            if self.run.eval_on_start and resume_from_checkpoint is None:
                self.evaluate()
                self._evaluated.clear()
            limit = self.run.distributed_timeout
            with faults.guard(self.topology, self.output_dir, limit) as self._guard:
                if self.topology.layout.world_size > 1:
                    # Dropout: the same on tensor ranks, other numbers for other samples.
                    state.start_random_state(self.run.seed, 0, self.topology)
                super().train(resume_from_checkpoint=resume_from_checkpoint)
                self.saver.wait()
            self._report_memory()
        except KeyboardInterrupt:
            complete, _ = checkpoints.find_checkpoints(self.output_dir)
            kept = complete[-1].path if complete else "no checkpoint"
            logger.warning("interrupted after step %d; kept %s", self.state.global_step, kept)
            raise
        finally:
            self.saver.close()
            for callback in self._closing:
                callback.close()

    def _report_memory(self) -> None:
        if self.task.prediction is None:
            return
        measured = max(self.topology.gather_objects(peak_tensor_bytes()))
        predicted = self.task.prediction.bytes_per_rank
        logger.info(
            "memory of tensors: %.3g MB a rank at most, %+.0f %% of the %.3g MB predicted",
            measured / 1e6,
            100 * (measured / predicted - 1),
            predicted / 1e6,
        )

    # --- data -----------------------------------------------------------------------------------

    def _share(self) -> dict[str, Any]:
        return {
            "rank": self.topology.data_rank,
            "ranks": self.topology.layout.data_ranks,
            "collate": self.data_collator,
            "workers": self.run.dataloader_num_workers,
        }

    def get_train_dataloader(self) -> Loader:
        """Return this process's share of the run's batches, in the dataset's own order."""
        loader = training_loader(
            self.train_dataset,
            batches=self.args.max_steps * self.run.gradient_accumulation_steps,
            first=self.task.start.sample,
            samples=self.consumed(self.args.max_steps),
            batch_size=self.run.per_device_train_batch_size,
            **self._share(),
        )
        self._closing.append(loader)
        return loader

    def consumed(self, step: int) -> int:
        """Return how many samples all ranks have taken after ``step`` updates."""
        return self.task.start.sample_at(step, self.run.samples_per_step)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Loader:
        """Return this process's share of a dataset; all shares together hold it once."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        size = self.run.per_device_eval_batch_size
        return evaluation_loader(dataset, batch_size=size, **self._share())

    # --- optimisation ---------------------------------------------------------------------------

    def create_scheduler(self, num_training_steps: int) -> Any:
        """Build the schedule that ``lr_scheduler_type`` names."""
        self.lr_scheduler = make_scheduler(rate_of(self.run, num_training_steps))
        return self.lr_scheduler

    def create_optimizer(self, lr_scheduler: Any = None) -> Any:
        """Build AdamW over what is trained; only matrices decay, so norms and biases do not."""
        master = self.run.amp_master_grad and self.run.weight_type != "float32"
        if master:
            keep_master_gradients(self.model, self.run.weight_type)

        def adamw(owned: list[paddle.Tensor]) -> Any:
            decayed = {p.name for p in owned if p.ndim >= 2}
            # State in host memory is updated a parameter at a time, by Paddle's own operator.
            make = paddle.optimizer.AdamW if self.task.offload else self.model.ops.adamw
            made = make(
                learning_rate=lr_scheduler,
                beta1=self.run.adam_beta1,
                beta2=self.run.adam_beta2,
                epsilon=self.run.adam_epsilon,
                parameters=owned,
                weight_decay=self.run.weight_decay,
                apply_decay_param_fun=lambda name: name in decayed,
                multi_precision=self.run.fp16_opt_level == "O2",
            )
            if self.task.offload:
                Offload(made, ahead=self.task.overlap is not None)
            return MixPrecisionOptimizer(made) if master else made

        self.optimizer = Updater(
            self.model.parameters(),
            adamw,
            self.topology,
            max_norm=self.run.max_grad_norm,
            inspect=self._check_norm,
            units=self.task.units,
            overlap=self.task.overlap,
        )
        return self.optimizer

    def _wrap_model(self, model: Any, training: bool = True) -> Any:
        """Leave the network and the updater as they are, which need none of the loop's wrappers."""
        return model

    def _check_norm(self, norm: float) -> None:
        self.watchdog.check(self.state.global_step + 1, "the gradient norm", norm)

    def _count_update(self, step: int) -> Counts:
        """What update ``step`` (from 0) consumes."""
        return self.task.count(self.consumed(step), self.consumed(step + 1))

    def compute_loss(self, model: paddle.nn.Layer, inputs: dict[str, paddle.Tensor]) -> Any:
        """Return a batch's part of the update's loss, which is a mean over all its batches."""
        # The loop divides by gradient_accumulation_steps, as if all batches weighed the same.
        return self._loss(model, inputs) * self.run.gradient_accumulation_steps

    def _loss(self, model: Any, batch: dict[str, paddle.Tensor]) -> paddle.Tensor:
        loss_sum, _, _ = self.task.objective(model, batch)
        return loss_sum / max(self._counts(self.state.global_step).weight, 1.0)

    def training_step(
        self, model: paddle.nn.Layer, inputs: dict[str, Any], step_control: int = 0
    ) -> paddle.Tensor:
        """Run one micro-batch; a pipeline runs all of an update when the last one has come."""
        self.optimizer.begin()
        inputs = self.task.cut(inputs)
        if self.task.pipeline is None:
            return super().training_step(model, inputs)
        self._waiting.append(self._prepare_inputs(inputs))
        if len(self._waiting) < self.run.gradient_accumulation_steps:
            return paddle.zeros([])
        batches, self._waiting = self._waiting, []
        model.train()
        scaler = self.scaler if self.do_grad_scaling else None
        with self.autocast_smart_context_manager():
            return self.task.pipeline.forward_backward(batches, self._loss, scaler=scaler)

    def _check_loss_valid(self, loss: paddle.Tensor) -> None:
        # The loop calls this once per update, after the backward passes and before the optimizer.
        step = self.state.global_step + 1
        self._step_loss = self._over_ranks([loss.item()])[0]
        self._step_rate = self.lr_scheduler.get_lr()
        self.optimizer.last_norm = None
        self.watchdog.check(step, "the loss", self._step_loss)
        if self.do_grad_scaling and self.scaler.factor < 1:
            self.watchdog.check(step, "the float16 gradient at loss scale 1", math.inf)

    def _over_ranks(self, numbers: list[float]) -> list[float]:
        """Sum numbers over the ranks that saw other tokens; all processes get the same."""
        if self.topology.layout.world_size == 1:
            return numbers
        at = self.topology.at
        counted = at.tensor == 0 and at.pipeline == 0  # the others have the same numbers
        total = paddle.to_tensor([n * counted for n in numbers], dtype="float64")
        paddle.distributed.all_reduce(total)
        return total.tolist()

    # --- figures --------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, tr_loss: paddle.Tensor, model: Any, *_: Any, **__: Any):
        # The loop also calls this at the end of an epoch, after the last step was handled.
        if self.state.global_step > self._counted:
            self._counted = self.state.global_step
            self.meter.add(self._step_loss, self._counts(self._counted - 1).tokens)
            tr_loss.subtract_(tr_loss)
        if self.control.should_log:
            figures = self.meter.flush()
            extra = {"learning_rate": self._step_rate, "grad_norm": self.optimizer.last_norm}
            extra["consumed_samples"] = self.consumed(self.state.global_step)
            self.log({"loss": figures.pop("loss"), **extra, **figures})
        if self.control.should_evaluate:
            self.best.update(self.state, self.evaluate())
        if self.control.should_save:
            self._save_checkpoint(model)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.saver.check()
        self._stop_if_told(model)
        self.meter.start()

    def _stop_if_told(self, model: Any) -> None:
        """End after a checkpoint when a process was sent SIGTERM, all at the same step."""
        step = self.state.global_step
        if self._guard is None or not self._guard.stop_requested() or step >= self.state.max_steps:
            return
        if not self.control.should_save:
            self._save_checkpoint(model)
        raise UserError(
            f"stopped by SIGTERM after step {step}, with a checkpoint; go on with "
            "--resume_from_checkpoint true"
        )

    def log(self, logs: dict[str, Any], **_: Any) -> None:
        """Hand figures to the callbacks, without the loop's summary that ignores resuming."""
        if "train_runtime" not in logs:
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return and log the loss and the objective's figures over a dataset.

        Every label (or pair) weighs the same, whatever the batch it is in.
        """
        start = time.perf_counter()
        self.model.eval()
        whole = self.optimizer.computing() if self.optimizer else nullcontext()
        with whole:
            loss, weight, figures = self._averages(eval_dataset)
        prefix = metric_key_prefix
        metrics = {f"{prefix}_loss": loss}
        if self.task.unit == "tokens":
            metrics[f"{prefix}_perplexity"] = math.exp(min(loss, 700.0))
        metrics |= {f"{prefix}_{name}": value for name, value in figures.items()}
        if prefix == "eval" and self.task.generated is not None:
            scores = answer_scores(self.task.generated())
            metrics |= {f"{prefix}_{name}": value for name, value in scores.items()}
        self.model.train()
        metrics[f"{prefix}_{self.task.unit}"] = int(weight)
        metrics[f"{prefix}_seconds"] = round(time.perf_counter() - start, 3)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self._evaluated |= metrics
        return metrics

    def _averages(self, dataset: Any) -> tuple[float, float, dict[str, float]]:
        """Return mean loss, total weight and mean figures over a dataset."""
        sums: dict[str, tuple[float, float]] = {"": (0.0, 0.0)}
        with closing(self.get_eval_dataloader(dataset)) as loader:
            for index, (batch, extra) in enumerate(
                tqdm(loader, "evaluating", disable=self._quiet, leave=False)
            ):
                if index == self.run.max_evaluate_steps:
                    break
                if self._guard is not None:
                    self._guard.beat()
                total, weight, figures = self._measure_batch(self.task.cut(batch))
                for name, (part, count) in {"": (total, weight), **figures}.items():
                    before = sums.get(name, (0.0, 0.0))
                    kept = 0.0 if extra else 1.0  # repeats a sample that another rank has
                    sums[name] = (before[0] + kept * part, before[1] + kept * count)
        names = sorted(sums)
        flat = self._over_ranks([number for name in names for number in sums[name]])
        means = {
            name: flat[2 * i] / max(flat[2 * i + 1], 1.0 if not name else 1e-9)
            for i, name in enumerate(names)
        }
        return means.pop(""), flat[1], means

    def _measure_batch(self, batch: dict[str, Any]) -> tuple[float, float, Figures]:
        with paddle.no_grad(), self.autocast_smart_context_manager():
            if self.task.pipeline is not None:
                return self.task.pipeline.evaluate(batch, self.task.objective)
            total, weight, figures = self.task.objective(self.model, batch)
        return total.item(), weight, figures

    # --- checkpoints ----------------------------------------------------------------------------

    def save_weights(self, directory: Path, work: Work) -> None:
        """Write the model, or its adapter, and what lies beside it; all processes call this."""
        full = nullcontext if self.optimizer is None else self.optimizer.full_parameter
        self.task.save_model(self.model, directory, topology=self.topology, full=full, work=work)
        if self.main:
            work.do(lambda: self.task.save_beside(directory))

    def _save_checkpoint(self, model: Any, metrics: Any = None) -> None:
        step, keep = self.state.global_step, self.best.checkpoint(self.state)
        self.saver.save(step, lambda *place: state.fill(self, *place), keep=keep)

    def _load_from_checkpoint(self, resume_from_checkpoint: str | None = None) -> None:
        """Do nothing: the caller built the model from the checkpoint's own files."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.restore(self, Path(checkpoint))
            self.best.resume(Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.restore_randomness(self, Path(checkpoint))

    # --- results --------------------------------------------------------------------------------

    def load_best(self) -> None:
        """Give the model the weights of the best checkpoint, if the run asks for that.

        Raises:
            UserError: the checkpoint is no longer there, or damaged.
        """
        path = self.best.checkpoint(self.state)
        if path is None:
            return
        problem = checkpoints.why_incomplete(path)
        if problem is not None:
            raise UserError(f"the best checkpoint {path} cannot be used: {problem}")
        with self.optimizer.whole():
            self.task.load_model(self.model, path, topology=self.topology)
        logger.info("best model: %s (%.6g)", path, self.state.best_metric)
        if path != checkpoints.checkpoint_path(self.output_dir, self.state.global_step):
            self._evaluated.clear()  # those were figures of the last step

    def save_final(self) -> None:
        """Put the trained model into the output directory itself, beside the checkpoints.

        Raises:
            UserError: the disk is full or not writable.
        """
        self.saver.final(self.save_weights)
        logger.info("final model: %s", self.output_dir)

    def measure(self) -> None:
        """Evaluate what the flags ask for and training did not just measure; write the results."""
        parts = [("eval", self.run.do_eval), ("test", self.run.do_predict)]
        for prefix, wanted in parts:
            if not wanted:
                continue
            if f"{prefix}_loss" not in self._evaluated:
                self.evaluate(self.task.datasets[prefix], metric_key_prefix=prefix)
            metrics = {k: v for k, v in self._evaluated.items() if k.startswith(prefix)}
            if self.main:
                checkpoints.write_json(self.output_dir / f"{prefix}_results.json", metrics)
