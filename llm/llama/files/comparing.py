"""Runs two checkpoints side by side, layer by layer: do they compute the same?

Both sides run the network in float32, one decoder layer in memory at a time. Each layer of both
gets the source's hidden states, so that an error shows where it is and nowhere else. Where the
result's type is narrower, the source's weights are rounded to it first, by paddle: then what
remains of a difference is an error, not rounding.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import paddle
from paddle import nn
from tqdm import tqdm

from common.errors import UserError
from external_ops.backend import select_ops
from llm.llama.files.checkpoint import Checkpoint
from llm.llama.files.dtypes import NAMES
from llm.llama.files.finite import read_finite
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.placement import is_matrix
from llm.parallel.layout import Stage

LIMIT = 1e-4  # of what a layer adds to the hidden states, in the Euclidean norm
_LENGTH = 64
_IGNORED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far two checkpoints are apart in one place.

    Args:
        place: ``embedding``, ``layer 3`` or ``logits``.
        error: norm of the difference over the norm of what the place adds.
    """

    place: str
    error: float


def compare(source: Checkpoint, result: Checkpoint) -> list[Difference]:
    """Return the differences of hidden states after each layer, and of logits.

    Args:
        source: what is right.
        result: what was made of it.

    Raises:
        UserError: models of different shapes.
    """
    _check_configs(source, result)
    places = source.config.num_hidden_layers + 2
    bar = tqdm(_differences(source, result), "comparing", places, disable=None, leave=False)
    with paddle.no_grad():
        return list(bar)


def report(differences: list[Difference]) -> str:
    """Return a table, a place a line.

    Raises:
        UserError: a difference beyond rounding; names the first place, and how many there are.
    """
    wrong = [d for d in differences if not d.error <= LIMIT]
    if wrong:
        others = f", and {len(wrong) - 1} more places differ" if len(wrong) > 1 else ""
        raise UserError(
            f"the result computes something else: {wrong[0].place} is off by "
            f"{wrong[0].error:.1e} of its size{others}; rounding explains {LIMIT:.0e} at most"
        )
    return "".join(f"{d.place:12} {d.error:.1e}\n" for d in differences)


def _check_configs(source: Checkpoint, result: Checkpoint) -> None:
    for field in dataclasses.fields(source.config):
        mine, theirs = (getattr(side.config, field.name) for side in (source, result))
        if field.name not in _IGNORED and mine != theirs:
            raise UserError(
                f"{field.name} is {mine} in {source.directory} and {theirs} in {result.directory}; "
                "they are not the same model"
            )


def _differences(source: Checkpoint, result: Checkpoint) -> Iterator[Difference]:
    config = source.config
    length = min(_LENGTH, config.max_position_embeddings)
    drawn = np.random.default_rng(0).integers(0, config.vocab_size, [1, length])
    ids = paddle.to_tensor(drawn)
    ends = _piece(source, Stage((), first=True, last=False))
    x = _embedded(ends, source, result, ids)
    other = _embedded(ends, result, result, ids)
    yield Difference("embedding", _error(x, other, x))
    for number in range(config.num_hidden_layers):
        piece = _piece(source, Stage((range(number, number + 1),), first=False, last=False))
        outputs = []
        for side in (source, result):
            _fill(piece, side, result)
            outputs.append(piece.decode(x, [number], length))
        yield Difference(f"layer {number}", _error(*outputs, outputs[0] - x))
        x = outputs[0]
    piece = _piece(source, Stage((), first=False, last=True))
    outputs = []
    for side in (source, result):
        _fill(piece, side, result)
        outputs.append(piece._logits(piece.model.norm(x)))
    yield Difference("logits", _error(*outputs, outputs[0]))


def _piece(checkpoint: Checkpoint, stage: Stage) -> LlamaForCausalLM:
    piece = LlamaForCausalLM(checkpoint.config, select_ops(), nn.initializer.Constant(0.0), stage)
    piece.eval()
    return piece


def _embedded(
    piece: LlamaForCausalLM, side: Checkpoint, result: Checkpoint, ids: paddle.Tensor
) -> paddle.Tensor:
    _fill(piece, side, result)
    return piece.model.embed_tokens(ids)


def _fill(piece: LlamaForCausalLM, side: Checkpoint, result: Checkpoint) -> None:
    """Fill a network with one side's weights, rounded to the result's type."""
    for name, parameter in piece.named_parameters():
        values = paddle.to_tensor(np.ascontiguousarray(read_finite(side.tensors[name])))
        rounded = values.astype(NAMES[result.tensors[name].dtype]).astype("float32")
        parameter.set_value(rounded.T if is_matrix(name) else rounded)


def _error(right: paddle.Tensor, other: paddle.Tensor, size: paddle.Tensor) -> float:
    distance = float(paddle.linalg.norm((right - other).flatten()))
    return distance / max(float(paddle.linalg.norm(size.flatten())), 1e-30)
