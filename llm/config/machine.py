"""Arguments about the machine: where something runs, and by which kernels.

Names follow PaddleNLP's Llama examples, so that command lines written for them keep working.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from common import devices
from common.errors import UserError
from common.flags import arg, did_you_mean
from external_ops.modes import MODES, OPS, OTHERS
from llm import runtime
from llm.parallel.rules import launched


def parse_ops(words: Iterable[str]) -> dict[str, str]:
    """Return modes by op from words such as ``fused`` and ``rms_norm=reference``.

    Args:
        words: each a mode for the ops that are not named, or OP=MODE; commas separate words too.

    Raises:
        UserError: an unknown op or mode, or one op twice.
    """
    modes: dict[str, str] = {}
    for word in ",".join(words).replace(",", " ").split():
        op, equals, mode = word.partition("=")
        if not equals:
            op, mode = OTHERS, word
        elif op not in OPS:
            raise UserError(
                f"--ops: unknown op {op!r}; there are {', '.join(OPS)}" + did_you_mean(op, OPS)
            )
        if mode not in MODES:
            raise UserError(
                f"--ops: {word!r} asks for {mode!r}, which is not one of {', '.join(MODES)}"
                + did_you_mean(mode, MODES)
            )
        if modes.setdefault(op, mode) != mode:
            raise UserError(f"--ops: {op} is given twice, as {modes[op]} and as {mode}; keep one")
    return modes


@dataclass
class KernelArguments:
    """Which kernel runs each op."""

    ops: list[str] = arg(
        [],
        "auto, fused or reference for all ops, OP=MODE for one, or both: --ops fused "
        "causal_attention=reference; ops: " + ", ".join(OPS),
    )

    def validate(self) -> None:
        """Refuse unknown ops and modes.

        Raises:
            UserError: the message names the nearest spelling.
        """
        parse_ops(self.ops)

    @property
    def op_modes(self) -> dict[str, str]:
        """Modes by op, for ``external_ops.backend.select_ops``."""
        return parse_ops(self.ops)


@dataclass
class DeviceArguments:
    """Where to run."""

    device: str = arg(
        devices.AUTO,
        "where to run: cpu, gpu, gpu:1, dcu, xpu, npu, or another type that Paddle lists; auto is "
        "what this machine and the installed Paddle have",
    )
    threads: int | None = arg(None, "CPU threads; all cores when not given", minimum=1)

    def validate(self) -> None:
        """Decide what ``auto`` is: from here on ``device`` names one.

        Raises:
            UserError: a word that is no device, a card beside a launcher that chooses cards, or
                cards of the launcher's where there are none.
        """
        devices.check(self.device, launched())
        if self.device == devices.AUTO:
            self.device = runtime.resolve_device(self.device)
            devices.check_given(self.device, launched())

    @property
    def device_kind(self) -> str:
        """The device without its card."""
        return devices.kind_of(self.device)


def check_alone(work: str) -> None:
    """Refuse several launched processes for work that one does.

    Raises:
        UserError: names their number.
    """
    if launched() > 1:
        raise UserError(
            f"{launched()} processes were launched, but {work} runs in one; start it without "
            "paddle.distributed.launch"
        )
