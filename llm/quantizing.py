"""Post-training quantization put together: text, rounding, figures, and the finished directory."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data.tokenizer import Tokenizer
from llm.config.evaluation import EvaluateArguments
from llm.config.quantization import QuantizeArguments
from llm.errors import UserError
from llm.evaluation.perplexity import Document, perplexity
from llm.evaluation.scorer import NetworkScorer
from llm.evaluation.tasks import PerplexityTask
from llm.files import new_directory
from llm.llama.build import save_model
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.quantization.calibration import quantize_calibrated
from llm.llama.quantization.config import QuantConfig
from llm.llama.quantization.network import (
    is_quantized,
    linears,
    quantize_model,
    quantized_linears,
)
from llm.llama.quantization.smoothing import smooth

REPORT_NAME = "quantization_report.json"


def check_paths(args: QuantizeArguments) -> None:
    """Refuse paths that would fail after the work, or overwrite something.

    Raises:
        UserError: text that is not there, or an output directory with contents.
    """
    for name in ("calibration_file", "eval_file"):
        value = getattr(args, name)
        if value is None or (name == "calibration_file" and not args.reads_text):
            continue
        if not any(Path(f"{value}{ending}").is_file() for ending in ("", ".idx", ".npz")):
            raise UserError(f"{name}={value} is neither a text file nor a token store prefix")
    output = Path(str(args.output_dir))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output_dir={output} is not empty; give a new directory")


def read_documents(file: str, tokenizer: Tokenizer, limit: int | None = None) -> list[Document]:
    """Return the documents of a text file or token store, as evaluate_generation.py reads them."""
    return PerplexityTask(file, EvaluateArguments(limit=limit), tokenizer).documents


def calibration_rows(documents: list[Document], samples: int, length: int) -> np.ndarray:
    """Cut text into rows, spread evenly over all of it.

    Args:
        documents: of the calibration file; joined.
        samples: rows wanted; fewer when the text is short.
        length: tokens of a row.

    Returns:
        int64 ``[N, S]``.

    Raises:
        UserError: less text than one row.
    """
    ids = np.concatenate([np.asarray(document.ids, np.int64) for document in documents])
    available = len(ids) // length
    if available == 0:
        raise UserError(
            f"the calibration text has {len(ids)} tokens, less than one row of {length}; give more "
            "text or a smaller calibration_length"
        )
    chosen = np.linspace(0, available - 1, min(samples, available)).astype(np.int64)
    return ids[: available * length].reshape(available, length)[chosen]


def measure(model: LlamaForCausalLM, documents: list[Document], length: int) -> float:
    """Return the perplexity per token, in windows of ``length`` that do not overlap."""
    return perplexity(NetworkScorer(model, max_length=length), documents).token_perplexity


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
    config = QuantConfig.of_type(args.quant_type, args.groups)
    if is_quantized(model):
        raise UserError(
            f"{args.model_name_or_path} is quantized already; give the model it was made from"
        )
    before = linear_bytes(model, set(linears(model, config)))
    if rows is not None and args.smooth:
        smooth(model, rows, args.smooth)
    if rows is not None and args.calibrates:
        quantize_calibrated(model, config, rows, damping=args.damping)
    else:
        quantize_model(model, config)
    names = {name for name, _ in quantized_linears(model)}
    report: dict[str, Any] = {
        "quant_type": config.kind,
        "method": "gptq" if args.calibrates else "rtn",
        "smooth": args.smooth,
        "group_size": config.group_size,
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


def table(report: dict[str, Any]) -> str:
    """Return the figures before and after, one line each."""
    rows = [("linears, MB", *(report["linear_bytes"][k] / 1e6 for k in ("before", "after")))]
    if "perplexity" in report:
        figures = report["perplexity"]
        rows.append(("perplexity", figures["before"], figures["after"]))
    lines = [f"{'':14}{'before':>12}{'after':>12}{'change':>10}"]
    for name, before, after in rows:
        lines.append(f"{name:14}{before:12.3f}{after:12.3f}{100 * (after / before - 1):+9.2f}%")
    return "\n".join(lines)


def save(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    directory: Path,
    report: dict[str, Any] | None = None,
) -> None:
    """Write model, tokenizer and any report; the directory appears once it is complete.

    Raises:
        OSError: a full or unwritable disk; there is no output directory then.
    """
    with new_directory(directory) as temporary:
        save_model(model, temporary)
        tokenizer.save(temporary)
        if report is not None:
            text = json.dumps(report, indent=2) + "\n"
            (temporary / REPORT_NAME).write_text(text, encoding="utf-8")
