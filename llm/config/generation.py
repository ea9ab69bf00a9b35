"""Arguments about a trained model: which one is opened and how, what is asked of it, the server.

Names follow PaddleNLP's Llama examples, so that command lines written for them keep working.
"""

import os
from collections.abc import Set
from dataclasses import dataclass, fields
from typing import ClassVar

from common import devices
from common.errors import UserError
from common.flags import arg, meant
from common.foreign import Program
from llm.config import llama_factory, paddlenlp_models
from llm.config.machine import DeviceArguments, KernelArguments, check_alone
from llm.config.precision import check_precision, dtype_arg
from llm.config.request_adapters import RequestAdapterArguments
from llm.config.sampling import RANGES, check_range
from llm.parallel.layout import Layout
from llm.parallel.rules import launched


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
class PackingArguments:
    """What generation on CPU may trade for speed; needs the native ops."""

    round_activations: bool | None = arg(
        None,
        "W8 and W4 models round each token's inputs to 8 bits, as A8W8 and A8W4 do: faster, less "
        "exact",
    )
    head_type: str | None = arg(
        None,
        "int8 rounds the output matrix and its inputs to 8 bits: faster, less exact; model, or not "
        "given, leaves it as the model has it",
        choices=("model", "int8"),
    )

    packed_cache: str = arg(
        "auto",
        "where weights are kept as CPU kernels read them, so that the next start takes seconds: "
        "auto is beside the model, or in $XDG_CACHE_HOME (~/.cache) where that takes no files; a "
        "directory; or off",
    )

    @property
    def packing(self) -> dict[str, bool | str]:
        """Options of ``llm.llama.fused.pack``."""
        return {
            "round_activations": bool(self.round_activations),
            "head_type": self.head_type or "model",
        }


@dataclass
class WeightsArguments(AdapterArguments, PackingArguments, KernelArguments, DeviceArguments):
    """A trained model: a directory, with an adapter or without, and how to compute with it."""

    FOREIGN: ClassVar[tuple[Program, ...]] = (paddlenlp_models.WEIGHTS,)

    model_name_or_path: str | None = arg(
        None, "model directory in the Hugging Face layout", aliases=("model_path", "pretrained")
    )
    tokenizer_name_or_path: str | None = arg(
        None, "tokenizer directory or file; the one beside the model when not given"
    )
    dtype: str | None = dtype_arg(
        None,
        "type of weights and cache, float32 when not given; bfloat16 on CPU needs the native ops",
    )
    cache_dtype: str = arg(
        "auto",
        "type of the key/value cache: that of dtype, or another one; int8, with a scale for each "
        "head of each token, takes about half of bfloat16's memory",
        choices=("auto", "float32", "bfloat16", "int8"),
    )

    def validate(self) -> None:
        """Refuse a missing model, two adapters, types that the device lacks, and unknown ops.

        Raises:
            UserError: the message names the flag and the fix.
        """
        DeviceArguments.validate(self)
        KernelArguments.validate(self)
        AdapterArguments.validate(self)
        self._check_place()
        if not self.packed_cache:
            raise UserError("packed_cache='' names no place: give auto, off or a directory")
        self.dtype = self.dtype or "float32"
        check_precision("inference", self.dtype, self.device_kind)
        if self.path is not None and self.dtype != "float32" and self.device_kind == devices.CPU:
            merge = "merge it (merge_lora.py), or " if self.lora_path is not None else ""
            raise UserError(
                f"dtype={self.dtype} on CPU is for models without an adapter, not for {self.path}; "
                f"{merge}use float32"
            )

    def _check_place(self) -> None:
        if self.model_name_or_path is None:
            raise UserError("--model_name_or_path is needed: the directory of a trained model")


@dataclass
class SharingArguments:
    """How the processes of a launch share the model."""

    tensor_parallel_degree: int | None = arg(
        None,
        "processes that split every matrix; all that were launched when not given",
        minimum=-1,
        aliases=("tensor_model_parallel_size",),
    )

    def validate(self) -> None:
        """Refuse a degree that is not the number of processes.

        Raises:
            UserError: names both, and the line that launches as many.
        """
        degree, processes = self.tensor_parallel_degree or -1, launched()
        if degree not in (-1, processes):
            number = f"{processes} processes were" if processes > 1 else "1 process was"
            raise UserError(
                f"tensor_parallel_degree={degree}, but {number} launched; start {degree} with "
                f"python -m paddle.distributed.launch --nproc_per_node {degree}, or leave the flag "
                "out"
            )

    @property
    def layout(self) -> Layout:
        """All launched processes side by side."""
        return Layout(tensor=launched())

    @property
    def rank(self) -> int:
        """The number of this process, which the launcher gave it."""
        return int(os.environ.get("PADDLE_TRAINER_ID", "0"))


