"""Names of the ops and of the ways to choose their kernels; loads nothing else."""

from collections.abc import Mapping

OPS = (
    "rms_norm",
    "add_rms_norm",
    "rotary",
    "swiglu",
    "causal_attention",
    "paged_attention",
    "cross_entropy",
    "frozen_matmul",
    "adamw",
    "decoder",
    "low_rank",
    "sample",
)
MODES = ("auto", "fused", "reference")

# The mode of every op that is not named itself.
OTHERS = "others"

Modes = Mapping[str, str]


# Logits of the chunked loss that exist at a time: 128 MiB in float32, and what a GPU may take.
CHUNK_NUMBERS = 2**25
LARGEST_CHUNK = 2**28


def chunk_numbers(device_bytes: float) -> int:
    """Return how many logits of the chunked loss may exist at a time on a device.

    Each chunk adds to the gradient of the whole output matrix, so large ones are faster; in float32
    one takes at most a 64th of the memory.

    Args:
        device_bytes: its memory; 0 where that is not known.
    """
    numbers = LARGEST_CHUNK
    while numbers > CHUNK_NUMBERS and 4 * numbers * 64 > device_bytes:
        numbers //= 2
    return numbers


def mode_of(op: str, modes: Modes) -> str:
    """Return the mode of one op."""
    return modes.get(op, modes.get(OTHERS, "auto"))


def merged(flags: Modes, modes: Modes) -> Modes:
    """Put modes on top of what flags ask for; a mode for all others replaces all flags."""
    return modes if OTHERS in modes else {**flags, **modes}


def modes_of_flags(
    flash_attention: bool | None, fused_rms_norm: bool | None, fused_loss: bool
) -> dict[str, str]:
    """Return what the flags ``--use_flash_attention`` and so on ask for; None is not given."""
    asked = {
        "causal_attention": flash_attention,
        "rms_norm": fused_rms_norm,
        "add_rms_norm": fused_rms_norm,
        "cross_entropy": fused_loss,
    }
    return {op: "reference" if fused is False else "auto" for op, fused in asked.items()}
