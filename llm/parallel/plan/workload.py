"""What one rank computes in a step, in the terms of the formulas."""

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import Any

from llm.errors import UserError

PRECISIONS = ("float32", "bfloat16", "float16")
RECOMPUTE = ("none", "core_attn", "full_attn", "full")


@dataclass(frozen=True)
class Workload:
    """Batches, precision and what is kept in memory; everything of a run but shape and layout.

    Args:
        micro_batch: rows that go through the network at once.
        accumulation: micro-batches of an update on one rank.
        seq_length: tokens in a row.
        precision: of the matrix products, one of :data:`PRECISIONS`.
        level: ``O2`` keeps weights in that precision and float32 masters beside them; ``O1`` keeps
            float32 weights and casts them for each product.
        master_grad: gradients are added up in float32.
        recompute: one of :data:`RECOMPUTE`.
        recompute_layers: how many layers, the first ones, are recomputed; None is all.
        recompute_offload: inputs of recomputed layers lie in host memory.
        flash: attention by a kernel that does not keep all scores.
        tiled: of such kernels, the CPU's without the native ops: it keeps the weights of the lower
            triangle.
        native: the native ops run: SwiGLU keeps its inputs only, the fused loss its logits.
        fused_norm: RMSNorm by a kernel that keeps its input only.
        fused_head: head and loss in chunks.
        offload: moments and master weights lie in host memory.
        lora_rank: rank of the adapters of every linear; 0 trains all weights.
        lora_dropout: whether the adapters' inputs are dropped out.

    Raises:
        UserError: a value that is none of those listed.
    """

    micro_batch: int = 1
    accumulation: int = 1
    seq_length: int = 1024
    precision: str = "float32"
    level: str = "O2"
    master_grad: bool = False
    recompute: str = "none"
    recompute_layers: int | None = None
    recompute_offload: bool = False
    flash: bool = False
    tiled: bool = False
    native: bool = False
    fused_norm: bool = False
    fused_head: bool = False
    offload: bool = False
    lora_rank: int = 0
    lora_dropout: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("precision", PRECISIONS), ("recompute", RECOMPUTE)):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}"
                )

    @property
    def half(self) -> bool:
        """Whether activations take two bytes."""
        return self.precision != "float32"

    @property
    def activation_bytes(self) -> int:
        """Bytes of one number of a hidden state."""
        return 2 if self.half else 4

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight."""
        return 2 if self.half and self.level == "O2" else 4

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one number of a gradient."""
        return 4 if self.master_grad else self.weight_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of AdamW's state for each trained weight: two moments, and the master's."""
        return 8 + (4 if self.weight_bytes == 2 else 0)

    @property
    def rows(self) -> int:
        """Rows of an update on one replica of the model."""
        return self.micro_batch * self.accumulation

    def replace(self, **changes: Any) -> "Workload":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def of(cls, model: Any, run: Any, seq_length: int, adaptation: Any = None) -> "Workload":
        """Read the fields of a run.

        Args:
            model: ``llm.config.training.NetworkArguments``.
            run: ``llm.config.training.TrainArguments``.
            seq_length: longest row in tokens.
            adaptation: ``llm.config.finetune.AdaptationArguments``; None trains all weights.
        """
        half = "bfloat16" if run.bf16 else "float16" if run.fp16 else "float32"
        lora = adaptation is not None and adaptation.lora
        # Found, not loaded: planning gets by without Paddle.
        native = importlib.util.find_spec("llama_paddle_ops") is not None
        return cls(
            micro_batch=run.per_device_train_batch_size,
            accumulation=run.gradient_accumulation_steps,
            seq_length=seq_length,
            precision=half if run.fp16_opt_level != "O0" else "float32",
            level=run.fp16_opt_level,
            master_grad=run.amp_master_grad and half != "float32",
            recompute=run.recompute_granularity if run.recompute else "none",
            recompute_layers=run.recompute_num_layers,
            recompute_offload=run.recompute_offload,
            flash=model.takes("causal_attention"),
            tiled=run.device == "cpu" and not native,
            native=run.device == "cpu" and native and model.takes("swiglu"),
            fused_norm=model.takes("rms_norm"),
            fused_head=model.takes("cross_entropy"),
            offload=run.offload_mode == "static",
            lora_rank=adaptation.lora_rank if lora else 0,
            lora_dropout=lora and adaptation.lora_dropout > 0,
        )
