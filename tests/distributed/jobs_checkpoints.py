"""Checkpoints written and read by the real trainer under a layout; functions run in every rank."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from common.files import Work
from common.flags import load
from llm.config.training import PretrainArguments
from llm.llama.adapters.prefix import PrefixConfig, add_prefix, load_prefix, save_prefix
from llm.llama.build import build_model, load_model, save_model
from llm.llama.config import TINY_NAME, load_config
from llm.parallel import topology as topologies
from llm.parallel.layout import Layout
from llm.parallel.topology import Topology
from llm.train import state
from llm.train.checkpoints import Place
from llm.train.checks import Counts
from llm.train.figures import PeakRate
from llm.train.objectives import next_token_objective
from llm.train.processes import arrange
from llm.train.saver import Saver
from llm.train.task import Task
from paddlenlp_ext import callbacks
from paddlenlp_ext import trainer as trainers
from tests.distributed.checkpoint_layouts import LAYOUTS, ROWS, SAVED, STEPS

LENGTH = 16


class Rows:
    """Random ids, the same for the same index."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        tokens = np.random.default_rng([9, index]).integers(0, 64, LENGTH + 1)
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}


def config() -> Any:
    """A small network whose embedding is its output matrix too, so that stages share it."""
    return dataclasses.replace(
        load_config(TINY_NAME),
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )


def make_trainer(
    topology: Topology, output: Path, source: Path | None, *words: str
) -> trainers.LanguageModelTrainer:
    """Return a trainer of the network in ``source``, or of a new one."""
    per_update = topology.layout.data_ranks * 2
    flags = {
        "output_dir": output,
        "max_steps": STEPS,
        "save_steps": SAVED,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": ROWS // per_update,
        "disable_tqdm": "true",
    }
    if "--save_strategy" in words:
        del flags["save_steps"]
    pairs = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    (run,) = load([PretrainArguments], ["--do_train", *pairs, *words], prog="test")
    if source is None:
        model = build_model(config(), seed=5, topology=topology)
    else:
        model = load_model(source, topology=topology)
    task = Task(
        model=model,
        objective=next_token_objective,
        datasets={"train": Rows(STEPS * ROWS)},
        save_model=save_model,
        save_beside=lambda _: None,
        count=lambda start, stop: Counts(*[(stop - start) * LENGTH] * 2),
        flops_per_token=1e3,
        start=Place() if source is None else Place(SAVED, SAVED * ROWS),
        **arrange(model, topology, run),
    )
    return trainers.LanguageModelTrainer(run, task, STEPS)


def start(name: str) -> Topology:
    """Join the other ranks."""
    # paddlenlp asks for the number of processes when it is imported, before there were any.
    paddle.distributed.parallel._global_parallel_env = None
    # Nobody reads a speed or sees a curve here, and each takes a second for every run.
    trainers.peak_rate = lambda _: PeakRate(1e12, "not measured")
    callbacks.draw_loss_curve = lambda *_: False
    return topologies.start(Layout(**LAYOUTS[name]))


def flags_of(layout: Layout) -> list[str]:
    """Return the flags that ask for a layout."""
    words = {
        "tensor_parallel_degree": layout.tensor,
        "pipeline_parallel_degree": layout.pipeline,
        "data_parallel_degree": layout.data,
    }
    if layout.sharding_stage:
        words |= {"sharding": f"stage{layout.sharding_stage}"}
        words |= {"sharding_parallel_degree": layout.sharding}
    return [str(word) for name, value in words.items() for word in (f"--{name}", value)]


def train(name: str, root: str, *words: str) -> None:
    """Train from random weights, with a checkpoint on the way."""
    topology = start(name)
    words = (*flags_of(topology.layout), *words)
    make_trainer(topology, Path(root) / name, None, *words).train()


def resume_each(name: str, root: str, sources: list[str]) -> None:
    """Go on from the checkpoint of every layout; write what was read, and then train."""
    topology = start(name)
    for source in sources:
        checkpoint = Path(root) / source / f"checkpoint-{SAVED}"
        output = Path(root) / f"{source}-{name}"
        words = [*flags_of(topology.layout), "--save_strategy", "no"]
        words.append("--overlap_communication")  # which changes no number of the run that saved
        trainer = make_trainer(topology, output, checkpoint, *words)
        again = trainer._load_optimizer_and_scheduler

        def load_and_save(path: str | None, trainer: Any = trainer, again: Any = again) -> None:
            again(path)

            def fill(directory: Path, work: Work) -> None:
                trainer.save_weights(directory, work)
                state.save_optimizer(trainer.optimizer, directory, work)

            Saver(trainer.output_dir, topology).save(SAVED, fill)

        trainer._load_optimizer_and_scheduler = load_and_save
        trainer.train(str(checkpoint))


def save_a_prefix(name: str, root: str) -> None:
    """Write a new prefix with its projection, and read it back."""
    topology = start(name)
    place = Path(root) / name
    model = build_model(config(), seed=5, topology=topology)
    add_prefix(model, PrefixConfig(3, prefix_projection=True), seed=2)
    save_prefix(model, place, topology=topology)
    before = [parameter.numpy() for parameter in model.prefix.parameters()]
    load_prefix(model, place, trainable=True)
    for was, parameter in zip(before, model.prefix.parameters(), strict=True):
        assert np.array_equal(was, parameter.numpy()), parameter.name
