"""Quantization that looks at text: one decoder layer after the other, on what really arrives there.

N calibration rows, S sequence, E hidden, I inputs of a linear.
"""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn
from tqdm import tqdm

from common.errors import UserError
from llm.llama.layers import SAME_INPUT
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.embedding import quantize_embedding
from llm.llama.quantization.gptq import DAMPING, Curvature, gptq
from llm.llama.quantization.linear import check_weight, round_tokens
from llm.llama.quantization.network import linears, replace_linear
from llm.llama.quantization.progress import Progress

_TOKENS = 8192  # of rows that run through a layer together: integers are widened once for all
_SILENCE = 10.0  # seconds without a word where there is no progress bar
_TRIANGLE = 4  # blocks of columns in which the upper triangle of a Hessian is computed

# Names of linears that read the same inputs, and these inputs, some rows each.
Stops = Iterator[tuple[tuple[str, ...], list[Tensor]]]


def quantize_calibrated(
    model: LlamaForCausalLM,
    config: QuantConfig,
    ids_NS: np.ndarray,
    *,
    damping: float = DAMPING,
    progress: Progress | None = None,
) -> LlamaForCausalLM:
    """Quantize a network with GPTQ, in place.

    Each linear is quantized on the inputs that the linears before it, quantized already, hand on.
    Memory beside the network: the hidden states of all rows, ``N * S * E``, and one Hessian.

    Args:
        model: a plain network.
        config: widths and groups.
        ids_NS: int64 calibration rows of equal length.
        damping: see :meth:`llm.llama.quantization.gptq.Curvature.of`.
        progress: layers that are done already, and where to keep others.

    Returns:
        The same network.

    Raises:
        UserError: no rows, ids beyond the vocabulary, groups that do not fit, or weights that are
            not finite, before anything is changed.
    """
    for name, layer in linears(model, config).items():
        check_weight(layer.weight, name)

    _check_ids(ids_NS, model.config.vocab_size)
    quantize_embedding(model, config)

    def visit(prefix: str, stops: Stops) -> None:
        done = progress.load(prefix) if progress is not None else None
        made = {} if done is None else done
        for inner, inputs in stops:
            names = [
                name for name in (f"{prefix}.{one}" for one in inner) if config.quantizes(name)
            ]
            if done is None and names:
                made |= _quantize(model, names, inputs, config, damping)
            for name in names:
                values = made[f"{name}.integers"], made[f"{name}.scale"]
                replace_linear(model, name, config, values)
        if done is None and progress is not None:
            progress.store(prefix, made)

    visit_layers(model, ids_NS, visit, "quantizing layers")
    return model


def _quantize(
    model: LlamaForCausalLM,
    names: list[str],
    inputs: list[Tensor],
    config: QuantConfig,
    damping: float,
) -> dict[str, np.ndarray]:
    """Return integers and scales of linears that read the same inputs."""
    curvature = Curvature.of(second_moments(inputs, config.activation_bits), damping, names[0])
    layers, made = dict(model.named_sublayers()), {}
    for name in names:
        weight = layers[name].weight.T.astype("float32").numpy()
        integers, scale = gptq(weight, curvature, config.of(name), name)
        made |= {f"{name}.integers": integers, f"{name}.scale": scale}
    return made


