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
from llm.llama.quantization.scaling import costly, output_errors, output_gradients
from llm.llama.quantization.smoothing import smooth

REPORT_NAME = "quantization_report.json"
_FEW = 8  # rows that say enough of how far to scale channels, and of what errors cost


def linear_bytes(model: LlamaForCausalLM, names: set[str]) -> int:
    """Return the memory of the named linears' weights and scales."""
    layers = dict(model.named_sublayers())
    tensors = [t for name in names for t in (*layers[name].parameters(), *layers[name].buffers())]
    return sum(int(t.size) * t.element_size() for t in tensors)


def quantize(
    model: LlamaForCausalLM, args: QuantizeArguments, rows: np.ndarray | None
) -> dict[str, Any]:
    """Round a network in place and return what there is to report about it.

    Args:
        model: a plain network.
        args: type, method and their settings.
        rows: calibration rows, where the settings want them.

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
    config = QuantConfig.of_type(args.quant_type, args.groups(sizes))
    before = linear_bytes(model, set(linears(model, config)))
    if rows is not None:
        config = _prepare(model, config, args, rows)
    if rows is not None and args.calibrates:
        quantize_calibrated(model, config, rows, damping=args.damping)
    else:
        quantize_model(model, config)
    names = {name for name, _ in quantized_linears(model)}
    report: dict[str, Any] = {
        "quant_type": config.kind,
        "method": "gptq" if args.calibrates else "rtn",
        "smooth": args.smooth,
        "scaling": "search" if args.scales else "none",
        "group_size": config.group_size,
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
    model: LlamaForCausalLM, config: QuantConfig, args: QuantizeArguments, rows: np.ndarray
) -> QuantConfig:
    """Scale channels as asked for, and return the description with what takes 8 bits."""
    if args.smooth:
        smooth(model, rows, args.smooth)
    if not (args.scales or args.wide_share):
        return config
    few = rows[np.linspace(0, len(rows) - 1, min(_FEW, len(rows))).astype(np.int64)]
    errors = output_errors(model, config, few, scale=args.scales)
    if not args.wide_share:
        return config
    sizes = {name: int(layer.weight.size) for name, layer in linears(model, config).items()}
    wide = costly(errors, output_gradients(model, few), sizes, args.wide_share)
    return replace(config, wide=tuple(wide))
