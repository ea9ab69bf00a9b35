"""What happens around the steps: the last step, progress, logs, event files, the loss curve."""

import sys
import time
from pathlib import Path
from typing import Any

from llm.config.training import TrainArguments
from llm.train.logs import CURVE_FILE, LOG_FILE, RunLog, draw_loss_curve, logger, quiet_import

with quiet_import():
    from paddlenlp.trainer import TrainerCallback
from tqdm import tqdm


def duration(seconds: float) -> str:
    """Return a time as ``[days d] HH:MM:SS``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days} d " * (days > 0) + f"{hour:02}:{minute:02}:{second:02}"


class Calendar(TrainerCallback):
    """Says after which updates a run logs, evaluates and saves: the last one is always among them.

    Args:
        run: the flags.
        epoch_ends: updates that complete a pass over the samples.
    """

    def __init__(self, run: TrainArguments, epoch_ends: frozenset[int]) -> None:
        self.run = run
        self.epoch_ends = epoch_ends

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Raise the control flags of this step."""
        when = (state.global_step, state.max_steps, self.epoch_ends)
        control.should_log |= state.global_step >= state.max_steps
        control.should_evaluate = self.run.evaluates_at(*when)
        control.should_save = self.run.saves_at(*when)
        return control


class Clock(TrainerCallback):
    """Starts the trainer's meter when the first step is about to run."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin timing."""
        self.trainer.meter.start()


class Progress(TrainerCallback):
    """One bar for the run, shown on a terminal only."""

    def __init__(self, disable: bool) -> None:
        self.disable = True if disable else None  # None: quiet unless stderr is a terminal
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar at the step the run starts from."""
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            disable=self.disable,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance."""
        self.bar.update(state.global_step - self.bar.n)

    def close(self) -> None:
        """Leave the bar where it is, also after an error."""
        if self.bar is not None:
            self.bar.close()


class Report(TrainerCallback):
    """Writes every record to ``train_log.jsonl`` and one readable line to the terminal."""

    def __init__(self, output_dir: Path, keep: bool, unit: str) -> None:
        self.output_dir = output_dir
        self.loss_unit = "nats per token" if unit == "tokens" else f"mean over {unit}"
        self.keep = keep  # a run that only measures must not touch the log of the training
        self.log = RunLog(output_dir)
        self.started = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget what a killed run logged after the checkpoint."""
        self.log.rewind(state.global_step)
        self.started = (time.perf_counter(), state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Record one set of figures."""
        if self.keep:
            self.log.append({"step": state.global_step, **logs})
        logger.info("%s", " | ".join(self._parts(state, logs)))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw the loss curve."""
        target = self.output_dir / CURVE_FILE
        if draw_loss_curve(self.output_dir / LOG_FILE, target, self.loss_unit):
            logger.info("loss curve: %s", target)

    def _parts(self, state: Any, logs: dict[str, Any]) -> list[str]:
        step = f"step {state.global_step}"
        if state.max_steps > 0:  # not known yet before the first update
            step += f"/{state.max_steps}"
        if "loss" not in logs:
            prefix = next(iter(logs)).partition("_")[0]
            figures = {name.removeprefix(f"{prefix}_"): value for name, value in logs.items()}
            counts = [f"{v} {k}" for k, v in figures.items() if isinstance(v, int)]
            means = [f"{k} {v:.4f}" for k, v in figures.items() if f"{v} {k}" not in counts]
            first, *others = [text for text in means if not text.startswith("seconds ")]
            return [*([step] if self.keep else []), f"{prefix} {first}", *others, *counts]
        norm = logs.get("grad_norm")
        parts = [
            step,
            f"loss {logs['loss']:.4f}",
            f"lr {logs['learning_rate']:.3e}",
            "grad norm " + ("overflow" if norm is None else f"{norm:.3f}"),
            f"{logs['tokens_per_second']:.0f} tokens/s",
            f"peak memory {logs['peak_memory_gb']:.2f} GB",
        ]
        if "mfu" in logs:
            parts.insert(5, f"MFU {logs['mfu']:.1%}")
        return [*parts, self._remaining(state)]

    def _remaining(self, state: Any) -> str:
        began, first = self.started
        done = max(state.global_step - first, 1)
        seconds = (time.perf_counter() - began) / done * (state.max_steps - state.global_step)
        return "left " + duration(seconds)


class EventFiles(TrainerCallback):
    """Scalars for VisualDL or TensorBoard: ``train/loss``, ``eval/perplexity`` and so on."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind = kind
        self.directory = directory
        self.writer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open a new event file."""
        with quiet_import():
            if self.kind == "visualdl":
                from visualdl import LogWriter as Writer
            else:
                from tensorboardX import SummaryWriter as Writer
        self.writer = Writer(logdir=str(self.directory))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Add every figure under its group."""
        if self.writer is None:
            return
        for name, value in logs.items():
            group, _, rest = name.partition("_")
            tag = f"{group}/{rest}" if group in ("eval", "test") else f"train/{name}"
            if value is not None:
                self.writer.add_scalar(tag, value, state.global_step)

    def close(self) -> None:
        """Flush and close, also after an error."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None
            sys.stdout.flush()
