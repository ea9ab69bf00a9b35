"""Predicted time of decoding and of training on a GPU, from counted operators, bytes and FLOPs.

    python -m llm.planner.operators [--gpu H100]

Prints the tables of docs/devices.md. No GPU has run them: what is counted is counted on the
rehearsal device (tests/device/test_sampling.py holds the numbers), what is assumed is named here.
"""

from common.ending import run_script  # isort: split

from dataclasses import dataclass

from common.flags import arg, load
from llm.llama.config import PRESETS, LlamaConfig
from llm.planner.step import PRODUCTS
from llm.planner.workload import DEVICES, Hardware, hardware

# Assumptions: host time of an operator that Python dispatches, host time of a read from the device
# behind which nothing is queued, the least time between two kernels, and the share of the data
# sheet's bandwidth that large reads reach.
DISPATCH = 7e-6
READ = 20e-6
KERNEL = 2e-6
BANDWIDTH = 0.85


@dataclass(frozen=True)
class Counts:
    """What one decoding step takes, as counted on the rehearsal device.

    Args:
        layer: operators of a layer.
        others: operators outside of layers, those that choose greedy tokens among them.
        layer_reads: reads of the device in a layer.
        reads: reads of the device outside of layers.
    """

    layer: int
    others: int
    layer_reads: int
    reads: int


# ``--ops reference`` and the forms that ``auto`` takes.
PLAIN = Counts(layer=129, others=41, layer_reads=10, reads=1)
FUSED = Counts(layer=8, others=28, layer_reads=0, reads=1)
# Operators of a layer forward in training, by the form of all ops; none reads from the device.
TRAINING = {"reference": 85, "auto": 35, "float8": 91}
# GPUs whose cuBLAS multiplies float8 by blocks, twice as fast as half precision.
FLOAT8 = ("H100", "H200", "H800", "H20")


def layer_weights(shape: LlamaConfig) -> int:
    """Return the weights of a layer's linears."""
    return sum(a * b for a, b in shape.linears.values())


def decode_bytes(shape: LlamaConfig, rows: int, context: int, weight_bytes: float) -> float:
    """Return what a decoding step has to read: weights, the output matrix, keys and values.

    Args:
        shape: the network.
        rows: sequences that decode together.
        context: positions of each.
        weight_bytes: of a weight of the layers, scales included; the rest has two bytes.
    """
    layers = shape.num_hidden_layers
    keys = 2 * shape.num_key_value_heads * shape.head_dim * 2 * context * rows * layers
    return (
        layer_weights(shape) * layers * weight_bytes
        + shape.vocab_size * shape.hidden_size * 2
        + keys
    )


def decode_bound(
    shape: LlamaConfig, device: Hardware, rows: int, context: int, weight_bytes: float
) -> float:
    """Return the roofline's seconds of a decoding step: bytes or FLOPs, whichever takes longer."""
    weights = layer_weights(shape) * shape.num_hidden_layers + shape.vocab_size * shape.hidden_size
    moved = decode_bytes(shape, rows, context, weight_bytes) / device.memory_bandwidth
    return max(moved, 2 * weights * rows / device.half)


def decode_seconds(
    shape: LlamaConfig,
    device: Hardware,
    counts: Counts,
    rows: int,
    context: int,
    weight_bytes: float,
    widened: bool = False,
) -> float:
    """Return the seconds of a decoding step.

    The host runs ahead of the device unless layers read from it; then their times add up.

    Args:
        shape, device, rows, context, weight_bytes: as of :func:`decode_bytes`.
        counts: of the step.
        widened: integer weights are widened to float32 for each product: written, read and cast.
    """
    layers = shape.num_hidden_layers
    operators = counts.layer * layers + counts.others
    moved = decode_bytes(shape, rows, context, weight_bytes)
    if widened:  # integers to float32, scaled, cast to half precision and read by the product
        moved += layer_weights(shape) * layers * (4 + 4 + 4 + 4 + 2 + 2)
    bound = decode_bound(shape, device, rows, context, weight_bytes)
    on_device = max(moved / (device.memory_bandwidth * BANDWIDTH), bound) + operators * KERNEL
    on_host = operators * DISPATCH
    waits = (counts.layer_reads * layers + counts.reads) * READ
    together = on_device + on_host if counts.layer_reads else max(on_device, on_host)
    return together + waits


def layer_passes(shape: LlamaConfig, fused: bool) -> float:
    """Return the bytes that a token moves through a layer's rotation and gate, there and back.

    Half precision, each operator reads its inputs and writes its output once. Plain rotation of
    width w: two halves made contiguous (2 w), cosines and sines beside them (w), four products (4 w
    with their inputs), a sum and a difference (3 w), joined (2 w); one kernel: 2 w. Plain gate of
    width f: 5 f and back 8 f; one kernel each way: 3 f and 5 f.
    """
    width = (shape.num_attention_heads + shape.num_key_value_heads) * shape.head_dim
    ffn = shape.intermediate_size
    return 2.0 * ((2 * 2 * width + 8 * ffn) if fused else (2 * 12 * width + 13 * ffn))


