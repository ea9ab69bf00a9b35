"""What an adapter was trained over, where that is not simply the model it names.

PEFT's configuration names the base and has no field for its integers, so a file beside it,
``base_quantization.json``, says how the base was quantized, and whether its files are or it was
rounded while it was read.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from llm.llama.quant_config import QuantConfig

FILE_NAME = "base_quantization.json"


@dataclass(frozen=True)
class BaseRecord:
    """The integers under an adapter.

    Args:
        quantization: widths and groups.
        rounded_by: ``weight_quantize_algo`` where a base in floating point was rounded while it was
            read; None where its files hold the integers.
    """

    quantization: QuantConfig
    rounded_by: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the file's content; ``quantization_config`` is that of a config.json."""
        return {
            "weight_quantize_algo": self.rounded_by,
            "quantization_config": self.quantization.to_hf(),
        }


def read_record(directory: str | Path) -> BaseRecord | None:
    """Return what lies beside an adapter; None where its base had no integers, or nobody wrote it.

    Raises:
        UserError: a damaged file.
    """
    file = Path(directory) / FILE_NAME
    if not file.is_file():
        return None
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        quantization = QuantConfig.from_hf(raw["quantization_config"], str(file))
        return BaseRecord(quantization, raw["weight_quantize_algo"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: {error!r}") from error


def difference(record: BaseRecord | None, base: QuantConfig | None) -> str:
    """Return how a base differs from the one that an adapter was trained over, or nothing.

    Args:
        record: beside the adapter.
        base: what the base at hand is quantized with.
    """
    if record is None or record.quantization == base:
        return ""
    there = described(record.quantization)
    here = "not quantized" if base is None else described(base)
    return f"the adapter was trained over a base in {there}, this one is {here}"


def described(quantization: QuantConfig) -> str:
    """Return a quantization in words, such as ``W4 in groups of 128, the embedding in 8 bits``."""
    size = quantization.group_size
    said = quantization.kind + ("" if size is None else f" in groups of {size}")
    wide = [f"{len(quantization.wide)} linears"] if quantization.wide else []
    others = [*wide, *(["the embedding"] if quantization.embedding_bits else [])]
    return said + (f", {' and '.join(others)} in 8 bits" if others else "")
