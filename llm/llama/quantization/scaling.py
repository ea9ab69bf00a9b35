"""Scaling channels before rounding, and finding what rounding costs: AWQ's search, and 8 bits where
4 are too few.

Lin et al. 2023 (AWQ): dividing a channel of a linear's inputs and multiplying the weights that it
meets changes no function, but rounds weights of large inputs more finely. How far is searched, one
exponent for all linears that read the same: the error of their outputs on some tokens decides, with
the inputs rounded too where the type rounds them. The division goes where SmoothQuant's goes.

What the rounding of a linear costs is estimated to second order: the mean square of the loss's
gradient at each output times the mean square of the error there (the diagonal of what K-FAC takes
for the Hessian, Martens and Grosse 2015). T sampled tokens, I inputs, O outputs.
"""

import numpy as np
import paddle
from paddle import Tensor, nn

from llm.llama.files.dtypes import to_bfloat16
from llm.llama.layers import SAME_INPUT, Linear
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.calibration import Stops, visit_layers
from llm.llama.quantization.linear import SMALLEST_SCALE, limit_of, round_tokens
from llm.llama.quantization.network import linears
from llm.llama.quantization.smoothing import MAKERS, move

TOKENS = 256  # T: of a layer's inputs, spread over all rows
_EXPONENTS = np.linspace(0.0, 1.0, 9)
_OUTPUTS = 4  # of as many outputs, one is tried with every exponent


