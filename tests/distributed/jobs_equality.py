"""Trains a network under a layout, and compares it with what one process made of it.

Functions named ``train_*`` run in every rank of a job. One process writes its losses, norms and
weights to a file first; ranks compare their own share with it.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle.distributed.fleet.utils.mix_precision_utils import MixPrecisionOptimizer

from llm.llama.adapters.lora import LoRAConfig, add_lora
from llm.llama.adapters.prefix import PrefixConfig, add_prefix
from llm.llama.build import build_model
from llm.llama.config import TINY_NAME, load_config
from llm.parallel import topology as topologies
from llm.parallel.gradients import gradient, keep_master_gradients
from llm.parallel.layout import Layout
from llm.parallel.overlap import Overlap
from llm.parallel.scaling import LossScale
from llm.parallel.updater import Updater
from llm.train.objectives import next_token_objective
from llm.train.processes import arrange

STEPS, ROWS, LENGTH = 2, 12, 16
_WHOLE = ("embed_tokens", "model.norm", "0.mlp.up_proj")  # layers that an adapter trains whole
BUCKET_BYTES = 1 << 14  # of these small networks several gradients, or one


# Losses, gradient norms, the network and its updater.
Trained = tuple[list[float], list[float], Any, Updater]


def config(tied: bool) -> Any:
    """A network with grouped heads, and sizes that the layouts divide."""
    return dataclasses.replace(
        load_config(TINY_NAME),
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=4,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )


def batches(packed: bool) -> list[dict[str, np.ndarray]]:
    """The rows of each update, with labels that do not count."""
    random = np.random.default_rng(7)
    found = []
    for _ in range(STEPS):
        ids = random.integers(0, 96, [ROWS, LENGTH])
        labels = random.integers(0, 96, [ROWS, LENGTH])
        labels[random.random(labels.shape) < 0.2] = -100
        batch = {"input_ids": ids, "labels": labels}
        if packed:
            cut = random.integers(3, LENGTH - 3, [ROWS, 1])
            places = np.arange(LENGTH)[None]
            second = places >= cut
            batch["segments"] = second.astype(np.int64)
            batch["positions"] = np.where(second, places - cut, places)
        found.append(batch)
    return found


def optimizer(kind: str) -> Any:
    """Return what makes the optimizer; AdamW hides wrong scales of gradients, SGD does not.

    ``master`` is AdamW over the float32 gradients that half-precision training keeps apart.
    """
    if kind == "master":
        return lambda owned: MixPrecisionOptimizer(optimizer("adamw")(owned))
    if kind == "sgd":
        return lambda owned: paddle.optimizer.SGD(0.5, parameters=owned)
    return lambda owned: paddle.optimizer.AdamW(
        1e-3, parameters=owned, weight_decay=0.1, epsilon=1e-6
    )


@dataclasses.dataclass
class Flags:
    """What ``arrange`` reads of a run's flags."""

    pipeline_parallel_config: str = ""
    overlap_communication: bool = False


def adapted(model: Any, case: dict[str, Any]) -> Any:
    """Freeze a network and add an adapter, where the case has one."""
    if case.get("adapter") == "lora":
        return add_lora(model, LoRAConfig(r=2, target_modules="all-linear"), seed=5)
    if case.get("adapter") == "dora":
        settings = {"use_dora": True, "init_lora_weights": "pissa", "modules_to_save": _WHOLE}
        return add_lora(model, LoRAConfig(r=2, **settings), seed=5)
    if case.get("adapter") == "prefix":
        return add_prefix(model, PrefixConfig(num_virtual_tokens=3), seed=5)
    return model


def train(topology: topologies.Topology, case: dict[str, Any], overlap: bool = False) -> Trained:
    """Return the losses and gradient norms of every step, the network and its updater."""
    model = adapted(build_model(config(case["tied"]), seed=3, topology=topology), case)
    overflow = Overflow(model)
    if case["optimizer"] == "master":
        keep_master_gradients(model, "bfloat16")
    fields = arrange(model, topology, Flags())
    updater = Updater(
        model.parameters(),
        optimizer(case["optimizer"]),
        topology,
        max_norm=0.3,
        units=fields.get("units", ()),
        overlap=Overlap(case["accumulation"], BUCKET_BYTES) if overlap else None,
    )
    run = Passes(model, topology, fields, case["accumulation"])
    losses, norms, world = [], [], topology.layout.world_size
    model.train()
    for batch in batches(case["packed"]):
        if case.get("scale"):
            with overflow.in_process(world - 1):
                updater.begin()
                run(batch)
                assert_skipped(updater)
        updater.begin()
        total = run(batch, scaler=LossScale(case["scale"]) if case.get("scale") else None)
        losses.append(summed(total, topology))
        assert updater.step(case.get("scale"))
        norms.append(updater.last_norm)
        updater.clear_grad()
    return losses, norms, model, updater


