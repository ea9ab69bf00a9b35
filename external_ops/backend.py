"""The one place that chooses kernels.

``auto`` takes the best that the device has; ``fused`` raises where there is no single kernel for
the op; ``reference`` is plain Paddle operators everywhere. What was taken, and why, is said once,
and is part of the result.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import paddle
from paddle import Tensor

from external_ops import (
    adamw,
    block_decoder,
    cross_entropy,
    decoder,
    devices,
    flash_attention,
    frozen_head,
    frozen_matmul,
    low_rank,
    native,
    paged_attention,
    rms_norm,
    rotary,
    sampling,
    swiglu,
    tiled_attention,
)
from external_ops.modes import MODES, OPS, OTHERS, Modes, mode_of

Kernel = Callable[..., Any]
# The kind of device of forms that run on all of them.
ANY = "any"

_log = logging.getLogger(__name__)
_said: set[str] = set()


@dataclass(frozen=True)
class Choice:
    """Which form of an op was taken.

    Args:
        op: its name.
        form: ``paddle``, ``native``, ``plain`` or ``reference``, as in :class:`Forms`.
        level: instruction set of a native form, ``CUDA`` on a GPU; empty for the other forms.
        why: the mode, and what it found.
    """

    op: str
    form: str
    level: str
    why: str


@dataclass(frozen=True)
class Ops:
    """The kernels that a network was built with; signatures are those of the references.

    Args:
        choices: which forms these are, a row for each op.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    causal_attention: Callable[..., Tensor]
    paged_attention: Callable[..., Tensor]
    cross_entropy: Callable[..., cross_entropy.Result]
    frozen_matmul: Callable[..., Tensor]
    adamw: Callable[..., paddle.optimizer.Optimizer]
    decoder: Callable[..., Tensor] | None
    low_rank: Callable[..., Tensor]
    sample: Callable[..., Any]
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Forms:
    """What there is of an op; those by device are looked up under its kind, ``cpu`` or ``gpu``.

    Other kinds have what stands under :data:`ANY`, and else the reference: Paddle has, say,
    FlashAttention on some of them, but nobody has seen ours on it.

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
    "add_rms_norm": Forms(
        rms_norm.add_rms_norm_ref,
        native={"cpu": rms_norm.add_rms_norm_native},
        paddle={"gpu": rms_norm.add_rms_norm_fused_gpu},
    ),
    "rotary": Forms(
        rotary.rotary,
        native={"cpu": rotary.rotary_native},
        paddle={"gpu": rotary.rotary_gpu},
    ),
    "swiglu": Forms(
        swiglu.swiglu_ref,
        native={"cpu": swiglu.swiglu_native},
        paddle={"gpu": swiglu.swiglu_gpu},
    ),
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
        plain={ANY: cross_entropy.cross_entropy_chunked},
        native={"cpu": frozen_head.cross_entropy_over_frozen},
    ),
    "frozen_matmul": Forms(
        frozen_matmul.frozen_matmul_ref, native={"cpu": frozen_matmul.frozen_matmul_native}
    ),
    "adamw": Forms(paddle.optimizer.AdamW, native={"cpu": adamw.FusedAdamW}),
    "decoder": Forms(
        None,
        native={"cpu": decoder.decoder_native},
        paddle={"gpu": block_decoder.decoder_blocks},
    ),
    "low_rank": Forms(low_rank.low_rank_ref, native={"cpu": low_rank.low_rank_native}),
    "sample": Forms(sampling.sample_ref, native={"cpu": sampling.sample_native}),
}

# Of Paddle's kernels: from which compute capability on they run, and what they do not compute.
_NEEDS = {
    "causal_attention": ("FlashAttention", (8, 0)),
    "decoder": ("block_multihead_attention with FlashAttention", (8, 0)),
}
_LIMITS = {
    "causal_attention": " for half precision; float32 takes the reference",
    "add_rms_norm": " for the norm; the sum goes before it",
    "decoder": " for attention over blocks; eight operators a layer",
}


def _check(modes: Modes) -> None:
    for op, mode in modes.items():
        if op not in OPS and op != OTHERS:
            raise ValueError(f"{op!r} is not an op; there are {', '.join(OPS)}")
        if mode not in MODES:
            raise ValueError(f"{op}: mode {mode!r} is not one of {', '.join(MODES)}")


def _gpus() -> int:
    return paddle.device.cuda.device_count() if paddle.device.is_compiled_with_cuda() else 0


def _unfit(op: str, device: str) -> str:
    """Return why this machine's GPU does not run Paddle's kernel of an op, or an empty string."""
    if device != "gpu" or op not in _NEEDS or not _gpus():
        return ""
    name, needed = _NEEDS[op]
    capability = paddle.device.cuda.get_device_capability()
    if capability >= needed:
        return ""
    found, wanted = (".".join(map(str, one)) for one in (capability, needed))
    return f"{name} needs compute capability {wanted}, this GPU has {found}"


def _choose(op: str, mode: str, device: str) -> tuple[Choice, Kernel | None]:
    forms = FORMS[op]
    if mode == "reference":
        return Choice(op, "reference", "", "reference: as the flags say"), forms.reference
    unfit = _unfit(op, device)
    if device in forms.paddle and not unfit:
        why = f"{mode}: Paddle has a kernel{_LIMITS.get(op, '')}"
        return Choice(op, "paddle", "", why), forms.paddle[device]
    if device in forms.native and native.available(device):
        level = native.level() if device == "cpu" else "CUDA"
        return Choice(op, "native", level, f"{mode}: the best there is"), forms.native[device]
    unwritten = unfit or f"no kernel was written for {device}"
    if mode == "fused":
        why = native.reason(device) if device in forms.native else unwritten
        raise ValueError(f"no fused {op} on {device}: {why}; or choose auto or reference")
    why = "library not loaded" if device in forms.native else unwritten
    plain = forms.plain.get(device, forms.plain.get(ANY))
    form = "reference" if plain is None else "plain"
    return Choice(op, form, "", f"{mode}: {why}"), plain or forms.reference


def _written(op: str, device: str) -> bool:
    """Whether somebody wrote a kernel of an op that this device could run."""
    return device in FORMS[op].native or (device in FORMS[op].paddle and not _unfit(op, device))


def table(choices: Sequence[Choice]) -> str:
    """Return rows of op, form, level and reason under a heading, in columns."""
    rows = [("op", "form", "level", "why"), *((c.op, c.form, c.level, c.why) for c in choices)]
    return in_columns(rows)


def in_columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows as lines whose cells begin below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _tell(choices: Sequence[Choice], missed: bool, device: str) -> None:
    """Log a table of choices, the first time that they are made, on the first process."""
    message = f"ops on {device}:\n{table(choices)}"
    if message in _said or os.environ.get("PADDLE_TRAINER_ID", "0") != "0":
        return
    _said.add(message)
    _log.log(logging.INFO, message)
    if missed:
        line = f"{native.reason(device)}; ops run on plain Paddle operators"
        _log.log(logging.WARNING, line)


def select_ops(modes: Modes | None = None, *, device: str | None = None) -> Ops:
    """Choose one kernel per op.

    Args:
        modes: one of :data:`~external_ops.modes.MODES` for each op by name, and under
            :data:`~external_ops.modes.OTHERS` for those that are not named, ``auto`` without it.
            There, ``fused`` means every op for which somebody wrote a kernel for the device.
        device: its kind, ``cpu``, ``gpu`` or another; None asks Paddle.

    Raises:
        ValueError: an unknown op or mode, or ``fused`` where there is no such kernel.
    """
    modes = modes or {}
    _check(modes)
    if device is None:
        device = devices.current()
    kernels: dict[str, Any] = {}
    choices, missed = [], False
    for op in OPS:
        mode = mode_of(op, modes)
        if mode == "fused" and op not in modes and not _written(op, device):
            mode = "auto"
        choice, kernels[op] = _choose(op, mode, device)
        choices.append(choice)
        replaced = choice.form in ("plain", "reference") and mode != "reference"
        missed |= replaced and device in FORMS[op].native
    _tell(choices, missed, device)
    return Ops(**kernels, choices=tuple(choices))