def output_errors(
    model: LlamaForCausalLM, config: QuantConfig, ids_NS: np.ndarray, *, scale: bool
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Find what rounding to the nearest would change, and scale channels so that it is less.

    Args:
        model: a plain network; scaled in place.
        config: what it will be quantized with.
        ids_NS: int64 calibration rows of equal length; few are enough.
        scale: whether channels are scaled.

    Returns:
        Mean square error ``[O]`` of each linear's outputs, by name, and what :func:`apply` takes.

    Raises:
        UserError: rows that are none.
    """
    layers: dict[str, Linear] = linears(model, config)
    errors: dict[str, np.ndarray] = {}
    factors: dict[str, np.ndarray] = {}

    def visit(prefix: str, stops: Stops) -> None:
        for names, inputs in stops:
            whole = [name for name in (f"{prefix}.{inner}" for inner in names) if name in layers]
            if not whole:
                continue
            plain, x_TI = [layers[name] for name in whole], sample(inputs)
            # What something else reads too cannot be scaled.
            scaled = scale and names in MAKERS and len(whole) == len(names)
            factor_I, found = best_factor(plain, x_TI, config, scaled=scaled)
            errors.update(zip(whole, found, strict=True))
            if scaled:
                factors[f"{prefix}.{names[0]}"] = factor_I
                apply(model, {f"{prefix}.{names[0]}": factor_I}, inputs)

    visit_layers(model, ids_NS, visit, "scaling channels" if scale else "measuring linears")
    return errors, factors


def apply(
    model: LlamaForCausalLM, factors: dict[str, np.ndarray], inputs: list[Tensor] | None = None
) -> None:
    """Scale channels of a network in place.

    Args:
        model: a plain network.
        factors: what to divide inputs ``[I]`` by, by the first of the linears that read them.
        inputs: what is on its way there.
    """
    layers = dict(model.named_sublayers())
    for name, factor_I in factors.items():
        names = next(group for group in MAKERS if name.endswith(group[0]))
        prefix = name.removesuffix(names[0])
        readers = [layers[prefix + one] for one in names]
        factor = paddle.to_tensor(factor_I)
        move(layers[prefix + MAKERS[names]], readers, [] if inputs is None else inputs, factor)


def sample(inputs: list[Tensor]) -> Tensor:
    """Return some of the tokens of ``[..., I]`` parts as float32 ``[T, I]``."""
    x = paddle.concat([part.flatten(0, -2) for part in inputs]).astype("float32")
    chosen = np.linspace(0, x.shape[0] - 1, min(TOKENS, x.shape[0])).astype(np.int64)
    return paddle.gather(x, paddle.to_tensor(chosen))


def rounded(weight_IO: np.ndarray, config: QuantConfig) -> np.ndarray:
    """Return weights on the grid that :func:`~.linear.round_to_nearest` gives them.

    Args:
        weight_IO: float32, as the network has it: groups of inputs are rows that lie together.
        config: widths and groups of this linear.
    """
    groups = config.groups(weight_IO.shape[0])
    rows = weight_IO.reshape(groups, -1, weight_IO.shape[1])
    limit = limit_of(config.weight_bits)
    largest = np.maximum(rows.max(1), -rows.min(1))
    scale = to_bfloat16(np.maximum(largest / limit, SMALLEST_SCALE))[:, None]
    on_grid = rows / scale
    np.rint(on_grid, out=on_grid)
    np.clip(on_grid, -limit, limit, out=on_grid)
    on_grid *= scale
    return on_grid.reshape(weight_IO.shape)


def output_error(
    weight_IO: np.ndarray,
    x_TI: Tensor,
    config: QuantConfig,
    wanted_TO: Tensor,
    factor_I: np.ndarray,
) -> np.ndarray:
    """Return the mean square error ``[O]`` of a linear's outputs if it were rounded.

    Args:
        weight_IO: float32.
        x_TI: its inputs.
        config: its widths and groups.
        wanted_TO: its outputs, without a bias.
        factor_I: what inputs would be divided by first.
    """
    x_TI = x_TI / paddle.to_tensor(factor_I)
    if config.activation_bits is not None:
        x_TI = round_tokens(x_TI, config.activation_bits)
    weight = paddle.to_tensor(rounded(weight_IO * factor_I[:, None], config))
    return ((paddle.matmul(x_TI, weight) - wanted_TO) ** 2).mean(0).numpy()


def best_factor(
    linears: list[Linear], x_TI: Tensor, config: QuantConfig, *, scaled: bool
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Search what to divide inputs by before linears that read them are rounded.

    Args:
        linears: plain.
        x_TI: their inputs.
        config: their widths and groups.
        scaled: whether something makes the channels that can divide them.

    Returns:
        The factor ``[I]``, and the mean square error ``[O]`` of each linear's outputs with it.
    """
    size = (x_TI**2).mean(0).sqrt().numpy()
    size[size == 0] = 1.0  # channels that are silent on these tokens may not be on others
    weights = [linear.weight.astype("float32") for linear in linears]
    wanted = [paddle.matmul(x_TI, weight) for weight in weights]
    narrow = [weight.numpy() for weight in weights]

    def errors(factor: np.ndarray, step: int) -> list[np.ndarray]:
        return [
            output_error(weight[:, ::step], x_TI, config, outs[:, ::step], factor)
            for weight, outs in zip(narrow, wanted, strict=True)
        ]

    best, least = np.ones_like(size), np.inf
    for exponent in _EXPONENTS if scaled else ():
        factor = size ** np.float32(exponent)
        factor /= np.sqrt(factor.max() * factor.min())
        # A part of the outputs says which exponent is best.
        total = float(sum(error.sum() for error in errors(factor, _OUTPUTS)))
        if total < least:
            best, least = factor, total
    return best, errors(best, 1)


def output_gradients(model: LlamaForCausalLM, ids_NS: np.ndarray) -> dict[str, np.ndarray]:
    """Return the mean square ``[O]`` of the loss's gradient at each linear's outputs, by name.

    Args:
        model: a plain network; no parameter gets a gradient.
        ids_NS: int64 rows, of which each token's successor is predicted.
    """
    squares: dict[str, Tensor] = {}
    inner = [name for group in SAME_INPUT for name in group]
    hooks = []

    def watch(name: str, linear: nn.Layer) -> None:
        def keep(grad: Tensor) -> None:
            found = (grad.flatten(0, -2).astype("float32") ** 2).sum(0)
            squares[name] = squares[name] + found if name in squares else found

        def behind(_: nn.Layer, __: object, out: Tensor) -> None:
            out.register_hook(keep)

        hooks.append(linear.register_forward_post_hook(behind))

    for number in model.model.layers.numbers:
        for name in inner:
            whole = f"model.layers.{number}.{name}"
            watch(whole, dict(model.named_sublayers())[whole])
    frozen = [p for p in model.parameters() if not p.stop_gradient]
    training = model.training
    try:
        model.eval()
        for parameter in frozen:
            parameter.stop_gradient = True
        for row in ids_NS:
            _backward(model, row)
    finally:
        for parameter in frozen:
            parameter.stop_gradient = False
        for hook in hooks:
            hook.remove()
        model.train() if training else model.eval()
    return {name: total.numpy() / ids_NS.size for name, total in squares.items()}


def _backward(model: LlamaForCausalLM, row: np.ndarray) -> None:
    """Send the gradient of the row's summed losses back to the embedding."""
    ids = paddle.to_tensor(row[None])
    x = model.model.embed_tokens(ids)
    x.stop_gradient = False
    hidden = model.model.norm(model.decode(x, model.model.layers.numbers, len(row)))
    losses, _ = model.hidden_losses(hidden[:, :-1], ids[0, 1:])
    losses.sum().backward()


def costly(
    errors: dict[str, np.ndarray],
    gradients: dict[str, np.ndarray],
    sizes: dict[str, int],
    share: float,
) -> list[str]:
    """Return the linears that gain the most from 8 bits, for what these take.

    Linears of a layer that read the same inputs keep one width, since kernels join them.

    Args:
        errors: of outputs, by name.
        gradients: mean squares there.
        sizes: weights of each linear.
        share: of all weights, at most.
    """
    together: dict[str, list[str]] = {}
    for name in errors:
        prefix, inner = name.split(".", 3)[:3], name.split(".", 3)[3]
        first = next(group[0] for group in SAME_INPUT if inner in group)
        together.setdefault(".".join((*prefix, first)), []).append(name)
    cost = {name: float((error * gradients[name]).sum()) for name, error in errors.items()}
    cost = {key: sum(cost[name] for name in names) for key, names in together.items()}
    weights = {key: sum(sizes[name] for name in names) for key, names in together.items()}
    left, chosen = share * sum(weights.values()), []
    for key in sorted(cost, key=lambda key: cost[key] / weights[key], reverse=True):
        if weights[key] <= left:
            left -= weights[key]
            chosen += together[key]
    return sorted(chosen)
