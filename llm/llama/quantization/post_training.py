"""A trained network rounded in place, and what there is to report about it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from llm.config.tools import QuantizeArguments
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.calibration import quantize_calibrated
from llm.llama.quantization.network import (
    is_quantized,
    linears,
    quantize_model,
    quantized_linears,
)
from llm.llama.quantization.progress import ENDING, Arrays, Progress, described
from llm.llama.quantization.scaling import apply, costly, output_errors, output_gradients
from llm.llama.quantization.smoothing import smooth

REPORT_NAME = "quantization_report.json"
_PREPARED, _WIDE = "prepared", "wide"  # names in what is kept of a run
_FEW = 8  # rows that say enough of how far to scale channels, and of what errors cost


def linear_bytes(model: LlamaForCausalLM, names: set[str]) -> int:
    """Return the memory of the named linears' weights and scales."""
    layers = dict(model.named_sublayers())
    tensors = [t for name in names for t in (*layers[name].parameters(), *layers[name].buffers())]
    return sum(int(t.size) * t.element_size() for t in tensors)


def progress_of(args: QuantizeArguments, rows: np.ndarray | None) -> Progress | None:
    """Return what an earlier run with the same settings has left beside the output directory.

    Raises:
        UserError: what lies there is of other settings.
    """
    model = Path(str(args.model_name_or_path))
    if rows is None or not args.calibrates or not model.is_dir():
        return None
    names = ("quant_type", "group_size", "embedding_type", "damping", "smooth", "scaling")
    settings = {name: getattr(args, name) for name in (*names, "wide_share")}
    output = Path(str(args.output_dir))
    place = output.with_name(output.name + ENDING)
    return Progress(place, described(model, rows, **settings))


def quantize(
    model: LlamaForCausalLM,
    args: QuantizeArguments,
    rows: np.ndarray | None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Round a network in place and return what there is to report about it.

    Args:
        model: a plain network.
        args: type, method and their settings.
        rows: calibration rows, where the settings want them.
        progress: what is done already, and where to keep more.

    Raises:
        UserError: a network that is quantized, or settings that do not fit it.
    """
    if is_quantized(model):
        raise UserError(
            f"{args.model_name_or_path} is quantized already; give the model it was made from, or "
            "widen it with --dequantize true"
        )
    whole = linears(model, QuantConfig.of_type(args.quant_type))
    sizes = [layer.weight.shape[0] for layer in whole.values()]
    embedding_bits = args.embedding_bits(model.config.tie_word_embeddings)
    config = QuantConfig.of_type(args.quant_type, args.groups(sizes), embedding_bits)
    before = linear_bytes(model, set(linears(model, config)))
    if rows is not None:
        config = _prepare(model, config, args, rows, progress)
    if rows is not None and args.calibrates:
        quantize_calibrated(model, config, rows, damping=args.damping, progress=progress)
    else:
        quantize_model(model, config)
    names = {name for name, _ in quantized_linears(model)}
    report: dict[str, Any] = {
        "quant_type": config.kind,
        "method": "gptq" if args.calibrates else "rtn",
        "smooth": args.smooth,
        "scaling": "search" if args.scales else "none",
        "group_size": config.group_size,
        "embedding_bits": config.embedding_bits,
        "wide": list(config.wide),
        "linears": len(names),
        "linear_bytes": {"before": before, "after": linear_bytes(model, names)},
    }
    if rows is not None:
        report["calibration"] = {
            "file": Path(str(args.calibration_file)).name,
            "rows": rows.shape[0],
            "length": rows.shape[1],
            "damping": args.damping,
        }
    return report


def _prepare(
    model: LlamaForCausalLM,
    config: QuantConfig,
    args: QuantizeArguments,
    rows: np.ndarray,
    progress: Progress | None,
) -> QuantConfig:
    """Scale channels as asked for, and return the description with what takes 8 bits."""
    if args.smooth:
        smooth(model, rows, args.smooth)
    if not (args.scales or args.wide_share):
        return config
    done = progress.load(_PREPARED) if progress is not None else None
    if done is None:
        done = _search(model, config, args, rows)
        if progress is not None:
            progress.store(_PREPARED, done)
    else:
        apply(model, {name: factor for name, factor in done.items() if name != _WIDE})
    return replace(config, wide=tuple(done[_WIDE].tolist()))


def _search(
    model: LlamaForCausalLM, config: QuantConfig, args: QuantizeArguments, rows: np.ndarray
) -> Arrays:
    """Scale channels, and return by what, with the names of what takes 8 bits."""
    few = rows[np.linspace(0, len(rows) - 1, min(_FEW, len(rows))).astype(np.int64)]
    errors, factors = output_errors(model, config, few, scale=args.scales)
    wide: list[str] = []
    if args.wide_share:
        sizes = {name: int(layer.weight.size) for name, layer in linears(model, config).items()}
        wide = costly(errors, output_gradients(model, few), sizes, args.wide_share)
    return {**factors, _WIDE: np.array(wide, dtype=np.str_)}
