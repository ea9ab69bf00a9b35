"""Which checkpoint is the best so far."""

from pathlib import Path
from typing import Any

from llm.config.training import TrainArguments
from paddlenlp_ext import checkpoints
from paddlenlp_ext.logs import logger


class Best:
    """Keeps ``best_metric`` and ``best_model_checkpoint`` of the trainer's state, as the Trainers
    of PaddleNLP and Hugging Face do, so that a resumed run knows them.

    Args:
        run: with ``load_best_model_at_end`` (finetuning); without it, this does nothing.
        output_dir: where the checkpoints lie.
    """

    def __init__(self, run: TrainArguments, output_dir: Path) -> None:
        self.wanted = getattr(run, "load_best_model_at_end", False)
        self.name = run.best_metric if self.wanted else ""
        self.more_is_better = self.wanted and run.more_is_better
        self.run = run
        self.output_dir = output_dir

    def update(self, state: Any, metrics: dict[str, float]) -> None:
        """Compare an evaluation with the best; the earlier of two equal ones stays."""
        if not self.wanted:
            return
        epoch_ends = frozenset([state.global_step])  # evaluations fall on saves then
        if not self.run.saves_at(state.global_step, state.max_steps, epoch_ends):
            return
        value = metrics[f"eval_{self.name}"]
        best = state.best_metric
        if best is None or (value > best if self.more_is_better else value < best):
            path = checkpoints.checkpoint_path(self.output_dir, state.global_step)
            state.best_metric, state.best_model_checkpoint = value, str(path)
            logger.info("best so far: eval_%s %.6g at step %d", self.name, value, state.global_step)

    def checkpoint(self, state: Any) -> Path | None:
        """Return the best checkpoint, which rotation keeps; None where there is none yet."""
        if not self.wanted or state.best_model_checkpoint is None:
            return None
        # The directory may have moved since the state was written.
        return self.output_dir / Path(state.best_model_checkpoint).name
