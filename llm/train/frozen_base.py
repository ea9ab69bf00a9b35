"""The base under an adapter: in which type its weights lie, and what rounds them.

Files decide, and flags where files leave a choice; all of it is settled before paddle is loaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import replacing
from llm.config.finetune import AdaptationArguments, FinetuneArguments
from llm.config.tools import group_size_of
from llm.llama.adapters.base_record import FILE_NAME, BaseRecord, described, difference, read_record
from llm.llama.config import TINY_NAME, LlamaConfig
from llm.llama.files.checkpoint import find_tensors
from llm.llama.files.dtypes import TYPES
from llm.llama.quant_config import QuantConfig, load_quantization
from llm.parallel.rules import check_frozen
from llm.train.checks import BASE_WEIGHTS

_KINDS = {"weight_only_int8": "W8", "weight_only_int4": "W4"}
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class FrozenBase:
    """How the weights lie that a run starts from.

    Args:
        dtype: of those in floating point.
        frozen: none of them trains, and they may lie in another type than the run computes in.
        quantization: of those that are integers.
        rounded_by: the flag's value, where they become integers while they are read.
    """

    dtype: str = "float32"
    frozen: bool = False
    quantization: QuantConfig | None = None
    rounded_by: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Return what ``llm.llama.build.load_model`` takes."""
        round_to = self.quantization if self.rounded_by else None
        return {"dtype": self.dtype, "frozen": self.frozen, "round_to": round_to}

    @property
    def unusual(self) -> bool:
        """Whether it is more than weights in the type that the run computes in."""
        return self.quantization is not None or (self.frozen and self.dtype != "float32")

    def describe(self) -> str:
        """Return it in words."""
        if self.quantization is None:
            return self.dtype
        return f"{described(self.quantization)}, the rest in {self.dtype}"

    def float32_weights(self, config: LlamaConfig) -> int:
        """Return how many float32 numbers would take the same memory, scales aside."""
        ends = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
        bits = 16 if self.dtype != "float32" else 32
        inner = bits if self.quantization is None else self.quantization.weight_bits
        return (ends * bits + (config.num_parameters - ends) * inner) // 32

    def save(self, directory: Path) -> None:
        """Write what the adapter in a directory was trained over, where its base has integers."""
        if self.quantization is None:
            return
        record = BaseRecord(self.quantization, self.rounded_by)
        with replacing(directory / FILE_NAME) as temporary:
            temporary.write_text(json.dumps(record.to_json(), indent=2) + "\n", encoding="utf-8")


def plan_base(
    base: str | Path,
    adaptation: AdaptationArguments,
    run: FinetuneArguments,
    config: LlamaConfig,
) -> FrozenBase:
    """Settle how the base's weights will lie.

    Args:
        base: model directory or built-in name.
        adaptation: what is trained, and the two flags of the base.
        run: says in which type it computes.
        config: the architecture.

    Raises:
        UserError: integers that would be rounded again, or a type that the run has no use for.
    """
    stored = None if str(base) == TINY_NAME else load_quantization(Path(base))
    if adaptation.mode == "full":
        return FrozenBase(run.weight_type, quantization=stored)
    algo = adaptation.weight_quantize_algo
    if algo is not None and stored is not None:
        raise UserError(
            f"weight_quantize_algo={algo}: {base} holds integers already ({described(stored)}), "
            "which are trained over as they are; leave it out"
        )
    quantization = stored if algo is None else _rounded(_KINDS[algo], config)
    if quantization is not None and run.layout.tensor > 1:
        raise UserError(
            f"tensor_parallel_degree={run.layout.tensor} does not split integer weights; use data "
            "or pipeline parallelism, or a base in floating point"
        )
    dtype = _dtype(base, adaptation, run, quantization)
    # At O2 the network computes in the type that its weights lie in, as every other does.
    return FrozenBase(dtype, run.weight_type == "float32", quantization, algo)


def _rounded(kind: str, config: LlamaConfig) -> QuantConfig:
    heads = config.num_attention_heads * config.head_dim
    sizes = {config.hidden_size, heads, config.intermediate_size}
    return QuantConfig.of_type(kind, group_size_of(kind, sizes))


def _dtype(
    base: str | Path,
    adaptation: AdaptationArguments,
    run: FinetuneArguments,
    quantization: QuantConfig | None,
) -> str:
    asked = adaptation.base_dtype
    if run.weight_type != "float32":
        if asked not in (None, run.weight_type):
            raise UserError(
                f"base_dtype={asked}: with fp16_opt_level=O2 all weights lie in {run.weight_type}; "
                "leave it out, or choose O1"
            )
        return run.weight_type
    if asked == "bfloat16":
        check_frozen(run.layout)
    if asked is not None:
        return asked
    splits = run.layout.tensor > 1 or run.layout.sharding_stage == 3
    if quantization is None or splits or str(base) == TINY_NAME:
        return "float32"
    tensors = find_tensors(Path(base), TYPES)
    stored = tensors[_EMBEDDING].dtype if _EMBEDDING in tensors else "F32"
    return "bfloat16" if stored == "BF16" else "float32"


def check_adapter(base: FrozenBase, adapter: Path | None, messages: list[str]) -> None:
    """Say where an adapter to go on from was trained over another base.

    Raises:
        UserError: a damaged record.
    """
    if adapter is None:
        return
    other = difference(read_record(adapter), base.quantization)
    if other:
        messages.append(f"lora_path={adapter}: {other}; it goes on learning over this one")


def check_same(base: FrozenBase, stored: dict[str, Any], place: Path) -> None:
    """Refuse to go on from a checkpoint over weights that lie otherwise.

    Args:
        base: of this run.
        stored: the state in the checkpoint.
        place: the checkpoint.

    Raises:
        UserError: names both, and the flags.
    """
    before = stored.get(BASE_WEIGHTS, "float32")
    if before != base.describe():
        raise UserError(
            f"cannot continue {place} exactly: its base lay in {before}, this run's lies in "
            f"{base.describe()}; give the --weight_quantize_algo and --base_dtype of before"
        )
