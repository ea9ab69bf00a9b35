"""Runs two checkpoints side by side, layer by layer: do they compute the same?

Both sides run the network in float32, one decoder layer in memory at a time. Each layer of both
gets the source's hidden states, so that an error shows where it is and nowhere else. Where the
result's type is narrower, the source's weights are rounded to it first, by other code than wrote
it: then what remains of a difference is an error, not rounding. What the rounding itself costs is
a figure of its own, with a limit of its own. Of llama.cpp's types Q8_0 is rounded so; how it
searched the scales of the others is not known, and that limit alone holds.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import paddle
from paddle import nn
from tqdm import tqdm

from common.errors import UserError
from external_ops.backend import select_ops
from llm.llama.files.checkpoint import Checkpoint
from llm.llama.files.dtypes import NAMES
from llm.llama.files.finite import read_finite
from llm.llama.files.gguf import BlockTensor
from llm.llama.files.tensors import Tensor
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.placement import is_matrix
from llm.parallel.layout import Stage

LIMIT = 1e-4  # of what a layer adds to the hidden states, in the Euclidean norm
# What a type may cost, likewise: over three times what the worst layer of a trained model (`make
# real-model`) does. More is lost where weights are smaller than the type has numbers, or a block's
# largest dwarfs the others; another model is off by more than 1.
COSTS = {
    "F16": 0.01,
    "BF16": 0.05,
    "Q8_0": 0.15,
    "Q6_K": 0.3,
    **dict.fromkeys(("Q5_0", "Q5_1", "Q5_K"), 0.6),
    **dict.fromkeys(("Q4_0", "Q4_1", "Q4_K"), 1.0),
}
_REPEATED = {*NAMES, "Q8_0"}  # types that are rounded to here
_BLOCK = 32  # numbers of a Q8_0 block, which share a scale
_LENGTH = 64
_IGNORED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far two checkpoints are apart in one place.

    Args:
        place: ``embedding``, ``layer 3`` or ``logits``.
        error: norm of the difference over the norm of what the place adds; that of the source's
            rounded weights.
        cost: likewise, of the source's weights as they are.
        dtype: what they are rounded to, a header's name or one of llama.cpp's; None where the
            result holds them as they are.
    """

    place: str
    error: float
    cost: float = 0.0
    dtype: str | None = None

    @property
    def repeated(self) -> bool:
        """Whether ``error`` is without rounding."""
        return self.dtype is None or self.dtype in _REPEATED

    @property
    def limit(self) -> float:
        """What ``cost`` may be."""
        return LIMIT if self.dtype is None else COSTS[self.dtype]


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
    """Return a table, a place a line: what is wrong, and what a narrower type costs.

    Raises:
        UserError: a difference beyond rounding, or a rounding that costs more than its type does;
            names the first place, and how many there are.
    """
    wrong = [d for d in differences if d.repeated and not d.error <= LIMIT]
    if wrong:
        raise UserError(
            f"the result computes something else: {wrong[0].place} is off by "
            f"{wrong[0].error:.1e} of its size{_others(wrong)}; rounding explains {LIMIT:.0e} at "
            "most"
        )
    dear = [d for d in differences if not d.cost <= d.limit]
    if dear:
        first = dear[0]
        why = "the weights do not fit that type, take a wider one"
        if not first.repeated:
            why = "it is of another model, or badly rounded"
        raise UserError(
            f"the result computes something else: {first.place} is off by {first.cost:.1e} of its "
            f"size{_others(dear)}, and {first.dtype} costs {first.limit:g} at most; {why}"
        )
    return "".join(_line(d) for d in differences)


def _others(places: list[Difference]) -> str:
    return f", and {len(places) - 1} more places differ" if len(places) > 1 else ""


def _line(one: Difference) -> str:
    figures = [f"{one.place:12}"]
    if one.repeated:
        figures.append(f"{one.error:.1e}")
    if one.dtype is not None:
        figures.append(f"{one.dtype} costs {one.cost:.1e}, of {one.limit:g} at most")
    return " ".join(figures) + "\n"


def _check_configs(source: Checkpoint, result: Checkpoint) -> None:
    for field in dataclasses.fields(source.config):
        mine, theirs = (getattr(side.config, field.name) for side in (source, result))
        if field.name not in _IGNORED and _stored(mine) != _stored(theirs):
            raise UserError(
                f"{field.name} is {mine} in {source.directory} and {theirs} in {result.directory}; "
                "they are not the same model"
            )


