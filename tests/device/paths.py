"""Every path of the suite on devices, and what was shown of it in which role.

docs/devices.md shows this table; tests/device/test_paths.py runs it, and holds the page against it.
"""

from dataclasses import dataclass, field
from typing import Any

HALF = {"bf16": 1, "fp16_opt_level": "O2"}
PACKED = {"packing": 1, "max_seq_length": 128}


@dataclass(frozen=True)
class Training:
    """A way to train that is compared with float32 on a CPU.

    Args:
        kind: ``pretrain`` or ``finetune``.
        flags: of the way itself.
        half: of its precision.
        band: how far a loss may be from float32's.
        resumed: whether the run is also resumed, and has to give the same bits.
    """

    kind: str
    flags: dict[str, Any] = field(default_factory=dict)
    half: dict[str, Any] = field(default_factory=lambda: HALF)
    band: float = 2e-2
    resumed: bool = False


O1 = {"bf16": 1, "fp16_opt_level": "O1"}
FP16 = {"fp16": 1, "scale_loss": 1024}
RESUMED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}

OFFLOAD = {
    "amp_master_grad": 1,
    "recompute": 1,
    "recompute_offload": 1,
    "offload_optim": "static",
}

TRAINING = {
    "pretraining, bfloat16 O1, resumed": Training("pretrain", half=O1, resumed=True),
    "pretraining, bfloat16 O2, resumed": Training("pretrain", resumed=True),
    "pretraining, float16 O1, resumed": Training(
        "pretrain", half=FP16 | {"fp16_opt_level": "O1"}, resumed=True
    ),
    "pretraining, float16 O2, resumed": Training(
        "pretrain", half=FP16 | {"fp16_opt_level": "O2"}, resumed=True
    ),
    "master gradients, recomputing, offload": Training("pretrain", half=HALF | OFFLOAD),
    "all weights": Training("finetune"),
    "LoRA": Training("finetune", {"lora": 1}, resumed=True),
    "packed rows, O1": Training("finetune", PACKED, O1),
    "packed rows, O2": Training("finetune", PACKED),
    "LoRA on packed rows": Training("finetune", PACKED | {"lora": 1}),
    "prefix": Training("finetune", {"prefix_tuning": 1, "num_prefix_tokens": 4}),
    "DPO": Training("finetune", {"dpo": 1, "lora": 1, "task_name": "preference"}),
    "quantization-aware training": Training("finetune", {"qat": 1}),
}
# What opens a trained model, by the test of tests/device/test_paths.py that runs it.
OPENED = {
    "perplexity, evaluated": "test_evaluation",
    "answers, evaluated": "test_answers_are_evaluated",
    "predicting, bfloat16": "test_predicting[bfloat16",
    "predicting, float16": "test_predicting[float16",
    "predicting, W8 and W4": "test_integer_weights",
    "export and inference": "test_export_and_inference",
    "serving": "test_serving",
}
LAYOUTS = {
    "tensor": "tensor parallel",
    "sequence": "sequence parallel",
    "pipeline": "pipeline",
    "ring": "context parallel, ring",
    "ulysses": "context parallel, Ulysses",
    "stage1": "ZeRO stage 1",
    "stage2": "ZeRO stage 2",
    "stage3": "ZeRO stage 3",
}
ROLES = ("gpu", "itself")
# Run by `make test`; the others by `make rehearse-all`.
QUICK = {
    ("pretraining, bfloat16 O1, resumed", "gpu"),
    ("prefix", "gpu"),
    ("DPO", "gpu"),
}


RAN, FLOAT32, REFUSED = "ran on hardware", "ran on hardware, float32", "refused"
REHEARSED, NOT = "rehearsed", "not shown"


def states() -> dict[str, tuple[str, str, str]]:
    """Return what was shown of each path: on a CPU, as a GPU, and as another device."""
    found = {}
    for name, way in TRAINING.items():
        # Pretraining in half precision is refused on CPUs; finetuning goes on in float32.
        found[name] = REFUSED if way.kind == "pretrain" else FLOAT32, REHEARSED, REHEARSED
    for name in OPENED:
        found[name] = REFUSED if "float16" in name.split() else RAN, REHEARSED, REHEARSED
    for name in LAYOUTS.values():
        found[f"two ranks, {name}"] = FLOAT32, REHEARSED, REHEARSED
    return found | {
        "two ranks, data parallel": (FLOAT32, REHEARSED, NOT),
        "two ranks, communication beside computation": (FLOAT32, REHEARSED, NOT),
        "offloaded state copied beside updates": (NOT, REHEARSED, REHEARSED),
        "two ranks, float16 with an overflow on one": (REFUSED, REHEARSED, NOT),
        "four ranks, every recipe of configs for GPUs": (NOT, REHEARSED, NOT),
        "100 updates in bfloat16 beside float32": (REFUSED, REHEARSED, NOT),
        "float8 products, resumed": (REFUSED, REHEARSED, REFUSED),
        "a card by its number": (REFUSED, REHEARSED, REHEARSED),
        "generation with the fast forms of GPUs": (REFUSED, REHEARSED, REFUSED),
        "fast forms at the sizes of 8B and 70B": (REFUSED, "InferMeta only", REFUSED),
        "speed": (RAN, NOT, NOT),
        "memory at full size, several machines": (NOT, NOT, NOT),
        "CUDA kernels of this suite": (REFUSED, NOT, NOT),
    }
