"""What one rank computes in a step, and on what device, in the terms of the formulas."""

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import Any

from common.devices import GPU, kind_of
from common.errors import UserError
from external_ops.modes import CHUNK_NUMBERS, LARGEST_CHUNK
from llm.llama.adapters.lora_config import LoRAConfig
from llm.llama.config import LlamaConfig

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
        fused_swiglu: SwiGLU by a kernel that keeps its inputs only.
        fused_norm: RMSNorm by a kernel that keeps its input only.
        fused_head: head and loss in chunks.
        chunk_numbers: scores of a chunk.
        offload: moments and master weights lie in host memory.
        overlap: communication and copies run beside computation where they can.
        lora_rank: rank of the adapters; 0 is none.
        lora_targets: linears that have one, as in ``LlamaConfig.linears``; None is all of them.
        lora_dropout: whether the adapters' inputs are dropped out.
        prefix: virtual tokens of a tuned prefix; 0 is none. Without either, all weights train.
        prefix_projection: it is made by a perceptron while it trains.
        prefix_hidden: the perceptron's width; None is that of a layer's keys.
        pairs: a sample is two rows, the better answer and the worse one.
        scored: tokens of a micro-batch that have labels; None is all.
        eval_batch: samples of an evaluation's batch; 0 evaluates nothing.
        eval_length: tokens in its longest row; None is ``seq_length``.
        eval_scored: its tokens that have labels; None is all.

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
    fused_swiglu: bool = False
    fused_norm: bool = False
    fused_head: bool = False
    chunk_numbers: int = CHUNK_NUMBERS
    offload: bool = False
    overlap: bool = False
    lora_rank: int = 0
    lora_targets: tuple[str, ...] | None = None
    lora_dropout: bool = False
    prefix: int = 0
    prefix_projection: bool = False
    prefix_hidden: int | None = None
    pairs: bool = False
    scored: int | None = None
    eval_batch: int = 0
    eval_length: int | None = None
    eval_scored: int | None = None

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
        """Samples of an update on one replica of the model."""
        return self.micro_batch * self.accumulation

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch * (1 + self.pairs) * self.seq_length

    @property
    def frozen(self) -> bool:
        """Whether the network's own weights have no gradients."""
        return self.lora_rank > 0 or self.prefix > 0

    def adapts(self, linear: str) -> bool:
        """Return whether one of ``LlamaConfig.linears`` has LoRA matrices."""
        return self.lora_rank > 0 and (self.lora_targets is None or linear in self.lora_targets)

    def evaluating(self) -> "Workload":
        """Return the forward passes of an evaluation, as a workload of their own."""
        return self.replace(
            micro_batch=self.eval_batch,
            seq_length=self.eval_length or self.seq_length,
            scored=self.eval_scored,
            recompute="none",
        )

    def replace(self, **changes: Any) -> "Workload":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def of(
        cls, shape: LlamaConfig, model: Any, run: Any, seq_length: int, adaptation: Any = None
    ) -> "Workload":
        """Read the fields of a run.

        Args:
            shape: the network.
            model: ``llm.config.network.NetworkArguments``.
            run: ``llm.config.training.TrainArguments``.
            seq_length: longest row in tokens.
            adaptation: ``llm.config.finetune.AdaptationArguments``; None trains all weights.
        """
        half = "bfloat16" if run.bf16 else "float16" if run.fp16 else "float32"
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
            fused_swiglu=kind_of(run.device) == GPU and model.takes("swiglu"),
            fused_norm=model.takes("rms_norm"),
            fused_head=model.takes("cross_entropy"),
            chunk_numbers=LARGEST_CHUNK if kind_of(run.device) == GPU else CHUNK_NUMBERS,
            offload=run.offload_mode == "static",
            overlap=run.overlap_communication,
            eval_batch=run.per_device_eval_batch_size if run.do_eval else 0,
            **({} if adaptation is None else _adapted(shape, adaptation)),
        )


def _adapted(shape: LlamaConfig, adaptation: Any) -> dict[str, Any]:
    """Return the fields that say what a finetuning run trains."""
    fields: dict[str, Any] = {"pairs": adaptation.dpo}
    if adaptation.lora:
        names = {
            f"model.layers.{layer}.{linear}": linear
            for linear in shape.linears
            for layer in range(shape.num_hidden_layers)
        }
        chosen = LoRAConfig(target_modules=adaptation.targets).targets([*names, "lm_head"])
        fields |= {
            "lora_rank": adaptation.lora_rank,
            "lora_dropout": adaptation.lora_dropout > 0,
            "lora_targets": tuple(dict.fromkeys(names[one] for one in chosen if one in names)),
        }
    if adaptation.prefix_tuning:
        fields |= {
            "prefix": adaptation.num_prefix_tokens,
            "prefix_projection": adaptation.prefix_projection,
            "prefix_hidden": adaptation.prefix_projection_hidden_size,
        }
    return fields


@dataclass(frozen=True)
class Hardware:
    """One device and its links; bandwidths are bytes per second in one direction.

    Args:
        name: of the device.
        memory: bytes on the device, as the vendor counts: GB of 10**9.
        half: dense half-precision FLOP/s.
        single: FLOP/s of float32 products (TF32 where the device has it).
        memory_bandwidth: of the device's memory.
        inside: of links between the devices of a machine, for each device.
        outside: of the network between machines, for each device.
        host: of the link to host memory.
    """

    name: str
    memory: float
    half: float
    single: float
    memory_bandwidth: float
    inside: float
    outside: float
    host: float


_ALL = (
    Hardware("H100", 80e9, 989e12, 494e12, 3.35e12, 450e9, 50e9, 64e9),
    Hardware("H200", 141e9, 989e12, 494e12, 4.8e12, 450e9, 50e9, 64e9),
    Hardware("H800", 80e9, 989e12, 494e12, 3.35e12, 200e9, 50e9, 64e9),
    Hardware("H20", 96e9, 148e12, 74e12, 4.0e12, 450e9, 50e9, 64e9),
    Hardware("A100", 80e9, 312e12, 156e12, 2.039e12, 300e9, 25e9, 32e9),
    Hardware("A800", 80e9, 312e12, 156e12, 2.039e12, 200e9, 25e9, 32e9),
    Hardware("A100-40", 40e9, 312e12, 156e12, 1.555e12, 300e9, 25e9, 32e9),
    Hardware("L40S", 48e9, 362e12, 183e12, 0.864e12, 32e9, 12.5e9, 32e9),
    Hardware("V100", 32e9, 125e12, 15.7e12, 0.9e12, 150e9, 12.5e9, 16e9),
)
DEVICES = {device.name: device for device in _ALL}


def hardware(name: str) -> Hardware:
    """Return a device by its name.

    Raises:
        UserError: with the names there are.
    """
    if name not in DEVICES:
        raise UserError(f"gpu={name!r} is not one of {', '.join(DEVICES)}")
    return DEVICES[name]
