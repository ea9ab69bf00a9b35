"""The one place that chooses kernels.

``auto`` takes the best that the device has and says once what it took; ``fused`` raises where there
is no single kernel for the op; ``reference`` is plain Paddle operators everywhere.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import paddle
from paddle import Tensor

from external_ops import (
    adamw,
    cross_entropy,
    decoder,
    flash_attention,
    native,
    paged_attention,
    rms_norm,
    rotary,
    swiglu,
    tiled_attention,
)
from external_ops.modes import MODES, OPS, OTHERS, Modes, mode_of

Kernel = Callable[..., Any]

_log = logging.getLogger(__name__)
_said: set[str] = set()


@dataclass(frozen=True)
class Ops:
    """The kernels that a network was built with; signatures are those of the references."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    causal_attention: Callable[..., Tensor]
    paged_attention: Callable[..., Tensor]
    cross_entropy: Callable[..., cross_entropy.Result]
    adamw: Callable[..., paddle.optimizer.Optimizer]
    decoder: Callable[..., Tensor] | None


@dataclass(frozen=True)
class Forms:
    """What there is of an op; those by device are looked up under ``cpu`` and ``gpu``.

    ``auto`` prefers ``paddle``, ``native``, ``plain``, ``reference``, in this order.

    Args:
        reference: plain Paddle operators, the definition of the op; None where those are the other
            ops, which run one by one then.
        plain: a better form that is still made of Paddle's operators.
        native: calls a kernel of csrc/.
        paddle: Paddle's own kernel for the op.
    """

    reference: Kernel | None
    plain: dict[str, Kernel] = field(default_factory=dict)
    native: dict[str, Kernel] = field(default_factory=dict)
    paddle: dict[str, Kernel] = field(default_factory=dict)


FORMS: dict[str, Forms] = {
    "rms_norm": Forms(
        rms_norm.rms_norm_ref,
        plain={"cpu": rms_norm.rms_norm_fused_cpu},
        native={"cpu": rms_norm.rms_norm_native},
        paddle={"gpu": rms_norm.rms_norm_fused_gpu},
    ),
    "add_rms_norm": Forms(rms_norm.add_rms_norm_ref, native={"cpu": rms_norm.add_rms_norm_native}),
    "rotary": Forms(rotary.rotary, native={"cpu": rotary.rotary_native}),
    "swiglu": Forms(swiglu.swiglu_ref, native={"cpu": swiglu.swiglu_native}),
    "causal_attention": Forms(
        flash_attention.causal_attention_ref,
        plain={"cpu": tiled_attention.causal_attention_tiled},
        native={"cpu": flash_attention.causal_attention_native},
        paddle={"gpu": flash_attention.causal_attention_gpu},
    ),
    "paged_attention": Forms(
        paged_attention.paged_attention_ref,
        native={"cpu": paged_attention.paged_attention_native},
    ),
    "cross_entropy": Forms(
        cross_entropy.cross_entropy_ref,
        plain=dict.fromkeys(("cpu", "gpu"), cross_entropy.cross_entropy_chunked),
        native={"cpu": cross_entropy.cross_entropy_native},
    ),
    "adamw": Forms(paddle.optimizer.AdamW, native={"cpu": adamw.FusedAdamW}),
    "decoder": Forms(None, native={"cpu": decoder.decoder_native}),
}


def _check(modes: Modes) -> None:
    for op, mode in modes.items():
        if op not in OPS and op != OTHERS:
            raise ValueError(f"{op!r} is not an op; there are {', '.join(OPS)}")
        if mode not in MODES:
            raise ValueError(f"{op}: mode {mode!r} is not one of {', '.join(MODES)}")


def _fused(op: str, device: str) -> tuple[str, Kernel] | None:
    """Return the single kernel for an op and whose it is, or None."""
    forms = FORMS[op]
    if device in forms.paddle:
        return "Paddle", forms.paddle[device]
    if device in forms.native and native.available(device):
        return "native", forms.native[device]
    return None


def _choose(op: str, mode: str, device: str) -> tuple[str, Kernel | None]:
    """Return where a kernel comes from, in a word, and the kernel."""
    forms = FORMS[op]
    if mode == "reference":
        return "reference", forms.reference
    found = _fused(op, device)
    if found is not None:
        return found
    if mode == "fused":
        why = native.reason(device) if device in forms.native else "none was written"
        raise ValueError(f"no fused {op} on {device}: {why}; or choose auto or reference")
    return "plain", forms.plain.get(device, forms.reference)


def _tell(taken: dict[str, str], missed: bool, device: str) -> None:
    """Log one line about a choice, the first time that it is made, on the first process."""
    by_source: dict[str, list[str]] = {}
    for op, source in taken.items():
        by_source.setdefault(source, []).append(op)
    parts = [f"{source} {', '.join(ops)}" for source, ops in by_source.items()]
    message = f"kernels on {device}: {'; '.join(parts)}"
    if missed:
        message = f"{native.reason(device)}; ops run on plain Paddle operators"
    elif "native" in by_source:
        message += f" (native: {native.level() if device == 'cpu' else 'CUDA'})"
    if message not in _said and os.environ.get("PADDLE_TRAINER_ID", "0") == "0":
        _said.add(message)
        _log.log(logging.WARNING if missed else logging.INFO, message)


def select_ops(modes: Modes | None = None, *, device: str | None = None) -> Ops:
    """Choose one kernel per op.

    Args:
        modes: one of :data:`~external_ops.modes.MODES` for each op by name, and under
            :data:`~external_ops.modes.OTHERS` for those that are not named, ``auto`` without it.
            There, ``fused`` means every op for which somebody wrote a kernel for the device.
        device: ``cpu`` or ``gpu``; None asks Paddle.

    Raises:
        ValueError: an unknown op or mode, or ``fused`` where there is no such kernel.
    """
    modes = modes or {}
    _check(modes)
    if device is None:
        device = "gpu" if paddle.get_device().startswith("gpu") else "cpu"
    kernels, taken, missed = {}, {}, False
    for op in OPS:
        mode, forms = mode_of(op, modes), FORMS[op]
        if mode == "fused" and op not in modes and device not in forms.native | forms.paddle:
            mode = "auto"
        taken[op], kernels[op] = _choose(op, mode, device)
        missed |= taken[op] == "plain" and device in forms.native
    _tell(taken, missed, device)
    return Ops(**kernels)
