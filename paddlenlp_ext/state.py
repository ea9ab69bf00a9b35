"""The parts of a checkpoint beside the model: optimizer moments and random generators.

Nothing is pickled, so a checkpoint from elsewhere can be loaded without running its code. Moments
carry the model's parameter names (``model.norm.weight/moment1_0``, the layout of PaddleNLP's
unified checkpoints), not paddle's per-process ones, so they load in any process.
"""

import base64
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from llm.errors import UserError

# File names without their ending; more than one shard adds a number.
OPTIMIZER_FILE = "optimizer"
MASTER_FILE = "master_weights"
_SHARD_BYTES = 1 << 30  # what saving may copy at a time
_ACCUMULATOR = re.compile(r"(?P<parameter>.+)_(?P<moment>moment[12]|beta[12]_pow_acc)_\d+")


def _names(model: paddle.nn.Layer) -> dict[str, str]:
    """Map paddle's parameter names to the model's."""
    return {parameter.name: name for name, parameter in model.named_parameters()}


def save_optimizer(
    optimizer: paddle.optimizer.Optimizer, model: paddle.nn.Layer, directory: Path
) -> None:
    """Write AdamW's moments, and the float32 master weights where training keeps them."""
    names = _names(model)
    moments = {}
    state = optimizer.state_dict()
    masters = state.pop("master_weights", {})
    state.pop("LR_Scheduler", None)
    for key, tensor in state.items():
        match = _ACCUMULATOR.fullmatch(key)
        assert match is not None, f"AdamW keeps an unknown accumulator {key}"
        moments[f"{names[match['parameter']]}/{match['moment']}_0"] = tensor
    _save(moments, directory, OPTIMIZER_FILE)
    if masters:
        _save({names[key]: tensor for key, tensor in masters.items()}, directory, MASTER_FILE)


def _save(tensors: dict[str, paddle.Tensor], directory: Path, name: str) -> None:
    """Write shard by shard, since the moments take twice the memory of the weights."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        nbytes = tensor.size * tensor.element_size()
        if shards[-1] and size + nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += nbytes
    for index, keys in enumerate(shards):
        suffix = "" if len(shards) == 1 else f"-{index + 1:05}-of-{len(shards):05}"
        arrays = {key: tensors[key].numpy() for key in keys}
        save_file(arrays, directory / f"{name}{suffix}.safetensors", {"format": "np"})


def load_optimizer(
    optimizer: paddle.optimizer.Optimizer,
    model: paddle.nn.Layer,
    schedule: dict[str, Any],
    directory: Path,
) -> None:
    """Give the optimizer the moments of a checkpoint, and its scheduler the state ``schedule``.

    Raises:
        UserError: the file is damaged, or of a model with other parameters.
    """
    trained = {parameter.name for parameter in model.parameters() if not parameter.stop_gradient}
    paddle_names = {n: p for p, n in _names(model).items() if p in trained}
    moments = _load(directory, OPTIMIZER_FILE)
    stored = {key.partition("/")[0] for key in moments}
    if stored != set(paddle_names):
        different = sorted(stored ^ set(paddle_names))
        raise UserError(
            f"the optimizer state in {directory} belongs to another model: {len(different)} "
            f"parameters are on one side only, for example {different[0]}"
        )
    state: dict[str, Any] = {"LR_Scheduler": schedule}
    for key, value in moments.items():
        name, _, moment = key.partition("/")
        state[f"{paddle_names[name]}_{moment}"] = paddle.to_tensor(value)
    masters = _load(directory, MASTER_FILE)
    if masters:
        state["master_weights"] = {
            paddle_names[name]: paddle.to_tensor(value) for name, value in masters.items()
        }
    optimizer.set_state_dict(state)


def _load(directory: Path, name: str) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob(f"{name}*.safetensors")):
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {file} of the checkpoint: {error}") from error
    return tensors


def random_state() -> dict[str, Any]:
    """Return the state of Python's, numpy's and paddle's generators as JSON values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "paddle": {device: _generators(device) for device in _devices()},
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set all generators to what :func:`random_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    for device, generators in state["paddle"].items():
        if device in _devices():
            paddle.set_rng_state([_generator(saved) for saved in generators], device)


def _devices() -> tuple[str, ...]:
    return ("cpu", "gpu") if paddle.get_device().startswith("gpu") else ("cpu",)


def _generators(device: str) -> list[list[Any]]:
    states = []
    for generator in paddle.get_rng_state(device):
        *numbers, engine = generator.__getstate__()
        states.append([*numbers, base64.b64encode(bytes(engine)).decode("ascii")])
    return states


def _generator(saved: list[Any]) -> Any:
    *numbers, engine = saved
    kind = type(paddle.get_rng_state("cpu")[0])  # paddle exports the class under no public name
    generator = kind.__new__(kind)
    generator.__setstate__((*numbers, list(base64.b64decode(engine))))
    return generator
