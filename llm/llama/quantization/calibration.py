"""Quantization that looks at text: one decoder layer after the other, on what really arrives there.

N calibration rows, S sequence, E hidden, I inputs of a linear.
"""

from collections.abc import Callable
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
from llm.llama.quantization.gptq import DAMPING, gptq
from llm.llama.quantization.linear import check_weight, round_tokens
from llm.llama.quantization.network import linears, replace_linear

_ROWS = 4  # that run through a layer together

Forward = Callable[..., Tensor]


def quantize_calibrated(
    model: LlamaForCausalLM, config: QuantConfig, ids_NS: np.ndarray, *, damping: float = DAMPING
) -> LlamaForCausalLM:
    """Quantize a network with GPTQ, in place.

    Each linear is quantized on the inputs that the linears before it, quantized already, hand on.
    Memory beside the network: the hidden states of all rows, ``N * S * E``, and one Hessian.

    Args:
        model: a plain network.
        config: widths and groups.
        ids_NS: int64 calibration rows of equal length.
        damping: see :func:`llm.llama.quantization.gptq.gptq`.

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

    def visit(prefix: str, forward: Forward) -> None:
        _quantize_layer(model, prefix, config, forward, damping)

    visit_layers(model, ids_NS, visit, "quantizing layers")
    return model


def visit_layers(
    model: LlamaForCausalLM, ids_NS: np.ndarray, visit: Callable[[str, Forward], None], what: str
) -> None:
    """Stop at each decoder layer on the way of calibration rows through a network.

    Args:
        model: the network; its mode is restored.
        ids_NS: int64 rows.
        visit: gets a layer's name and a function that runs all rows through it. It may change the
            layer; what the layer then hands on goes to the next.
        what: label of the progress bar.

    Raises:
        UserError: no rows, or ids beyond the vocabulary.
    """
    _check_ids(ids_NS, model.config.vocab_size)
    number_of = {id(layer): number for number, layer in enumerate(model.model.layers)}
    bar = tqdm(total=len(number_of), desc=what, disable=None, leave=False)
    before, training = model.seams.run_layer, model.training

    def run_layer(layer: nn.Layer, x: Tensor, *others: Any) -> Tensor:
        def forward() -> Tensor:
            parts = [layer(x[n : n + _ROWS], *others) for n in range(0, x.shape[0], _ROWS)]
            return paddle.concat(parts)

        visit(f"model.layers.{number_of[id(layer)]}", forward)
        bar.update()
        return forward()

    model.eval()
    model.seams.run_layer = run_layer
    try:
        with paddle.no_grad(), bar:
            # One row's logits are enough: only the layers matter.
            model(paddle.to_tensor(ids_NS), rows_n=paddle.to_tensor([0]))
    finally:
        model.seams.run_layer = before
        model.train() if training else model.eval()


def _quantize_layer(
    model: LlamaForCausalLM, prefix: str, config: QuantConfig, forward: Forward, damping: float
) -> None:
    for group in SAME_INPUT:
        names = [f"{prefix}.{name}" for name in group if config.quantizes(f"{prefix}.{name}")]
        if not names:
            continue
        layers = dict(model.named_sublayers())
        hessian = _hessian(layers[names[0]], config, forward)
        for name in names:
            weight = layers[name].weight.T.astype("float32").numpy()
            values = gptq(weight, hessian, config, damping=damping, name=name)
            replace_linear(model, name, config, values)


def _hessian(linear: nn.Layer, config: QuantConfig, forward: Forward) -> np.ndarray:
    """Return the mean outer product ``[I, I]`` of a linear's inputs, in float64."""
    size = linear.weight.shape[0]
    total, count = np.zeros((size, size)), 0

    def watch(_: nn.Layer, inputs: tuple[Tensor, ...]) -> None:
        nonlocal count
        x = inputs[0].astype("float32").reshape([-1, size])
        if config.activation_bits is not None:
            x = round_tokens(x, config.activation_bits)
        total[...] += paddle.matmul(x, x, transpose_x=True).numpy()
        count += x.shape[0]

    hook = linear.register_forward_pre_hook(watch)
    try:
        forward()
    finally:
        hook.remove()
    return total / count


def _check_ids(ids_NS: np.ndarray, vocab_size: int) -> None:
    if ids_NS.ndim != 2 or ids_NS.size == 0:
        raise UserError(f"calibration ids of shape {list(ids_NS.shape)} are not rows of tokens")
    low, high = int(ids_NS.min()), int(ids_NS.max())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"calibration token id {low if low < 0 else high} is outside the model's vocabulary of "
            f"{vocab_size}"
        )