@dataclass
class SpeculationArguments:
    """How several tokens of an answer may come of one step; answers stay what they are."""

    prompt_lookup_num_tokens: int | None = arg(
        None,
        "look up what followed the last tokens before, and check up to so many of them in one "
        "step: answers that quote their prompt come sooner; 10 is usual",
        minimum=1,
        maximum=64,
        not_with="draft_model_name_or_path",
    )
    draft_model_name_or_path: str | None = arg(
        None,
        "directory of a smaller model with the same tokenizer, whose guesses the model checks, "
        "several in one step",
        aliases=("speculative_model",),
    )
    num_speculative_tokens: int = arg(
        5,
        "most guesses of the smaller model in one step; fewer are made where they are often wrong",
        minimum=1,
        maximum=64,
        only_with="draft_model_name_or_path",
    )


# What only networks can be asked for: a program has it built in.
_OF_NETWORKS = ("dtype", "cache_dtype", "ops", "round_activations", "head_type", "packed_cache")


@dataclass
class OpenArguments(
    WeightsArguments, RequestAdapterArguments, SharingArguments, SpeculationArguments
):
    """The model to open: a directory, with an adapter or without, or an exported program."""

    FOREIGN: ClassVar[tuple[Program, ...]] = (paddlenlp_models.OPENED, llama_factory.OPENED)

    model_dir: str | None = arg(None, "directory of an exported program, instead of a model")
    model_prefix: str = arg(
        "llama", "file prefix of the exported program", not_with="model_name_or_path"
    )
    chat_template: str | None = arg(
        None,
        "llama2, llama3, simple, a Jinja file, or a name among the model's templates, in place of "
        "its default",
    )
    add_bos_token: bool | None = arg(
        None,
        "whether a text begins with BOS; not given, where there is one, unless add_bos_token of "
        "the tokenizer says no. Chat templates write their own",
    )
    cache_blocks: int | None = arg(
        None,
        "blocks of the key/value cache; enough for the batch when not given (a server's: for "
        "max_num_seqs requests of 2048 tokens, or one of the longest)",
        minimum=1,
    )

    def validate(self) -> None:
        """Refuse two models, and what an exported program cannot take.

        Raises:
            UserError: the message names the flags and the fix.
        """
        if self.model_dir is not None:
            self._check_program()
        super().validate()
        SharingArguments.validate(self)
        RequestAdapterArguments.validate(self)
        if self.model_dir is not None and self.layout.tensor > 1:
            raise UserError(
                f"{self.layout.tensor} processes were launched, but an exported program runs in "
                "one; give --model_name_or_path, or start one process"
            )
        if self.layout.tensor > 1 and self.packed_cache not in ("auto", "off"):
            raise UserError(
                f"packed_cache={self.packed_cache} has no effect over {self.layout.tensor} "
                "processes, each of which packs its part anew; drop the flag"
            )

    def _check_program(self) -> None:
        if self.path is not None:
            raise UserError(
                f"the adapter {self.path} cannot be put on an exported program; merge it when "
                "exporting (export_generation_model.py --lora_path), or give --model_name_or_path"
            )
        if self.adapters:
            raise UserError(
                f"adapters={' '.join(self.adapters)} cannot be put on an exported program; merge "
                "one when exporting (export_generation_model.py --lora_path), or give "
                "--model_name_or_path"
            )
        for name in _OF_NETWORKS:
            value = getattr(self, name)
            if value not in (None, [], "auto"):
                raise UserError(
                    f"{name}={value} cannot be put on an exported program, which has its own; give "
                    f"it when exporting (export_generation_model.py), or open the model directory "
                    "with --model_name_or_path"
                )

    def _check_place(self) -> None:
        if self.model_name_or_path is not None and self.model_dir is not None:
            raise UserError(
                "--model_name_or_path and --model_dir are both given; open one model at a time"
            )


@dataclass
class ProgramArguments(OpenArguments):
    """The model to open: the exported program in ``inference`` unless another one is given."""

    def _check_place(self) -> None:
        if self.model_name_or_path is None and self.model_dir is None:
            self.model_dir = "inference"
        super()._check_place()


@dataclass
class MergingArguments:
    """What becomes one model again, instead of answers."""

    merge_tensor_parallel_path: str | None = arg(
        None,
        "write the checkpoint to this new directory as complete tensors in the Hugging Face "
        "layout, and end",
    )


@dataclass
class PromptArguments:
    """What to ask and how to answer."""

    FOREIGN: ClassVar[tuple[Program, ...]] = (llama_factory.PREDICT,)

    prompt: list[str] | None = arg(None, "one or more prompts")
    data_file: str | None = arg(
        None,
        "prompts from a .json list or .jsonl: strings, or objects with prompt, src or text, and "
        "adapter where one of --adapters is to answer",
    )
    adapter: str | None = arg(
        None, "which of --adapters answers prompts that name none", only_with="adapters"
    )
    output_file: str | None = arg(None, "write answers here as jsonl", only_with="prompt|data_file")
    chat: bool = arg(False, "wrap prompts in the chat template; without prompts, chat on stdin")
    batch_size: int = arg(
        8,
        "answers that are generated together",
        minimum=1,
        only_with="prompt|data_file",
        aliases=("max_num_seqs",),
    )
    max_num_batched_tokens: int = arg(
        512, "tokens of a step; longer prompts are cut into several", minimum=1
    )


