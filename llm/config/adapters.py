"""Arguments about adapters: which to use, and where a merged model goes."""

from dataclasses import dataclass

from llm.config.loader import arg
from llm.errors import UserError


@dataclass
class AdapterArguments:
    """Which adapter to put on the model."""

    lora_path: str | None = arg(None, "LoRA adapter in PEFT's layout")
    prefix_path: str | None = arg(None, "tuned prefix in PEFT's layout")

    def validate(self) -> None:
        """Refuse two adapters at once.

        Raises:
            UserError: the message names the flags and the fix.
        """
        if self.lora_path is not None and self.prefix_path is not None:
            raise UserError("lora_path and prefix_path are both given; a model takes one adapter")

    @property
    def path(self) -> str | None:
        """The adapter's directory, if there is one."""
        return self.lora_path or self.prefix_path

    @property
    def kind(self) -> str:
        """The ``peft_type`` that the adapter has to have."""
        return "PREFIX_TUNING" if self.lora_path is None else "LORA"


@dataclass
class MergeArguments:
    """Which adapter becomes part of which model, and where the result goes."""

    model_name_or_path: str | None = arg(
        None, "model directory in the Hugging Face layout", aliases=("model_path",)
    )
    tokenizer_name_or_path: str | None = arg(
        None, "tokenizer directory or file; the model directory when not given"
    )
    lora_path: str | None = arg(None, "LoRA adapter in PEFT's layout")
    output_dir: str | None = arg(None, "new or empty directory for the merged model")
    dtype: str | None = arg(
        None,
        "type to store weights in, after merging in float32; float32 when not given",
        choices=("float32", "bfloat16", "float16"),
    )
    device: str = arg("cpu", "where to merge", choices=("cpu", "gpu"))
    threads: int | None = arg(None, "CPU threads; all cores when not given", minimum=1)

    def validate(self) -> None:
        """Refuse a command that lacks one of its three directories.

        Raises:
            UserError: the message names the flag.
        """
        for name in ("model_name_or_path", "lora_path", "output_dir"):
            if getattr(self, name) is None:
                raise UserError(f"--{name} is needed")
