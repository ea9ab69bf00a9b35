"""Which kernel runs each op, as a flag of every script that makes a network."""

from collections.abc import Iterable
from dataclasses import dataclass

from external_ops.modes import MODES, OPS, OTHERS
from llm.config.loader import arg, did_you_mean
from llm.errors import UserError


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
