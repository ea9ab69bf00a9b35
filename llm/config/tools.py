"""Arguments of what turns one model directory into another: quantizing, converting, merging."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from common.errors import UserError
from common.flags import arg, meant
from common.foreign import Program
from llm.config import llama_factory, paddlenlp_models
from llm.config.machine import DeviceArguments, check_alone
from llm.config.precision import dtype_arg

_TEXT = "calibration_file|dataset_path"
GROUP_SIZES = (128, 64, 32, 16, 8)


def group_size_of(kind: str, sizes: Iterable[int]) -> int | None:
    """Return the weights that share a scale where nobody says; None is one scale per output.

    Args:
        kind: ``W8``, ``W4``, ``A8W8`` or ``A8W4``.
        sizes: inputs of the linears, which the group divides.
    """
    if not kind.endswith("4"):
        return None
    sizes = set(sizes)
    return next((n for n in GROUP_SIZES if all(size % n == 0 for size in sizes)), None)


@dataclass
class QATArguments:
    """Training that already computes with the rounding of low-precision weights."""

    qat: bool = arg(False, "quantization-aware training: straight-through rounding in the linears")
    qat_type: str = arg(
        "A8W8",
        "A8W8: 8-bit activations and weights; W4: 4-bit weights; A8W4",
        choices=("A8W8", "W4", "A8W4"),
        only_with="qat",
    )


@dataclass
class QuantizeArguments(DeviceArguments):
    """What a trained model is rounded to, with which text, and where it goes."""

    FOREIGN: ClassVar[tuple[Program, ...]] = (paddlenlp_models.QUANTIZE,)
    REFUSED: ClassVar[dict[str, str]] = {
        "lora_path": "quantize the merged model; merge_lora.py makes it",
        "prefix_path": "a prefix belongs to the weights that it was tuned on, and cannot be merged",
        "model_dir": "an exported program cannot be quantized; give the model that was exported",
        "dtype": "what is not rounded keeps the type that it has in the files",
    }

    model_name_or_path: str | None = arg(
        None, "model directory in the Hugging Face layout", aliases=("model_path",)
    )
    tokenizer_name_or_path: str | None = arg(
        None, "tokenizer directory or file; the model directory when not given"
    )
    output_dir: str | None = arg(None, "directory of the quantized model; new or empty")
    quant_type: str = arg(
        "W8",
        "W8: 8-bit weights; W4: 4-bit weights in groups; A8: activations too, 8 bits per token",
        choices=("W8", "W4", "A8W8", "A8W4"),
        not_with="dequantize",
    )
    method: str = arg(
        "auto",
        "rtn: nearest; gptq: with calibration text; auto: gptq for 4 bits, rtn for 8",
        choices=("auto", "rtn", "gptq"),
        not_with="dequantize",
    )
    group_size: int | None = arg(
        None,
        "4-bit weights that share a scale; -1 is one scale per output; when not given, the largest "
        "of 128, 64, 32, 16 and 8 that divides every linear's inputs",
        minimum=-1,
        only_with="quant_type=W4|A8W4",
        not_with="dequantize",
    )
    embedding_type: str | None = arg(
        None,
        "int8: the embedding in 8 bits, with a scale for each token; model: in its own type; when "
        "not given, int8 where it is the output matrix too (tied)",
        choices=("int8", "model"),
        not_with="dequantize",
    )
    calibration_file: str | None = arg(
        None, "text (.jsonl, .txt) or token store prefix that gptq looks at", not_with="dequantize"
    )
    dataset_path: str | None = arg(
        None,
        "examples to calibrate on instead, prompts with their answers: a file, or a directory with "
        "quant.* or train.*",
        aliases=("dataset_name_or_path",),
        not_with=("dequantize", "calibration_file"),
    )
    calibration_samples: int = arg(128, "rows of calibration text", minimum=1, only_with=_TEXT)
    calibration_length: int = arg(256, "tokens per row", minimum=2, only_with=_TEXT)
    damping: float = arg(
        0.01,
        "gptq: added to the Hessian's diagonal, as a share of it",
        minimum=1e-8,
        only_with=_TEXT,
        not_with="method=rtn",
    )
    smooth: float = arg(
        0.0,
        "A8W8, A8W4: share of the activations' outliers moved into weights, with calibration "
        "text (SmoothQuant); 0.5 is usual, 0 is off",
        minimum=0,
        maximum=1,
        not_with="dequantize",
    )
    scaling: str = arg(
        "auto",
        "search: channels scaled so that outputs change the least on calibration text (AWQ); none; "
        "auto: search without smooth",
        choices=("auto", "search", "none"),
        only_with=_TEXT,
        not_with="dequantize",
    )
    wide_share: float = arg(
        0.0,
        "W4, A8W4: share of the weights, at most, that take 8 bits, where calibration text says "
        "that 4 cost the most; 0.2 is usual, 0 is off",
        minimum=0,
        maximum=1,
        only_with=("quant_type=W4|A8W4", _TEXT),
        not_with="dequantize",
    )
    eval_file: str | None = arg(
        None,
        "text or token store prefix on which perplexity is measured before and after",
        not_with="dequantize",
    )
    eval_length: int = arg(
        512, "tokens per window of the perplexity", minimum=2, only_with="eval_file"
    )
    eval_limit: int | None = arg(
        None, "documents of eval_file to use; all by default", minimum=1, only_with="eval_file"
    )
    dequantize: bool = arg(
        False, "widen a quantized model to full precision instead, for readers of no integers"
    )

    def validate(self) -> None:
        """Refuse what cannot run, before anything is loaded.

        Raises:
            UserError: the message names the flag and the fix.
        """
        super().validate()
        check_alone("quantize_generation.py")
        for name, what in (
            ("model_name_or_path", "the directory of a trained model"),
            ("output_dir", "a new directory for the quantized one"),
        ):
            if getattr(self, name) is None:
                raise UserError(f"--{name} is needed: {what}")
        if self.group_size == 0:
            raise UserError("group_size=0: give a multiple of 8, or -1 for one scale per output")
        if self.smooth and not self.quant_type.startswith("A8"):
            raise UserError(
                f"smooth={self.smooth} evens out activations, which quant_type={self.quant_type} "
                "does not round; drop it, or choose A8W8 or A8W4"
            )
        if self.text is None and self.calibrates:
            raise UserError(
                f"quant_type={self.quant_type} with method=gptq needs --calibration_file: text "
                "like the model's own; or choose --method rtn"
            )
        if self.text is not None and not self.dequantize:
            self._check_calibration()
        if self.text is None and self.smooth:
            raise UserError(f"smooth={self.smooth} needs --calibration_file: text like the model's")
        if self.smooth and self.scaling == "search":
            raise UserError(
                f"smooth={self.smooth} and scaling=search scale the same channels; drop one"
            )

    def _check_calibration(self) -> None:
        """Refuse calibration text, or settings of GPTQ, that would not be looked at."""
        if not self.reads_text:
            name = "dataset_path" if self.calibration_file is None else "calibration_file"
            raise UserError(
                f"{name}={self.text} would not be looked at: "
                f"quant_type={self.quant_type} with method={self.method} rounds to nearest; add "
                "--method gptq or --scaling search, or drop it"
            )
        if not self.calibrates and "damping" in meant(self):
            raise UserError(
                f"damping={self.damping} is of GPTQ, and quant_type={self.quant_type} with "
                f"method={self.method} rounds to nearest; add --method gptq, or drop it"
            )

    @property
    def text(self) -> str | None:
        """Where text to calibrate on lies."""
        return self.dataset_path if self.calibration_file is None else self.calibration_file

    @property
    def calibrates(self) -> bool:
        """Whether rounding is GPTQ's."""
        if self.dequantize:
            return False
        return self.method == "gptq" or (self.method == "auto" and self.quant_type.endswith("4"))

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is used."""
        return self.calibrates or self.scales or self.smooth > 0 or self.wide_share > 0

    @property
    def scales(self) -> bool:
        """Whether channels are scaled by search."""
        if self.dequantize or self.text is None:
            return False
        if self.scaling == "auto":
            return not self.smooth
        return self.scaling == "search"

    def embedding_bits(self, tied: bool) -> int | None:
        """Return 8 where the embedding is quantized, None where it stays.

        Args:
            tied: it is the output matrix too.
        """
        kind = self.embedding_type or ("int8" if tied else "model")
        return 8 if kind == "int8" else None

    def groups(self, sizes: Iterable[int]) -> int | None:
        """Return ``group_size`` where weights have 4 bits; None is one scale per output.

        Args:
            sizes: inputs of the linears, which a size that was not given divides.
        """
        if not self.quant_type.endswith("4") or self.group_size == -1:
            return None
        return self.group_size or group_size_of(self.quant_type, sizes)


@dataclass
class ConvertArguments:
    """Which checkpoint becomes which."""

    FOREIGN: ClassVar[tuple[Program, ...]] = (paddlenlp_models.CONVERT,)

    input_dir: str | None = arg(
        None,
        "model directory: safetensors, PyTorch's .bin, PaddleNLP's "
        "model_state*.pdparams, Meta's consolidated.*.pth, Megatron's; or a GGUF file",
        aliases=("model_name_or_path", "model_path"),
    )
    output_dir: str | None = arg(None, "new directory; with --check_only, the one to compare")
    output_format: str = arg(
        "auto",
        "hf: complete tensors in safetensors; paddlenlp: the same with PaddleNLP's names and "
        "matrices; pdparams: PaddleNLP's files, one per rank; gguf: "
        "llama.cpp's, one file with the tokenizer in it; meta: consolidated.*.pth, one per tensor "
        "parallel rank; megatron: mp_rank_XX of Megatron-Core; auto: pdparams where a degree or a "
        "fusion is given, else hf",
        choices=("auto", "hf", "paddlenlp", "pdparams", "gguf", "meta", "megatron"),
        not_with="check_only",
    )
    tensor_parallel_degree: int = arg(
        1, "tensor parallel ranks of pdparams, meta and megatron", minimum=1, not_with="check_only"
    )
    pipeline_parallel_degree: int = arg(
        1, "pipeline stages of pdparams and megatron", minimum=1, not_with="check_only"
    )
    fuse_attention_qkv: bool = arg(
        False, "pdparams, paddlenlp: one matrix for query, key and value", not_with="check_only"
    )
    fuse_attention_ffn: bool = arg(
        False, "pdparams, paddlenlp: one matrix for gate and up", not_with="check_only"
    )
    dtype: str | None = dtype_arg(
        None, "type to store; each tensor's own when not given", not_with="check_only"
    )
    gguf_type: str | None = arg(
        None,
        "gguf: type of the matrices in place of dtype; q8_0: 8-bit integers with a scale for 32",
        choices=("q8_0",),
        only_with="output_format=gguf",
        not_with="check_only",
    )
    vocab_size: int | None = arg(
        None,
        "rows of the embedding and the head, for tokens added to the tokenizer; new ones are the "
        "mean of the others",
        minimum=1,
        not_with="check_only",
    )
    max_shard_size: float = arg(
        5.0,
        "GB per safetensors file",
        minimum=1e-6,
        not_with="check_only",
    )
    threads: int | None = arg(None, "CPU threads; all cores when not given", minimum=1)
    check: bool = arg(
        False,
        "compare hidden states and logits, layer by layer, before it is named",
        not_with="check_only",
    )
    check_only: bool = arg(False, "convert nothing, compare the two directories")

    def validate(self) -> None:
        """Refuse a command that lacks a directory, or degrees without a format that has them.

        Raises:
            UserError: the message names the flag and the fix.
        """
        check_alone("convert_checkpoint.py")
        for name in ("input_dir", "output_dir"):
            if getattr(self, name) is None:
                raise UserError(f"--{name} is needed")
        self._check_form()
        if self.vocab_size is not None and self.check:
            raise UserError(
                "--check compares models of one size; convert with --vocab_size and without it"
            )

    def _check_form(self) -> None:
        """Refuse what the form of the result has no use for."""
        whose = {"hf": "Hugging Face's", "gguf": "GGUF"}.get(self.output_format)
        if whose is not None and self.has_ranks:
            raise UserError(
                f"{whose} files hold complete tensors: parallel degrees and fusions belong to "
                "--output_format pdparams"
            )
        fused = self.fuse_attention_qkv or self.fuse_attention_ffn
        degrees = self.tensor_parallel_degree * self.pipeline_parallel_degree
        if self.output_format == "paddlenlp" and degrees > 1:
            raise UserError(
                "PaddleNLP's safetensors hold complete arrays: parallel degrees belong to "
                "--output_format pdparams"
            )
        if self.output_format == "meta" and (self.pipeline_parallel_degree > 1 or fused):
            raise UserError(
                "Meta's files have neither stages nor fused matrices: those belong to "
                "--output_format pdparams"
            )
        if self.output_format == "megatron" and fused:
            raise UserError(
                "Megatron's matrices are always fused, in its own way: drop fuse_attention_qkv and "
                "fuse_attention_ffn"
            )
        if self.gguf_type is not None and self.dtype is not None:
            raise UserError(
                f"gguf_type={self.gguf_type} and dtype={self.dtype} both name the type of the "
                "matrices; give one of them"
            )
        whole = self.output_format in ("hf", "paddlenlp") or (
            self.output_format == "auto" and not self.has_ranks
        )
        if not whole and "max_shard_size" in meant(self):
            raise UserError(
                f"max_shard_size={self.max_shard_size} is of safetensors, and other files are one "
                "for each rank; drop it, or raise --tensor_parallel_degree for smaller files"
            )

    @property
    def has_ranks(self) -> bool:
        """Whether a degree or a fusion is asked for."""
        degrees = self.tensor_parallel_degree * self.pipeline_parallel_degree
        return degrees > 1 or self.fuse_attention_qkv or self.fuse_attention_ffn

    @property
    def to_ranks(self) -> bool:
        """Whether the result is PaddleNLP's files."""
        return self.output_format == "pdparams" or (self.output_format == "auto" and self.has_ranks)