@dataclasses.dataclass
class Passes:
    """Forward and backward passes of an update.

    Args:
        fields: what ``arrange`` returned.
        accumulation: micro-batches.
    """

    model: Any
    topology: topologies.Topology
    fields: dict[str, Any]
    accumulation: int

    def __call__(self, batch: dict[str, np.ndarray], scaler: LossScale | None = None) -> float:
        """Return the sum of this process's losses."""
        pipeline, cut = self.fields.get("pipeline"), self.fields.get("cut", lambda batch: batch)
        labels = float((batch["labels"] >= 0).sum())

        def loss(view: Any, part: dict[str, Any]) -> paddle.Tensor:
            return next_token_objective(view, part)[0] / labels

        parts = [cut(part) for part in micro_batches(batch, self.topology, self.accumulation)]
        if pipeline is not None:
            return float(pipeline.forward_backward(parts, loss, scaler=scaler))
        total = 0.0
        for part in parts:
            value = loss(self.model, part)
            (value if scaler is None else scaler.scale(value)).backward()
            total += value.item()
        return total


class Overflow:
    """Makes the gradient of one parameter of one process infinite, as float16 does."""

    def __init__(self, model: Any) -> None:
        self._on = False
        trained = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
        # Before the hook that sums it over processes, whichever gradient it is.
        trained[-1]._register_backward_hook(lambda *_: self._spoil(trained[-1]))

    @paddle.no_grad()
    def _spoil(self, parameter: paddle.Tensor) -> None:
        if self._on:
            gradient(parameter).scale_(float("inf"))

    @contextmanager
    def in_process(self, rank: int) -> Iterator[None]:
        """Let that process overflow for a while."""
        self._on = paddle.distributed.get_rank() == rank
        yield
        self._on = False


def assert_skipped(updater: Updater) -> None:
    """Expect that no process updates, that none waits for another, and that weights are shared."""
    before = {p.name: p.numpy() for p in updater.owned}
    assert not updater.step(1.0)
    assert updater.last_norm is None
    updater.clear_grad()
    for parameter in updater.parameters:
        if parameter.name in before:
            np.testing.assert_array_equal(parameter.numpy(), before[parameter.name])
        elif updater.sharding.stage == 3:
            assert not parameter._is_initialized(), parameter.name


def micro_batches(
    batch: dict[str, np.ndarray], topology: topologies.Topology, accumulation: int
) -> list[dict[str, paddle.Tensor]]:
    """Cut an update's rows as the trainer's loader does: a share of every micro-batch."""
    ranks, rank = topology.layout.data_ranks, topology.data_rank
    parts = []
    for number in range(accumulation):
        part = {}
        for name, rows in batch.items():
            micro = np.split(rows, accumulation)[number]
            part[name] = paddle.to_tensor(np.split(micro, ranks)[rank])
        parts.append(part)
    return parts


def summed(loss: float, topology: topologies.Topology) -> float:
    """Add up the losses of ranks that saw other tokens."""
    counted = topology.at.tensor == 0 and topology.at.pipeline == 0
    return sum(topology.gather_objects(loss if counted else 0.0))


def train_alone(directory: str, cases: dict[str, dict[str, Any]]) -> None:
    """Write what one process gets."""
    for name, case in cases.items():
        losses, norms, model, _ = train(topologies.single(), case)
        weights = {name: p.numpy() for name, p in model.named_parameters()}
        np.savez(Path(directory) / f"{name}.npz", losses=losses, norms=norms, **weights)


def train_like(
    directory: str, layout: dict[str, Any], cases: dict[str, dict[str, Any]], overlap: bool = False
) -> dict[str, dict[str, float]]:
    """Return the largest differences between a layout and one process, for each case.

    With overlap the layout trains without it, too; ``bits`` is the number of losses, norms and
    weights that are not the same.
    """
    topology = topologies.start(Layout(**layout))
    differences = {}
    for name, case in cases.items():
        expected = dict(np.load(Path(directory) / f"{name}.npz"))
        trained = train(topology, case, overlap)
        differences[name] = _differences(expected, topology, trained)
        if overlap:
            differences[name]["bits"] = changed(trained, train(topology, case))
    return differences


def _weights(trained: Trained) -> dict[str, np.ndarray]:
    """Return what this process holds of every weight; of sharded ones all."""
    _, _, model, updater = trained
    found = {}
    for name, parameter in model.named_parameters():
        with updater.full_parameter(parameter) as full:
            found[name] = full.numpy()
    return found


def changed(trained: Trained, plain: Trained) -> float:
    """Return how many losses, norms and weights of two trainings differ in any bit."""
    numbers = sum(a != b for a, b in zip(trained[0] + trained[1], plain[0] + plain[1], strict=True))
    weights = _weights(plain)
    same = [np.array_equal(values, weights[name]) for name, values in _weights(trained).items()]
    return float(numbers + same.count(False))


def _differences(
    expected: dict[str, np.ndarray], topology: topologies.Topology, trained: Trained
) -> dict[str, float]:
    losses, norms, model, _ = trained
    far = {
        "loss": float(np.abs(np.array(losses) - expected["losses"]).max()),
        "norm": float(np.abs(np.array(norms) - expected["norms"]).max()),
        "weight": 0.0,
    }
    weights = _weights(trained)
    for name, parameter in model.named_parameters():
        whole, axis = expected[name], getattr(parameter, "split_axis", None)
        if axis is not None and topology.layout.tensor > 1:
            whole = np.split(whole, topology.layout.tensor, axis)[topology.at.tensor]
        values = weights[name]
        assert values.shape == whole.shape, (name, values.shape, whole.shape)
        far["weight"] = max(far["weight"], float(np.abs(values - whole).max()))
    return far
