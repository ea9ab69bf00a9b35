"""What is trained and on what: everything that a run hands to the trainer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray

from llm.parallel.overlap import Overlap
from llm.parallel.pipeline import Pipeline
from llm.parallel.topology import Topology, single
from llm.planner import Prediction
from llm.train.checkpoints import Place, Samples
from llm.train.checks import Counts
from llm.train.objectives import Objective

Arrays = dict[str, NDArray[Any]]


def stack(samples: list[Arrays]) -> Arrays:
    """Stack samples of one length; numpy, since paddle tensors from workers crash the loader."""
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


@dataclass
class Task:
    """What is trained: everything that depends on the model or the data arrives here.

    Args:
        model: the network, with whatever adapters it has.
        objective: maps network and batch to ``(loss_sum, weight, figures)``; the loss is
            ``loss_sum / weight``, and figures, ``name: (sum, weight)``, are averaged likewise.
        datasets: ``train``, ``eval`` and ``test``, each map-style or None; items are dicts of numpy
            arrays.
        save_model: writes the model, or its adapter, into a directory; all processes call it. Its
            keywords ``topology``, ``full`` and ``work`` are those of
            ``llm.llama.files.weights.save_weights``.
        save_beside: writes what lies beside the weights: tokenizer, resolved config.
        count: counts the training samples ``[start, stop)`` of the run.
        flops_per_token: of one training token, for MFU.
        collate: makes a batch of samples.
        load_model: reads back what ``save_model`` wrote, for the best checkpoint; its keyword
            ``topology`` is the running job.
        unit: what the weights of the objective count; for tokens perplexity is reported.
        epoch_ends: updates that complete a pass over the samples.
        generated: answers to the validation part, each with the acceptable ones; scored in every
            evaluation of that part.
        data_state: JSON values that identify the data and its order.
        start: where the run is in its samples.
        topology: the running job; one process when not given.
        pipeline: runs the micro-batches of an update through the stages; None when the network is
            whole.
        cut: this process's part of a batch whose sequences are split over processes.
        units: layers that compute one after another, for sharding.
        overlap: what of an update runs beside computation; None is nothing.
        offload: the optimizer's state lies in host memory.
        prediction: of the memory of a process; the run says how far it was off.
    """

    model: paddle.nn.Layer
    objective: Objective
    datasets: dict[str, Samples | None]
    save_model: Callable[..., None]
    save_beside: Callable[[Path], None]
    count: Callable[[int, int], Counts]
    flops_per_token: float
    collate: Callable[[list[Arrays]], Arrays] = stack
    load_model: Callable[..., None] | None = None
    unit: str = "tokens"
    epoch_ends: frozenset[int] = frozenset()
    generated: Callable[[], list[tuple[str, tuple[str, ...]]]] | None = None
    data_state: dict[str, Any] = field(default_factory=dict)
    start: Place = field(default_factory=Place)
    topology: Topology = field(default_factory=single)
    pipeline: Pipeline | None = None
    cut: Callable[[dict[str, Any]], dict[str, Any]] = lambda batch: batch
    units: Sequence[paddle.nn.Layer] = ()
    overlap: Overlap | None = None
    offload: bool = False
    prediction: Prediction | None = None
