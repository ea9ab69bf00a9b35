"""Arguments of quantization: while training, and of a trained model."""

from dataclasses import dataclass

from llm.config.loader import arg


@dataclass
class QATArguments:
    """Training that already computes with the rounding of low-precision weights."""

    qat: bool = arg(False, "quantization-aware training: straight-through rounding in the linears")
    qat_type: str = arg(
        "A8W8",
        "A8W8: 8-bit activations and weights; W4: 4-bit weights; A8W4",
        choices=("A8W8", "W4", "A8W4"),
    )
