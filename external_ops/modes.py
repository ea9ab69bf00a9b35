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
    "adamw",
    "decoder",
)
MODES = ("auto", "fused", "reference")

# The mode of every op that is not named itself.
OTHERS = "others"

Modes = Mapping[str, str]


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
