"""Trains an adapter that PEFT began, on several ranks, as PEFT trains it in one process."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from safetensors.numpy import load_file

from llm.llama.adapters.lora import save_lora
from llm.llama.adapters.opening import load_adapter
from llm.llama.build import load_model
from llm.parallel import topology as topologies
from llm.parallel.layout import Layout
from llm.parallel.updater import Updater
from llm.train.objectives import next_token_objective
from llm.train.processes import arrange
from tests.distributed.jobs_equality import Flags


def _share(labels: float, view: Any, rows: dict[str, paddle.Tensor]) -> paddle.Tensor:
    return next_token_objective(view, rows)[0] / labels


def train(directory: str, layout: dict[str, int], steps: int, rate: float) -> list[float]:
    """Return the losses; the adapter lies in ``ours`` afterwards."""
    root, topology = Path(directory), topologies.start(Layout(**layout))
    model = load_model(root / "base", topology=topology)
    load_adapter(model, root / "initial", trainable=True)
    pipeline = arrange(model, topology, Flags())["pipeline"]
    updater = Updater(
        model.parameters(),
        lambda owned: paddle.optimizer.AdamW(rate, parameters=owned, weight_decay=0.01),
        topology,
    )
    batches = load_file(root / "expected.safetensors")["batches"]
    model.train()
    losses = []
    for step in range(steps):
        ids = batches[step % len(batches)]
        labels = np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], -100)], axis=1)
        rows = [
            {"input_ids": paddle.to_tensor(ids[i : i + 1]), "labels": paddle.to_tensor(row[None])}
            for i, row in enumerate(labels)
        ]
        count = float((labels >= 0).sum())
        loss = pipeline.forward_backward(rows, partial(_share, count))
        losses.append(loss.item())
        updater.step()
        updater.clear_grad()
    save_lora(model, root / "ours", topology=topology)
    return losses
