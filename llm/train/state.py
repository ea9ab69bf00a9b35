"""What a checkpoint holds beside the weights, and how a trainer gets it back.

Under the layout that wrote it a checkpoint continues bit for bit. Under another one weights,
moments, schedule and place in the data are the same numbers; only random generators, of which every
process has its own, start anew from the run's seed and the step.

Nothing is pickled, so a checkpoint from elsewhere can be loaded without running its code. Moments
carry the model's parameter names (``model.norm.weight/moment1_0``, the layout of PaddleNLP's
unified checkpoints), not paddle's per-process ones, so they load in any process.
"""

import base64
import copy
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.files import Work
from llm.llama.files.dtypes import header_type
from llm.llama.files.parts import Part, PartFiles
from llm.llama.files.safetensors import StoredTensor, read_header
from llm.parallel.pieces import Gatherer, share, split_axis, whole_shape
from llm.parallel.topology import Topology
from llm.parallel.updater import Updater
from llm.train import checkpoints
from llm.train.checkpoints import order_fingerprint
from llm.train.logs import logger, quiet_import

with quiet_import():
    import paddle

# File names without their ending; more than one file adds a number.
OPTIMIZER_FILE = "optimizer"
MASTER_FILE = "master_weights"
_FILE_BYTES = 5 * 10**9
_MASTER = "master_weights"  # among the states of a parameter
_SCHEDULER_STATE = "scheduler_state.json"
_METER_STATE = "meter_state.json"
_SCALER_STATE = "scaler_state.json"
_LAYOUT = "layout"


def fill(trainer: Any, directory: Path, work: Work) -> None:
    """Write a checkpoint of a :class:`~paddlenlp_ext.trainer.LanguageModelTrainer`.

    All processes call this; each writes its share.

    Args:
        trainer: after an update.
        directory: empty, the same for all processes.
        work: does what touches the disk, now or later; it is given copies.
    """
    trainer.save_weights(directory, work)
    save_optimizer(trainer.optimizer, directory, work)
    randomness = random_state_file(directory, trainer.topology)
    work.do(partial(checkpoints.write_json, randomness, random_state()))
    if not trainer.main:
        return
    consumed = trainer.consumed(trainer.state.global_step)
    loader = {
        "consumed_samples": consumed,
        "order": order_fingerprint(trainer.train_dataset, consumed),
        _LAYOUT: trainer.topology.layout.describe(),
        **trainer.task.data_state,
    }
    for name, content in (
        (checkpoints.LOADER_STATE, loader),
        (_SCHEDULER_STATE, trainer.lr_scheduler.state_dict()),
        (_METER_STATE, trainer.meter.state()),
    ):
        work.do(partial(checkpoints.write_json, directory / name, copy.deepcopy(content)))
    progress = copy.deepcopy(trainer.state)
    work.do(lambda: progress.save_to_json(str(directory / checkpoints.TRAINER_STATE)))
    if trainer.do_grad_scaling:
        scale = trainer.scaler.state()
        work.do(partial(checkpoints.write_json, directory / _SCALER_STATE, scale))


def restore(trainer: Any, directory: Path) -> None:
    """Give a trainer the optimizer, schedule and figures of a checkpoint.

    Raises:
        UserError: a damaged file, or one of another model.
    """
    load_optimizer(trainer.optimizer, directory)
    trainer.lr_scheduler.set_state_dict(checkpoints.read_json(directory / _SCHEDULER_STATE))
    trainer.meter.restore(checkpoints.read_json(directory / _METER_STATE))
    if trainer.do_grad_scaling and (directory / _SCALER_STATE).exists():
        trainer.scaler.restore(checkpoints.read_json(directory / _SCALER_STATE))
    elif trainer.do_grad_scaling:
        logger.info("%s has no loss scale: it starts from --scale_loss", directory)


def restore_randomness(trainer: Any, directory: Path) -> None:
    """Set the random generators to those of a checkpoint, or anew under another layout."""
    file = random_state_file(directory, trainer.topology)
    loader = checkpoints.read_json(directory / checkpoints.LOADER_STATE)
    now = trainer.topology.layout.describe()
    before = loader.get(_LAYOUT, now)
    if before != now:
        logger.info("the checkpoint is of %s, this run is %s: converted", before, now)
    else:
        state = checkpoints.read_json(file)
        missing = _devices().keys() - state["paddle"].keys()
        if not missing:
            restore_random_state(state)
            return
        logger.info("%s was written without a %s: generators start anew", directory, *missing)
    start_random_state(trainer.run.seed, trainer.state.global_step, trainer.topology)


def save_optimizer(updater: Updater, directory: Path, work: Work) -> None:
    """Write AdamW's moments, and the float32 master weights where training keeps them.

    All processes call this. Each state is brought together among the tensor ranks that own it, and
    one of them writes it.
    """
    updater.create_state()  # float16 may have overflowed in every update so far
    parts: dict[str, list[Part]] = {OPTIMIZER_FILE: [], MASTER_FILE: []}
    gather = Gatherer(updater.topology)
    for parameter in updater.parameters:
        if parameter.stop_gradient or not updater.owns(parameter):
            continue
        for kind, tensor in updater.state_tensors(parameter).items():
            master = kind == _MASTER
            name = parameter.name if master else f"{parameter.name}/{kind}"
            part = _part(name, tensor, _axis(parameter, tensor.shape), gather)
            parts[MASTER_FILE if master else OPTIMIZER_FILE].append(part)
    topology = updater.topology
    ranks = next(group for group in topology.layout.groups("tensor") if topology.rank in group)
    for stem, found in parts.items():
        files = PartFiles(directory, stem, topology, work, _FILE_BYTES)
        files.write(found, ranks)
        work.last(files.take_names)


