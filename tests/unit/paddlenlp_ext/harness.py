"""A model and a dataset small enough to train for a few steps within milliseconds."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from common.flags import load
from external_ops.backend import select_ops
from llm.config.training import PretrainArguments
from llm.train import checkpoints
from llm.train.checkpoints import Place
from llm.train.checks import Counts, data_start
from llm.train.task import Task
from paddlenlp_ext.trainer import LanguageModelTrainer

VOCAB, WIDTH, LENGTH = 16, 8, 6


class Samples:
    """Random ids, the same for the same index; notes which processes asked for which."""

    def __init__(self, size: int, seed: int = 0, trace: Path | None = None) -> None:
        self.size, self.seed, self.trace = size, seed, trace

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if self.trace is not None:
            with self.trace.open("a") as file:
                file.write(f"{os.getpid()} {index}\n")
        tokens = np.random.default_rng([self.seed, index]).integers(0, VOCAB, LENGTH + 1)
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}


class Bigram(nn.Layer):
    """Embedding, a per-channel gain like a norm's, and a linear with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = select_ops()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        one = nn.initializer.Constant(1.0)
        self.norm = self.create_parameter([WIDTH], default_initializer=one)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.batches: list[int] = []
        for name, parameter in self.named_parameters():
            parameter.name = name

    def forward(self, input_ids: paddle.Tensor) -> paddle.Tensor:
        """Score the next token from the current one alone."""
        self.batches.append(input_ids.shape[0])
        return self.head(self.embed(input_ids) * self.norm)


def mean_loss(logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
    """Mean cross-entropy."""
    return nn.functional.cross_entropy(logits.reshape([-1, VOCAB]), labels.flatten())


def objective_of(criterion: Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor]) -> Any:
    """Make an objective of a mean loss."""

    def objective(model: nn.Layer, batch: dict[str, paddle.Tensor]) -> Any:
        weight = float(batch["labels"].size)
        loss = criterion(model(batch["input_ids"]), batch["labels"])
        return loss * weight, weight, {"half": (weight / 2, weight)}

    return objective


@dataclass
class Outcome:
    """What a run left behind."""

    trainer: LanguageModelTrainer
    output_dir: Path
    model: Bigram
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def weights(self) -> np.ndarray:
        return np.concatenate([p.numpy().ravel() for p in self.model.parameters()])

    def series(self, name: str) -> list[Any]:
        return [record[name] for record in self.records if name in record]

    def steps_with(self, name: str) -> list[int]:
        return [record["step"] for record in self.records if name in record]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.output_dir.glob("checkpoint-*"))


def place_in(checkpoint: Path, arguments: PretrainArguments) -> Place:
    """Return where a run that resumes is in its samples."""
    step = json.loads((checkpoint / checkpoints.MARKER).read_text())["step"]
    return data_start(arguments, checkpoints.Checkpoint(step, checkpoint), [])


def run(
    output_dir: Path,
    *flags: object,
    resume: str | None = None,
    prepare: Callable[[Bigram], None] | None = None,
    criterion: Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor] | None = None,
    trace: Path | None = None,
    kind: type = PretrainArguments,
    **task_changes: Any,
) -> Outcome:
    """Train the bigram model for 6 steps, unless the flags say otherwise.

    Further arguments replace fields of the task.
    """
    base: list[object] = ["--output_dir", output_dir]
    if flags[:2] != ("--do_train", "false"):
        base += ["--do_train", "--max_steps", 6, "--learning_rate", 0.05, "--logging_steps", 1]
        base += ["--per_device_train_batch_size", 2, "--save_strategy", "no"]
    # Later flags replace earlier ones: the command line itself refuses repeated ones.
    pairs: dict[str, list[str]] = {}
    for word in map(str, [*base, *flags]):
        if word.startswith("--"):
            pairs[word] = current = [word]
        else:
            current.append(word)
    words = [word for group in pairs.values() for word in group]
    (arguments,) = load([kind], words, prog="test")
    output_dir.mkdir(parents=True, exist_ok=True)
    paddle.seed(1)
    with paddle.utils.unique_name.guard():
        model = Bigram()
        if prepare is not None:
            prepare(model)
        steps = arguments.total_steps(LENGTH)
        task = {
            "objective": objective_of(criterion or mean_loss),
            "datasets": {
                # A few more than the run takes, as the dataset builder may give.
                "train": Samples(steps * arguments.samples_per_step + 5, trace=trace),
                "eval": Samples(5, seed=1),
                "test": Samples(5, seed=2),
            },
            "save_model": lambda m, d, **_: paddle.save(m.state_dict(), str(d / "model.pdparams")),
            "load_model": lambda m, d, **_: m.set_state_dict(paddle.load(f"{d}/model.pdparams")),
            "save_beside": lambda d: (d / "tokenizer.json").touch(),
            "count": lambda start, stop: Counts(*2 * [(stop - start) * LENGTH]),
            "flops_per_token": 1e3,
            "start": place_in(Path(resume), arguments) if resume else Place(),
        }
        task = Task(model=model, **task | task_changes)
        if resume is not None:
            model.set_state_dict(paddle.load(f"{resume}/model.pdparams"))
        trainer = LanguageModelTrainer(arguments, task, steps)
        if arguments.do_train:
            trainer.train(resume)
            trainer.load_best()
            trainer.save_final()
        trainer.measure()
    outcome = Outcome(trainer, output_dir, model)
    log = output_dir / "train_log.jsonl"
    if log.exists():
        outcome.records = [json.loads(line) for line in log.read_text().splitlines()]
    return outcome
