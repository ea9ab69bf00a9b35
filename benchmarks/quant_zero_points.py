"""Four bits with zero points, computed by a reference, for quant_table.py.

    python benchmarks/quant_zero_points.py MODEL TARGET --group_size 32 --calibration_file FILE

The suite's grids have none. This does what quantize_generation.py does for W4 (scaling by search,
GPTQ, 8 bits for a tied embedding) but gives each group a zero point of 4 bits beside its scale:
16 steps from anywhere below 0 to anywhere above. TARGET becomes MODEL's directory with what such
integers stand for, in float32; ``rounded.json`` in it says what they would take.

I inputs, O outputs, N groups.
"""

import argparse
import itertools
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from quant_gguf import DESCRIPTION
from record import ROOT

sys.path.insert(0, str(ROOT))

from llm import runtime

if __name__ == "__main__":  # before paddle is imported
    runtime.prepare()
    runtime.load_paddle()

import paddle

from data.tokenizer import load_tokenizer
from llm.evaluation.quantized import calibration_rows, read_documents
from llm.llama.build import load_model
from llm.llama.files.dtypes import to_bfloat16
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.calibration import (
    Stops,
    second_moments,
    visit_layers,
)
from llm.llama.quantization.embedding import (
    dequantize_embedding,
    quantize_embedding,
)
from llm.llama.quantization.gptq import Curvature, round_in_order
from llm.llama.quantization.network import linears
from llm.llama.quantization.scaling import output_errors
from llm.llama.saving import save_directory

_SHARES = np.linspace(1.0, 0.64, 10)
_STEPS = 15  # from the least of 16 integers to the largest
_MOVES = (0, -1, 1)  # of the zero point, from where the least weight wants it


def search(
    weight_IO: np.ndarray, importance_I: np.ndarray, groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return scales and integer zero points ``[N, O]`` with the least weighted squared error."""
    found = [
        _search_group(*one)
        for one in zip(np.split(weight_IO, groups), np.split(importance_I, groups), strict=True)
    ]
    scales, zeros = zip(*found, strict=True)
    return np.stack(scales), np.stack(zeros)


def _search_group(weight_IO: np.ndarray, importance_I: np.ndarray) -> tuple[np.ndarray, ...]:
    low, high = np.minimum(weight_IO.min(0), 0), np.maximum(weight_IO.max(0), 0)
    importance = importance_I.astype(np.float32)
    best = np.full(low.shape, np.inf, np.float32)
    scale, zero = np.empty_like(low), np.empty_like(low)
    for share, move in itertools.product(_SHARES, _MOVES):
        step = to_bfloat16(np.maximum((high - low) * np.float32(share / _STEPS), 1e-30))
        point = np.clip(np.rint(-low * np.float32(share) / step) + move, 0, _STEPS)
        off = np.clip(np.rint(weight_IO / step) + point, 0, _STEPS)
        off = (off - point) * step - weight_IO
        error = importance @ (off * off)
        better = error < best
        best[better], scale[better], zero[better] = error[better], step[better], point[better]
    return scale, zero


def rounded(weight_IO: np.ndarray, curvature: Curvature, groups: int) -> np.ndarray:
    """Return what a weight becomes."""
    order = curvature.order_I
    of_input = order // (len(order) // groups)
    scale_NO, zero_NO = search(weight_IO, curvature.diagonal_I, groups)
    # A grid with a zero point is one without, moved: GPTQ's errors are the same ones.
    moved = (zero_NO - 8) * scale_NO
    steps = scale_NO[of_input]
    integers = round_in_order(
        weight_IO[order] + moved[of_input], steps, curvature.factor_II, (-8, 7)
    )
    out = np.empty_like(weight_IO)
    out[order] = integers * steps - moved[of_input]
    return out


@dataclass(frozen=True)
class Taken:
    """What rounded linears would take."""

    linear_bytes: int
    types: dict[str, int]


def round_network(model, rows_NS: np.ndarray, config: QuantConfig) -> Taken:  # type: ignore[no-untyped-def]
    """Round a network's linears in place, one decoder layer after the other."""
    layers = linears(model, config)
    few = rows_NS[np.linspace(0, len(rows_NS) - 1, min(8, len(rows_NS))).astype(np.int64)]
    output_errors(model, config, few, scale=True)
    quantize_embedding(model, config)
    size = 0

    def visit(prefix: str, stops: Stops) -> None:
        nonlocal size
        for names, inputs in stops:
            curvature = Curvature.of(second_moments(inputs), name=names[0])
            for name in names:
                weight = layers[f"{prefix}.{name}"].weight
                groups = config.groups(weight.shape[0])
                made = rounded(weight.numpy(), curvature, groups)
                weight.set_value(made)
                # Integers and zero points of 4 bits, scales of 32 as the suite's files have them.
                size += made.size // 2 + groups * made.shape[1] * 9 // 2

    visit_layers(model, rows_NS, visit, "rounding with zero points")
    dequantize_embedding(model, "float32")
    return Taken(size, {"W4 with zero points": len(layers)})


def main(args: argparse.Namespace) -> None:
    """Round and write."""
    tokenizer = load_tokenizer(args.model)
    documents = read_documents(str(args.calibration_file), tokenizer)
    rows = calibration_rows(documents, args.calibration_samples, args.calibration_length)
    model = load_model(args.model, dtype="float32")
    config = QuantConfig.of_type("W4", args.group_size, embedding_bits=8)
    with paddle.no_grad():
        taken = round_network(model, rows, config)
    save_directory(model, tokenizer, args.target, documents={DESCRIPTION: asdict(taken)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--group_size", type=int, required=True)
    parser.add_argument("--calibration_file", type=Path, required=True)
    parser.add_argument("--calibration_samples", type=int, default=128)
    parser.add_argument("--calibration_length", type=int, default=256)
    main(parser.parse_args())