@dataclass
class MergeArguments(DeviceArguments):
    """Which adapter becomes part of which model, and where the result goes."""

    FOREIGN: ClassVar[tuple[Program, ...]] = (paddlenlp_models.MERGE, llama_factory.MERGE)
    REFUSED: ClassVar[dict[str, str]] = {
        "prefix_path": "a prefix is keys and values before every sequence, and no part of weights",
        "model_dir": "an exported program takes no adapter; give the model that was exported",
    }

    model_name_or_path: str | None = arg(
        None, "model directory in the Hugging Face layout", aliases=("model_path",)
    )
    tokenizer_name_or_path: str | None = arg(
        None, "tokenizer directory or file; the model directory when not given"
    )
    lora_path: str | None = arg(None, "LoRA adapter in PEFT's layout")
    output_dir: str | None = arg(None, "new or empty directory for the merged model")
    dtype: str | None = dtype_arg(
        None, "type to store weights in, after merging in float32; float32 when not given"
    )
    quantize_merged: bool = arg(
        False,
        "over a quantized model: round the merged weights to integers again, as its own are; false "
        "writes them widened",
    )

    def validate(self) -> None:
        """Refuse a command that lacks one of its three directories.

        Raises:
            UserError: the message names the flag.
        """
        super().validate()
        check_alone("merge_lora.py")
        for name in ("model_name_or_path", "lora_path", "output_dir"):
            if getattr(self, name) is None:
                raise UserError(f"--{name} is needed")
