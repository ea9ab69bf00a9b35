"""Arguments of conversion: from where, to where, in which layout and type."""

from dataclasses import dataclass

from llm.config.loader import arg
from llm.errors import UserError


@dataclass
class ConvertArguments:
    """Which checkpoint becomes which."""

    input_dir: str | None = arg(
        None,
        "model directory: safetensors, or PaddleNLP's model_state*.pdparams",
        aliases=("model_name_or_path", "model_path"),
    )
    output_dir: str | None = arg(None, "new directory; with --check_only, the one to compare")
    output_format: str = arg(
        "auto",
        "hf: complete tensors in safetensors; pdparams: PaddleNLP's files, one per rank; auto: "
        "pdparams where a degree or a fusion is given",
        choices=("auto", "hf", "pdparams"),
    )
    tensor_parallel_degree: int = arg(1, "tensor parallel ranks of pdparams", minimum=1)
    pipeline_parallel_degree: int = arg(1, "pipeline stages of pdparams", minimum=1)
    fuse_attention_qkv: bool = arg(False, "pdparams: one matrix for query, key and value")
    fuse_attention_ffn: bool = arg(False, "pdparams: one matrix for gate and up")
    dtype: str | None = arg(
        None,
        "type to store; each tensor's own when not given",
        choices=("float32", "bfloat16", "float16"),
    )
    max_shard_size: float = arg(5.0, "GB per safetensors file", minimum=1e-6)
    threads: int | None = arg(None, "CPU threads; all cores when not given", minimum=1)
    check: bool = arg(False, "compare hidden states and logits, layer by layer, before it is named")
    check_only: bool = arg(False, "convert nothing, compare the two directories")

    def validate(self) -> None:
        """Refuse a command that lacks a directory, or degrees without a format that has them.

        Raises:
            UserError: the message names the flag and the fix.
        """
        for name in ("input_dir", "output_dir"):
            if getattr(self, name) is None:
                raise UserError(f"--{name} is needed")
        if self.output_format == "hf" and self.has_ranks:
            raise UserError(
                "Hugging Face's files hold complete tensors: parallel degrees and fusions belong "
                "to --output_format pdparams"
            )
        if self.check_only and (self.has_ranks or self.dtype or self.output_format != "auto"):
            raise UserError(
                "--check_only takes two directories as they are; give no layout or type"
            )

    @property
    def has_ranks(self) -> bool:
        """Whether a degree or a fusion is asked for."""
        degrees = self.tensor_parallel_degree * self.pipeline_parallel_degree
        return degrees > 1 or self.fuse_attention_qkv or self.fuse_attention_ffn

    @property
    def to_ranks(self) -> bool:
        """Whether the result is PaddleNLP's files."""
        return self.output_format == "pdparams" or self.has_ranks