def loss_bytes(shape: LlamaConfig, tokens: int, chunk: int) -> float:
    """Return the bytes that the gradient of the output matrix moves, all chunks together.

    A chunk's product is written in half precision, widened, and added to the float32 gradient.
    """
    chunks = -(-tokens // max(1, chunk // shape.vocab_size))
    return chunks * shape.vocab_size * shape.hidden_size * (2 + 2 + 4 + 4 + 4 + 4.0)


def rounding_bytes(shape: LlamaConfig, tokens: int) -> float:
    """Return the bytes that rounding to float8 moves in a layer, there and back.

    Forward inputs and weight are read in half precision and written in float8; back both again, and
    the gradient once for two results.
    """
    inputs, outputs = (sum(one) for one in zip(*shape.linears.values(), strict=True))
    return (6.0 * inputs + 4.0 * outputs) * tokens + 6.0 * layer_weights(shape)


def train_seconds(
    shape: LlamaConfig, device: Hardware, tokens: int, form: str, chunk: int
) -> float:
    """Return the seconds of a forward and a backward pass of so many tokens, rows of 4096.

    The host runs ahead of the device, which waits between two kernels; a kernel forward is taken to
    have one backward.

    Args:
        shape: the network.
        device: where it runs.
        tokens: of a micro-batch.
        form: a key of :data:`TRAINING`; all but ``reference`` rotate and gate by one kernel each.
        chunk: logits of the loss that exist at a time.
    """
    bandwidth = device.memory_bandwidth * BANDWIDTH
    fused, float8 = form != "reference", form == "float8"
    products = train_bound(shape, device, tokens, float8) / PRODUCTS
    hidden, layers = 2 * shape.hidden_size, shape.num_hidden_layers
    # Two norms with their sums: 5 passes there, 7 back.
    norms = 2 * 12 * hidden * tokens * layers
    passes = layer_passes(shape, fused) * tokens * layers + norms
    passes += rounding_bytes(shape, tokens) * layers if float8 else 0
    logits = 20.0 * shape.vocab_size * tokens  # float32, written and read for its statistics, twice
    moved = (passes + logits + loss_bytes(shape, tokens, chunk)) / bandwidth
    kernels = 2 * TRAINING[form] * layers
    return max(products + moved + kernels * KERNEL, kernels * DISPATCH)


def train_bound(shape: LlamaConfig, device: Hardware, tokens: int, float8: bool = False) -> float:
    """Return the roofline's seconds of both passes: layers' linears in float8 take half as long."""
    saved = 3.0 * tokens * layer_weights(shape) * shape.num_hidden_layers if float8 else 0
    return (train_flops(shape, tokens) - saved) / device.half


def train_flops(shape: LlamaConfig, tokens: int) -> float:
    """Return the FLOPs of a forward and a backward pass; the chunked loss scores twice."""
    scores = 2 * shape.num_attention_heads * shape.head_dim * 4096  # half of the square is hidden
    layer = 2 * layer_weights(shape) + scores
    return tokens * (3 * layer * shape.num_hidden_layers + 8 * shape.vocab_size * shape.hidden_size)


def decode_table(device: Hardware) -> list[str]:
    """Return the rows of Markdown for decoding."""
    rows = [
        "| decoding | plain operators | fused | roofline |",
        "|---|---|---|---|",
    ]
    kinds = (("bfloat16", 2.0), ("W8", 1.0), ("W4, groups of 128", 0.5 + 2 / 128))
    for name, size, batch in (("8B", "llama-3-8b", 1), ("8B", "llama-3-8b", 32)):
        for kind, weight in kinds:
            shape, place = PRESETS[size], (batch, 2048, weight)
            plain = decode_seconds(shape, device, PLAIN, *place, widened=weight < 2)
            fused = decode_seconds(shape, device, FUSED, *place)
            bound = decode_bound(shape, device, *place)
            cells = " | ".join(f"{1e3 * one:.1f} ms" for one in (plain, fused, bound))
            rows.append(f"| {name} {kind}, {batch} x 2048 positions | {cells} |")
    return rows


def train_table(device: Hardware) -> list[str]:
    """Return the rows of Markdown for training."""
    rows = ["| forward and backward | plain operators | fused | roofline |", "|---|---|---|---|"]
    shape, tokens = PRESETS["llama-3-8b"], 8192
    plain = train_seconds(shape, device, tokens, "reference", 2**25)
    for kind in ("bfloat16", "float8")[: 2 if device.name in FLOAT8 else 1]:
        form = "float8" if kind == "float8" else "auto"
        fused = train_seconds(shape, device, tokens, form, 2**28)
        bound = train_bound(shape, device, tokens, form == "float8")
        cells = " | ".join(f"{1e3 * one:.0f} ms" for one in (plain, fused, bound))
        rows.append(f"| 8B {kind}, {tokens} tokens | {cells} |")
    return rows


@dataclass
class OperatorsArguments:
    """The GPU that the tables are for."""

    gpu: str = arg("H100", "GPU to predict for", choices=tuple(DEVICES))


def main() -> None:
    """Print both tables."""
    description = "Predict the time of decoding and training steps from counted operators."
    groups = (OperatorsArguments,)
    (args,) = load(groups, prog="python -m llm.planner.operators", description=description)
    device = hardware(args.gpu)
    print("\n".join([*decode_table(device), "", *train_table(device)]))


if __name__ == "__main__":
    run_script(main)
