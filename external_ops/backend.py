"""The one place that chooses kernels.

``auto`` takes the fused form where the device has one and says once what it took; ``fused`` raises
where there is none; ``reference`` is plain Paddle ops everywhere.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import Tensor

from external_ops import (
    cross_entropy,
    flash_attention,
    paged_attention,
    rms_norm,
    rotary,
    tiled_attention,
)

MODES = ("auto", "fused", "reference")

_log = logging.getLogger(__name__)
_said: set[str] = set()


@dataclass(frozen=True)
class Ops:
    """The kernels that a network was built with; signatures are those of the references."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    causal_attention: Callable[..., Tensor]
    paged_attention: Callable[..., Tensor]
    cross_entropy: Callable[..., cross_entropy.Result]


_FUSED: dict[str, dict[str, Callable[..., Any]]] = {
    "rms_norm": {
        "cpu": rms_norm.rms_norm_fused_cpu,
        "gpu": rms_norm.rms_norm_fused_gpu,
    },
    "causal_attention": {
        "cpu": tiled_attention.causal_attention_tiled,
        "gpu": flash_attention.causal_attention_gpu,
    },
    "cross_entropy": {
        "cpu": cross_entropy.cross_entropy_chunked,
        "gpu": cross_entropy.cross_entropy_chunked,
    },
}

_REFERENCE: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm.rms_norm_ref,
    "causal_attention": flash_attention.causal_attention_ref,
    "cross_entropy": cross_entropy.cross_entropy_ref,
}


def _choose(op: str, mode: str, device: str) -> Callable[..., Any]:
    if mode not in MODES:
        raise ValueError(f"{op}: mode {mode!r} is not one of {', '.join(MODES)}")
    fused = _FUSED[op].get(device)
    if mode == "fused" and fused is None:
        raise ValueError(f"no fused {op} on {device}; choose 'auto' or 'reference'")
    taken = "reference" if mode == "reference" or fused is None else "fused"
    message = f"{op} on {device}: {taken} kernel"
    if mode == "auto" and fused is None:
        message += " (no fused one here: slower and more memory on long sequences)"
    if message not in _said:
        _said.add(message)
        _log.info(message)
    return fused if taken == "fused" and fused is not None else _REFERENCE[op]


def select_ops(
    *,
    rms_norm_mode: str = "auto",
    attention_mode: str = "auto",
    cross_entropy_mode: str = "auto",
    device: str | None = None,
) -> Ops:
    """Choose one kernel per op.

    Args:
        rms_norm_mode: one of :data:`MODES`.
        attention_mode: one of :data:`MODES`.
        cross_entropy_mode: one of :data:`MODES`.
        device: ``cpu`` or ``gpu``; None asks Paddle.

    Raises:
        ValueError: an unknown mode, or ``fused`` where the device has no such kernel.
    """
    if device is None:
        device = "gpu" if paddle.get_device().startswith("gpu") else "cpu"
    return Ops(
        rms_norm=_choose("rms_norm", rms_norm_mode, device),
        rotary=rotary.rotary,
        causal_attention=_choose("causal_attention", attention_mode, device),
        paged_attention=paged_attention.paged_attention_ref,
        cross_entropy=_choose("cross_entropy", cross_entropy_mode, device),
    )