# What only sampling looks at, with the value that asks for none.
_FILTERS = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}


@dataclass
class SamplingArguments:
    """How the next token is chosen, and how much is generated."""

    FOREIGN: ClassVar[tuple[Program, ...]] = (paddlenlp_models.PREDICT,)

    src_length: int | None = arg(
        None, "longest prompt in tokens; what the context leaves when not given", minimum=1
    )
    max_length: int = arg(
        128, "most new tokens", minimum=1, aliases=("max_new_tokens", "tgt_length")
    )
    decode_strategy: str | None = arg(
        None,
        "sampling where temperature, top_k or top_p is given, beam_search where num_beams is, else "
        "greedy_search, when not given",
        choices=("greedy_search", "sampling", "beam_search"),
    )
    temperature: float = arg(1.0, "of sampling; 0 is greedy")
    top_k: int = arg(0, "sample among the k likeliest; 0 is off")
    top_p: float = arg(1.0, "sample in the likeliest mass p")
    repetition_penalty: float = arg(1.0, "above 1 discourages tokens seen")
    num_beams: int | None = arg(
        None, "answers that beam search follows at a time; 4 when not given, 1 is none", minimum=1
    )
    length_penalty: float = arg(
        1.0, "of beam search: above 0, longer answers rise; 0 compares probabilities as they are"
    )
    early_stopping: bool = arg(
        False, "beam search ends when num_beams answers have, though others may become better"
    )
    seed: int = arg(42, "seed of sampling; greedy answers are the same with any", minimum=0)
    ignore_eos: bool = arg(False, "go on past the end-of-sequence token")

    def validate(self) -> None:
        """Decide whether tokens are sampled: who sets a temperature, as for vLLM, wants that.

        Raises:
            UserError: a number out of its range; settings of sampling beside a greedy search, or of
                either beside a beam search.
        """
        own = {field.name for field in fields(self)}
        for name in RANGES:
            if name in own:
                check_range(name, getattr(self, name))
        asked = meant(self)
        if self._searches(asked):
            return
        samples = {n for n, off in _FILTERS.items() if n in asked and getattr(self, n) != off}
        idle = sorted(samples | asked & {"seed"})
        given = ", ".join(f"{name}={getattr(self, name)}" for name in idle)
        if self.decode_strategy is None:
            greedy = not samples or self.temperature == 0
            self.decode_strategy = "greedy_search" if greedy else "sampling"
            reason = f"{'temperature=0' if self.temperature == 0 else 'no temperature'} is greedy"
        elif self.decode_strategy == "sampling" and self.temperature == 0:
            greedy, reason, given = True, "temperature=0 is greedy", "decode_strategy=sampling"
        else:
            greedy = self.decode_strategy == "greedy_search"
            reason = "decode_strategy=greedy_search takes the likeliest token"
        if greedy and given:
            raise UserError(f"{reason}, and {given} would have no effect; keep one of them")

    def _searches(self, asked: Set[str]) -> bool:
        """Return whether beams are followed; refuse what would have no effect then, or else."""
        beams = self.num_beams is not None and self.num_beams > 1
        if self.decode_strategy is None and beams:
            self.decode_strategy = "beam_search"
        searches = self.decode_strategy == "beam_search"
        drawn = {*_FILTERS, "seed", "repetition_penalty"}
        idle = sorted(asked & (drawn if searches else {"length_penalty", "early_stopping"}))
        if not searches and beams:
            idle.append("num_beams")
        if idle:
            given = ", ".join(f"{name}={getattr(self, name)}" for name in idle)
            cure = "drop it" if searches else "add --decode_strategy beam_search"
            way = "beam search follows the likeliest" if searches else "no beam is followed"
            raise UserError(f"{way}, and {given} would have no effect; {cure}")
        if not searches:
            return False
        self.num_beams = 4 if self.num_beams is None else self.num_beams
        if self.num_beams < 2:
            raise UserError("num_beams=1 is a greedy search; give 2 or more, or drop beam_search")
        check_range("length_penalty", self.length_penalty)
        return True


@dataclass
class ExportArguments:
    """Where the static program goes."""

    FOREIGN: ClassVar[tuple[Program, ...]] = (paddlenlp_models.EXPORT,)
    REFUSED: ClassVar[dict[str, str]] = {
        "model_dir": "that is an exported program already; export takes a model directory",
        "tensor_parallel_degree": "an exported program runs in one process",
    }

    output_path: str = arg("inference/llama", "directory and file prefix of the program")
    block_size: int = arg(16, "tokens per cache block", minimum=1)
    max_model_len: int | None = arg(
        None, "longest prompt plus answer; the model's context", minimum=2
    )
    check: bool = arg(
        True, "compare the program's weights and logits with the network's, in a fresh process"
    )

    def validate(self) -> None:
        """Refuse several processes, which would all write the same files.

        Raises:
            UserError: names their number.
        """
        check_alone("export_generation_model.py")