def _axis(parameter: Any, shape: Any) -> int | None:
    """Return the axis along which a state is split: as its parameter, or not (a scalar)."""
    return split_axis(parameter) if list(shape) == list(parameter.shape) else None


def _part(name: str, tensor: paddle.Tensor, axis: int | None, gather: Gatherer) -> Part:
    shape = whole_shape(tensor.shape, axis, gather.topology)
    return Part(name, shape, header_type(tensor), lambda rank: gather.tensor(tensor, axis, rank))


def load_optimizer(updater: Updater, directory: Path) -> None:
    """Give the optimizer the moments of a checkpoint, whatever layout wrote it.

    All processes call this; each reads its share of what it updates.

    Raises:
        UserError: a file is damaged, or of a model with other parameters.
    """
    moments: dict[str, dict[str, StoredTensor]] = {}
    for key, stored in _stored(directory, OPTIMIZER_FILE).items():
        name, _, kind = key.partition("/")
        moments.setdefault(name, {})[kind] = stored
    trained = {p.name: p for p in updater.parameters if not p.stop_gradient}
    _check_names(updater, set(trained), set(moments), directory)
    masters = _stored(directory, MASTER_FILE)
    for name, parameter in trained.items():
        if not updater.needs(parameter) or name not in moments:
            continue
        found = {kind: _read(stored, parameter, updater) for kind, stored in moments[name].items()}
        if parameter.dtype in (paddle.float16, paddle.bfloat16):
            found[_MASTER] = (
                _read(masters[name], parameter, updater)
                if name in masters
                else parameter.astype("float32").numpy()
            )
        updater.set_moments(parameter, found)


def _read(stored: StoredTensor, parameter: Any, updater: Updater) -> NDArray[Any]:
    whole = whole_shape(parameter.shape, split_axis(parameter), updater.topology)
    axis = split_axis(parameter) if stored.shape == whole else None
    if axis is None and stored.shape not in (whole, (1,)):
        raise UserError(
            f"{stored.file}: {stored.name} has shape {list(stored.shape)}, its parameter "
            f"{list(whole)}: the optimizer state belongs to another model"
        )
    return np.array(stored.read(share(stored.shape, axis, updater.topology)))


def _check_names(updater: Updater, trained: set[str], stored: set[str], directory: Path) -> None:
    keeps = updater.inner is not None and not isinstance(updater.inner, paddle.optimizer.SGD)
    everywhere = updater.topology.gather_objects((keeps, trained))
    if not stored and not any(keeps for keeps, _ in everywhere):
        return
    different = sorted(stored ^ set().union(*(names for _, names in everywhere)))
    if different:
        raise UserError(
            f"the optimizer state in {directory} belongs to another model: {len(different)} "
            f"parameters are on one side only, for example {different[0]}"
        )


def _stored(directory: Path, name: str) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(directory.glob(f"{name}*.safetensors")):
        tensors |= read_header(file)
    return tensors


def random_state() -> dict[str, Any]:
    """Return the state of Python's, numpy's and paddle's generators as JSON values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "paddle": {device: _saved(device, number) for device, number in _devices().items()},
    }


def random_state_file(directory: Path, topology: Topology) -> Path:
    """Return where a process keeps the state of its generators."""
    number = f"-{topology.rank:05}" if topology.layout.world_size > 1 else ""
    return directory / f"random_state{number}.json"


def start_random_state(seed: int, step: int, topology: Topology) -> None:
    """Seed all generators for a run that goes on after ``step`` under another layout.

    Ranks that see other tokens or hold other layers draw other numbers; tensor ranks draw the same,
    since they compute the same where they are not split.
    """
    at = topology.at
    sequence = np.random.SeedSequence([seed, step, topology.data_rank, at.pipeline, at.context])
    numbers = [int(word) for word in sequence.generate_state(3)]
    random.seed(numbers[0])
    np.random.seed(numbers[1])
    paddle.seed(numbers[2])


def restore_random_state(state: dict[str, Any]) -> None:
    """Set all generators to what :func:`random_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    for device, number in _devices().items():
        # Paddle takes the states of all devices that it sees, or none.
        states = paddle.get_rng_state(device)
        saved = state["paddle"].get(device, [])
        if saved:  # more than one: written when the states of all devices were
            states[number] = _generator(saved[min(number, len(saved) - 1)])
            paddle.set_rng_state(states, device)


def _devices() -> dict[str, int]:
    """Return the kinds of device that draw numbers in this process, and which of each it is."""
    device, _, number = paddle.device.get_device().partition(":")
    return {"cpu": 0} | ({device: int(number)} if number else {})


def _saved(device: str, number: int) -> list[list[Any]]:
    """Return the state of one generator: how many devices a process sees is the machine's."""
    *numbers, engine = paddle.get_rng_state(device)[number].__getstate__()
    return [[*numbers, base64.b64encode(bytes(engine)).decode("ascii")]]


def _generator(saved: list[Any]) -> Any:
    *numbers, engine = saved
    kind = type(paddle.get_rng_state("cpu")[0])  # paddle exports the class under no public name
    generator = kind.__new__(kind)
    generator.__setstate__((*numbers, list(base64.b64decode(engine))))
    return generator