def _stored(value: object) -> object:
    """Return a setting as every form of files keeps it: GGUF has float32 only."""
    return np.float32(value) if isinstance(value, float) else value


def _differences(source: Checkpoint, result: Checkpoint) -> Iterator[Difference]:
    config = source.config
    length = min(_LENGTH, config.max_position_embeddings)
    drawn = np.random.default_rng(0).integers(0, config.vocab_size, [1, length])
    ids = paddle.to_tensor(drawn)
    ends = _piece(source, Stage((), first=True, last=False))
    x, found = _beside("embedding", ends, source, result, lambda: ends.model.embed_tokens(ids))
    yield found
    for number in range(config.num_hidden_layers):
        layer = _piece(source, Stage((range(number, number + 1),), first=False, last=False))
        run = partial(layer.decode, x, [number], length)
        x, found = _beside(f"layer {number}", layer, source, result, run, x)
        yield found
    last = _piece(source, Stage((), first=False, last=True))
    yield _beside("logits", last, source, result, lambda: last._logits(last.model.norm(x)))[1]


def _piece(checkpoint: Checkpoint, stage: Stage) -> LlamaForCausalLM:
    piece = LlamaForCausalLM(checkpoint.config, select_ops(), nn.initializer.Constant(0.0), stage)
    piece.eval()
    return piece


def _beside(
    place: str,
    piece: LlamaForCausalLM,
    source: Checkpoint,
    result: Checkpoint,
    run: Callable[[], paddle.Tensor],
    before: paddle.Tensor | None = None,
) -> tuple[paddle.Tensor, Difference]:
    """Run a piece with both sides' weights.

    Args:
        place: of the difference.
        piece: of a network, to be filled.
        source: what is right.
        result: what was made of it.
        run: returns the piece's output.
        before: hidden states to which the piece adds.

    Returns:
        The output with the source's weights, rounded where that can be repeated; the difference.
    """
    dtype = _rounded_to(piece, source, result)
    _fill(piece, source)
    plain = right = run()
    if dtype is not None:
        _fill(piece, source, result)
        right = run()
    _fill(piece, result)
    other = run()
    size = right if before is None else right - before
    return right, Difference(place, _error(right, other, size), _error(plain, other, size), dtype)


def _form(tensor: Tensor) -> str:
    """Return the type that a tensor has in its files."""
    blocks = [array.blocks for array in tensor.arrays if isinstance(array, BlockTensor)]
    return blocks[0] if blocks else tensor.dtype


def _rounded_to(piece: LlamaForCausalLM, source: Checkpoint, result: Checkpoint) -> str | None:
    """Return the narrowest type that a piece's weights are rounded to in the result."""
    types = set()
    for name, _ in piece.named_parameters():
        form = _form(result.tensors[name])
        if form in COSTS and form != source.tensors[name].dtype:
            types.add(form)
    return max(types, key=lambda form: COSTS[form], default=None)


def _fill(piece: LlamaForCausalLM, side: Checkpoint, rounded_as: Checkpoint | None = None) -> None:
    """Fill a network with one side's weights, or with those rounded to the types of the other's."""
    for name, parameter in piece.named_parameters():
        values = paddle.to_tensor(np.ascontiguousarray(read_finite(side.tensors[name])))
        if rounded_as is not None:
            values = _rounded(values, _form(rounded_as.tensors[name]))
        values = values.astype("float32")
        parameter.set_value(values.T if is_matrix(name) else values)


def _rounded(values: paddle.Tensor, form: str) -> paddle.Tensor:
    """Return the numbers of a type that are nearest, where that type alone says which they are."""
    if form in NAMES:
        return values.astype(NAMES[form])
    if form != "Q8_0":
        return values
    # As ggml's quantize_row_q8_0_ref: halves away from zero.
    blocks_NB = values.astype("float32").reshape([-1, _BLOCK])
    scale_N1 = blocks_NB.abs().max(axis=1, keepdim=True) / 127
    steps_NB = blocks_NB * paddle.where(scale_N1 > 0, 1 / scale_N1, scale_N1)
    whole_NB = paddle.sign(steps_NB) * (steps_NB.abs() + 0.5).floor()
    rounded_NB = whole_NB * scale_N1.astype("float16").astype("float32")
    return rounded_NB.reshape(values.shape)


def _error(right: paddle.Tensor, other: paddle.Tensor, size: paddle.Tensor) -> float:
    distance = float(paddle.linalg.norm((right - other).flatten()))
    return distance / max(float(paddle.linalg.norm(size.flatten())), 1e-30)
