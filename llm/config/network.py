"""Arguments about the network that is trained: which one, from where, and by which kernels."""

from dataclasses import dataclass

from common.errors import UserError
from common.flags import arg, meant
from external_ops.modes import OTHERS, merged, mode_of, modes_of_flags
from llm.config.machine import KernelArguments

_OPS_OF = {
    "use_flash_attention": ("causal_attention",),
    "use_fused_rms_norm": ("rms_norm", "add_rms_norm"),
    "use_fused_head_and_loss_fn": ("cross_entropy",),
}


@dataclass
class NetworkArguments(KernelArguments):
    """Which network, from where, and which kernels run it."""

    model_type: str = arg("llama", "network family", choices=("llama",))
    model_name_or_path: str | None = arg(
        None,
        "model directory in the Hugging Face layout, or the name of a built-in shape such as "
        "meta-llama/Llama-3.2-1B or __internal_testing__/tiny-random-llama",
        aliases=("model_path",),
    )
    tokenizer_name_or_path: str | None = arg(
        None, "tokenizer directory or file; the model directory when not given"
    )
    use_flash_attention: bool | None = arg(
        None,
        "false takes the reference of attention, which keeps all scores; true, or not given, the "
        "device's best form; --ops goes before it",
    )
    use_fused_rms_norm: bool | None = arg(
        None,
        "false takes the reference of RMSNorm; true, or not given, the device's best form; --ops "
        "goes before it",
    )
    use_fused_head_and_loss_fn: bool = arg(
        False,
        "score the vocabulary without all logits in memory, for a fourth matrix product; --ops "
        "goes before it",
    )

    def validate(self) -> None:
        """Refuse unknown ops and modes, and a flag of one op beside ``--ops``, which decides on it.

        Raises:
            UserError: the message names the flags.
        """
        super().validate()
        for flag in meant(self) & _OPS_OF.keys():
            asked = getattr(self, flag)
            for op in _OPS_OF[flag]:
                chosen = self.op_modes.get(op, self.op_modes.get(OTHERS))
                if chosen is not None and asked is not None and asked == (chosen == "reference"):
                    raise UserError(
                        f"{flag}={asked} would have no effect: --ops asks for {op}={chosen}; drop "
                        "one of them"
                    )

    def takes(self, op: str) -> bool:
        """Tell whether the network runs more than the reference of an op."""
        flags = modes_of_flags(
            self.use_flash_attention, self.use_fused_rms_norm, self.use_fused_head_and_loss_fn
        )
        return mode_of(op, merged(flags, self.op_modes)) != "reference"


@dataclass
class ModelArguments(NetworkArguments):
    """Which network, from where, and which kernels run it."""

    continue_training: bool = arg(
        False, "start from the weights in model_name_or_path instead of random ones"
    )
