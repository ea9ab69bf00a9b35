"""What quantization costs: text to calibrate and to measure on, and the figures as a table."""

from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import check_directory
from data.conversations.instruct_store import open_instruct
from data.conversations.tasks import calibration_files
from data.tokenizer import Tokenizer, load_tokenizer
from llm.config.evaluation import EvaluateArguments
from llm.config.tools import QuantizeArguments
from llm.evaluation.perplexity import Document, perplexity
from llm.evaluation.scorer import NetworkScorer
from llm.evaluation.tasks import PerplexityTask
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.quantization.network import quantization_of


def check_paths(args: QuantizeArguments) -> None:
    """Refuse paths that would fail after the work, or overwrite something.

    Raises:
        UserError: text that is not there, or an output directory with contents.
    """
    if args.dataset_path is not None and args.reads_text:
        calibration_files(args.dataset_path)
    for name in ("calibration_file", "eval_file"):
        value = getattr(args, name)
        if value is None or (name == "calibration_file" and not args.reads_text):
            continue
        if not any(Path(f"{value}{ending}").is_file() for ending in ("", ".idx", ".npz")):
            raise UserError(f"{name}={value} is neither a text file nor a token store prefix")
    check_directory(str(args.output_dir), "output_dir", "the quantized model")


def read_documents(file: str, tokenizer: Tokenizer, limit: int | None = None) -> list[Document]:
    """Return the documents of a text file or token store, as evaluate_generation.py reads them."""
    return PerplexityTask(file, EvaluateArguments(limit=limit), tokenizer).documents


def calibration_text(args: QuantizeArguments, tokenizer: Tokenizer) -> list[Document]:
    """Return the documents to calibrate on: text, or examples as they would be trained on.

    Raises:
        DataError: nothing there, or examples that cannot be used.
    """
    if args.dataset_path is None:
        return read_documents(str(args.calibration_file), tokenizer)
    if tokenizer.chat_template is None:
        place = args.tokenizer_name_or_path or str(args.model_name_or_path)
        tokenizer = load_tokenizer(place, chat_template="plain")
    data = open_instruct(calibration_files(args.dataset_path), tokenizer, raw=True)
    return [Document(data.document(index)[0]) for index in range(len(data))]


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


def rounding_note(network: Any) -> str | None:
    """Say what a network's figures depend on that rounds its inputs; None for others.

    Args:
        network: a ``LlamaForCausalLM``, or None for an exported program.
    """
    found = None if network is None else quantization_of(network)
    if found is None or found.activation_bits is None:
        return None
    forms = ", ".join(f"{choice.op} {choice.form}" for choice in network.ops.choices)
    return (
        "inputs are rounded to 8 bits while running, from numbers whose last digits depend on the "
        "kernels: other --ops give a slightly other perplexity (docs/quantization.md); these are "
        f"{forms}"
    )


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