def visit_layers(
    model: LlamaForCausalLM, ids_NS: np.ndarray, visit: Callable[[str, Stops], None], what: str
) -> None:
    """Stop at each decoder layer on the way of calibration rows through a network.

    Args:
        model: the network; its mode is restored.
        ids_NS: int64 rows.
        visit: gets a layer's name and its stops (:func:`walk_layer`), and has to exhaust them.
        what: label of the progress bar.

    Raises:
        UserError: no rows, or ids beyond the vocabulary.
    """
    _check_ids(ids_NS, model.config.vocab_size)
    number_of = {id(layer): number for number, layer in enumerate(model.model.layers)}
    bar = tqdm(total=len(number_of), desc=what, disable=None, leave=False)
    said = time.monotonic()
    before, training = model.seams.run_layer, model.training

    def run_layer(layer: nn.Layer, x: Tensor, *others: Any) -> Tensor:
        nonlocal said
        together = max(1, _TOKENS // x.shape[1])
        rows = [x[n : n + together] for n in range(0, x.shape[0], together)]
        number = number_of[id(layer)]
        visit(f"model.layers.{number}", walk_layer(layer, rows, *others))
        bar.update()
        if bar.disable and time.monotonic() - said > _SILENCE:  # no terminal shows the bar
            said = time.monotonic()
            sys.stderr.write(f"{what}: {number + 1} of {len(number_of)}\n")
        return paddle.concat(rows)

    model.eval()
    model.seams.run_layer = run_layer
    try:
        with paddle.no_grad(), bar:
            # One row's logits are enough: only the layers matter.
            model(paddle.to_tensor(ids_NS), rows_n=paddle.to_tensor([0]))
    finally:
        model.seams.run_layer = before
        model.train() if training else model.eval()


def walk_layer(layer: nn.Layer, rows: list[Tensor], *others: Any) -> Stops:
    """Lead rows through a decoder layer, and stop before its linears.

    What is done to linears and norms at a stop counts from there on, so no row goes twice: what is
    left to compute reads them anew.

    Args:
        layer: the decoder layer.
        rows: hidden states, a part of the rows each; replaced by those behind the layer.
        others: what the layer takes beside them.

    Yields:
        Names of linears within the layer that read the same inputs, and these inputs, which may be
        replaced too.
    """
    attention, mlp = layer.self_attn, layer.mlp
    inputs = [layer.input_layernorm(x) for x in rows]
    qkv, o, gate_up, down = SAME_INPUT
    yield qkv, inputs
    _replace(inputs, lambda x: attention.mix(x, *others))
    yield o, inputs
    for n, x in enumerate(inputs):
        inputs[n], rows[n] = layer.post_attention_layernorm.add(attention.o_proj(x), rows[n])
    yield gate_up, inputs
    _replace(inputs, mlp.activate)
    yield down, inputs
    for n, x in enumerate(inputs):
        rows[n] = rows[n] + mlp.down_proj(x)


def _replace(tensors: list[Tensor], make: Callable[[Tensor], Tensor]) -> None:
    """Replace tensors one by one: all of both would not fit into memory."""
    for n, tensor in enumerate(tensors):
        tensors[n] = make(tensor)


def second_moments(inputs: list[Tensor], activation_bits: int | None = None) -> np.ndarray:
    """Return the mean outer product ``[I, I]`` of inputs ``[..., I]``, in float64.

    Args:
        inputs: parts of all rows.
        activation_bits: 8 rounds each token's inputs first.
    """
    size = inputs[0].shape[-1]
    total, count = np.zeros((size, size)), 0
    step = -(-size // _TRIANGLE)
    for part in inputs:
        x = part.astype("float32").reshape([-1, size])
        if activation_bits is not None:
            x = round_tokens(x, activation_bits)
        # A symmetric matrix: blocks below the diagonal are not computed.
        for start in range(0, size, step):
            block = paddle.matmul(x[:, start : start + step], x[:, start:], transpose_x=True)
            total[start : start + step, start:] += block.numpy()
        count += x.shape[0]
    total /= count
    # In place: of a wide linear, this is the largest matrix of all.
    for start in range(0, size, step):
        rows, end = total[start : start + step], start + step
        square = rows[:, start:end]
        square[:] = np.triu(square) + np.triu(square, 1).T
        total[end:, start:end] = rows[:, end:].T
    return total


def _check_ids(ids_NS: np.ndarray, vocab_size: int) -> None:
    if ids_NS.ndim != 2 or ids_NS.size == 0:
        raise UserError(f"calibration ids of shape {list(ids_NS.shape)} are not rows of tokens")
    low, high = int(ids_NS.min()), int(ids_NS.max())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"calibration token id {low if low < 0 else high} is outside the model's vocabulary of "
            f"{vocab_size}"
        )
