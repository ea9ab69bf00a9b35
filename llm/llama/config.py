"""Architecture of a Llama: presets, and Hugging Face's config.json in both of its spellings.

Only what changes the function that the network computes is here; kernels, precision, recompute and
parallelism are chosen in ``llm.llama.build``.
"""

import dataclasses
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from common.errors import UserError, near_name
from common.gguf import gguf_file, read_gguf
from common.notes import say_once
from llm.llama.config_keys import check_keys
from llm.llama.gguf_config import described
from llm.llama.places import check_place, rank_of
from llm.llama.quant_config import QuantConfig
from llm.llama.rope_scaling import RopeScaling, check_positive, read_rope

_log = logging.getLogger(__name__)

# These have no default in config.json.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_SIZES = (*_REQUIRED, "num_key_value_heads", "max_position_embeddings", "head_dim")


# Files of models that convert_checkpoint.py reads, and nothing else.
_CONVERTED = ("consolidated.*.pth", "latest_checkpointed_iteration.txt", "mp_rank_*", ".metadata")
_PLAIN_ROPE = RopeScaling()
_MOST_LAYERS = 4096  # whose tensors are listed before any file is looked at


@dataclass(frozen=True)
class LlamaConfig:
    """Shape and constants of one Llama; field names follow Hugging Face's ``LlamaConfig``.

    Raises:
        UserError: sizes that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = _PLAIN_ROPE
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: tuple[int, ...] = (2,)
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        if self.head_dim == 0:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(
                    f"hidden_size={self.hidden_size} is not a multiple of "
                    f"num_attention_heads={self.num_attention_heads}; give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            check_positive(name, getattr(self, name))
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if type(getattr(self, name)) is not bool:
                raise UserError(f"{name}={getattr(self, name)!r} has to be true or false")
        for name in ("bos_token_id", "pad_token_id"):
            if type(getattr(self, name)) not in (int, NoneType):
                raise UserError(f"{name}={getattr(self, name)!r} has to be one token id")
        if any(type(token) is not int for token in self.eos_token_id):
            raise UserError(f"eos_token_id={self.eos_token_id!r} has to hold token ids")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        _check_rope(self)
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} has to be even for rotary embedding")

    def _check_sizes(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            least = 0 if name == "head_dim" else 1
            if type(value) is not int or value < least:
                raise UserError(f"{name}={value!r} has to be a positive whole number")
        if self.num_hidden_layers > _MOST_LAYERS:
            raise UserError(
                f"num_hidden_layers={self.num_hidden_layers} is more than {_MOST_LAYERS}, and than "
                "any Llama has; is it mistyped, or the file damaged?"
            )

    @property
    def context(self) -> int:
        """Tokens that a row may have; more than were trained where rotary scaling stretches."""
        return self.rope_scaling.context(self.max_position_embeddings)

    @property
    def described_context(self) -> str:
        """The context for messages: the settings that it follows from."""
        said = f"max_position_embeddings={self.max_position_embeddings}"
        if self.context == self.max_position_embeddings:
            return said
        stretched = f"{self.rope_scaling.rope_type} rotary scaling of {self.rope_scaling.factor:g}"
        return f"context of {self.context} ({said}, {stretched})"

    @property
    def eos_for_json(self) -> int | list[int] | None:
        """The end-of-sequence ids as Hugging Face's files spell them."""
        ids = list(self.eos_token_id)
        return ids[0] if len(ids) == 1 else ids or None

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear of a decoder layer, in the order of the files."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        q, kv = (n * self.head_dim for n in (self.num_attention_heads, self.num_key_value_heads))
        return {
            "self_attn.q_proj": (hidden, q),
            "self_attn.k_proj": (hidden, kv),
            "self_attn.v_proj": (hidden, kv),
            "self_attn.o_proj": (q, hidden),
            "mlp.gate_proj": (hidden, ffn),
            "mlp.up_proj": (hidden, ffn),
            "mlp.down_proj": (ffn, hidden),
        }

    def has_bias(self, linear: str) -> bool:
        """Say whether one of :attr:`linears` adds a bias."""
        return self.attention_bias if linear.startswith("self_attn.") else self.mlp_bias

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, tied ones counted once."""
        layer = 2 * self.hidden_size
        for name, (size_in, size_out) in self.linears.items():
            layer += (size_in + self.has_bias(name)) * size_out
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + self.hidden_size

    def flops_per_token(self, seq_length: int) -> float:
        """Floating-point operations of one training token, forward and backward.

        The usual count of PaLM's appendix B (Chowdhery et al. 2022): six per weight that takes
        part in a matrix product, and twelve per layer, hidden unit and attended position.
        """
        lookup = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        attention = (
            12 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * seq_length
        )
        return 6.0 * (self.num_parameters - lookup) + attention

    def replace(self, **changes: Any) -> "LlamaConfig":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_hf(cls, raw: dict[str, Any], source: str = "config.json") -> "LlamaConfig":
        """Build from the contents of an HF config.json (transformers 4 and 5 spellings).

        Raises:
            UserError: another model family, a missing key, or a feature no Llama has.
        """
        _refuse_foreign(raw, source)
        missing = [name for name in _REQUIRED if raw.get(name) is None]
        if missing:
            raise UserError(f"{source}: missing {', '.join(missing)}")
        known = {field.name for field in dataclasses.fields(cls)}
        values = {k: v for k, v in raw.items() if k in known and v is not None}
        values.setdefault("num_key_value_heads", raw["num_attention_heads"])
        values.setdefault("max_position_embeddings", 2048)
        values.setdefault("rms_norm_eps", 1e-6)  # transformers' default
        values["rope_theta"], values["rope_scaling"], idle = read_rope(raw, source)
        for sentence in check_keys({**raw, **dict.fromkeys(idle)}, known, source):
            say_once(_log, f"{source}: {sentence}")
        eos = raw.get("eos_token_id", 2)
        values["eos_token_id"] = (
            tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        )
        values["bos_token_id"] = raw.get("bos_token_id", 1)
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """Return an HF config.json, in the spelling that transformers 4 and 5 both read."""
        raw = dataclasses.asdict(self)
        raw["rope_scaling"] = self.rope_scaling.to_hf()
        raw["eos_token_id"] = self.eos_for_json
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "torch_dtype": dtype,
            "use_cache": True,
            **raw,
        }


def _refuse_foreign(raw: dict[str, Any], source: str) -> None:
    model_type = raw.get("model_type", "llama")
    if model_type != "llama":
        raise UserError(f"{source}: model_type={model_type!r} is not llama")
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UserError(f"{source}: hidden_act={activation!r}; Llama's feed-forward uses silu")
    if raw.get("quantization_config"):
        QuantConfig.from_hf(raw["quantization_config"], source)


def _check_rope(config: LlamaConfig) -> None:
    kind = config.rope_scaling.rope_type
    if kind == "dynamic" and config.head_dim <= 2:
        raise UserError(f"head_dim={config.head_dim} is too small for dynamic rotary scaling")
    if kind == "yarn" and config.rope_theta <= 1:
        raise UserError(f"rope_theta={config.rope_theta} has to exceed 1 for rope type 'yarn'")


def _llama1(hidden: int, ffn: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(32000, hidden, ffn, layers, heads, heads, 2048, rms_norm_eps=1e-6)


def _llama2(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(32000, hidden, ffn, layers, heads, kv_heads, 4096)


def _llama3(hidden: int, ffn: int, layers: int, heads: int, **changes: Any) -> LlamaConfig:
    base = LlamaConfig(128256, hidden, ffn, layers, heads, 8, 8192)
    ids = {"bos_token_id": 128000, "eos_token_id": (128001,)}
    return base.replace(rope_theta=500000.0, **ids, **changes)


def _llama31(hidden: int, ffn: int, layers: int, heads: int, factor: float = 8.0, **changes: Any):
    scaling = RopeScaling("llama3", factor=factor)
    return _llama3(hidden, ffn, layers, heads).replace(
        max_position_embeddings=131072, rope_scaling=scaling, **changes
    )


def _yi(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, eps: float) -> LlamaConfig:
    base = LlamaConfig(64000, hidden, ffn, layers, heads, kv_heads, 4096, rms_norm_eps=eps)
    return base.replace(rope_theta=5000000.0, pad_token_id=0)


def _smollm2(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, **changes: Any
) -> LlamaConfig:
    base = LlamaConfig(49152, hidden, ffn, layers, heads, kv_heads, 8192, tie_word_embeddings=True)
    return base.replace(bos_token_id=0, eos_token_id=(0,), **{"rope_theta": 100000.0, **changes})


_TINY = LlamaConfig(1024, 64, 176, 2, 4, 2, 2048, bos_token_id=1, eos_token_id=(2,))

TINY_NAME = "__internal_testing__/tiny-random-llama"

# Beside each model that is not Meta's: its config.json, or a copy that names the model.
PRESETS: dict[str, LlamaConfig] = {
    "llama-7b": _llama1(4096, 11008, 32, 32),
    "llama-13b": _llama1(5120, 13824, 40, 40),
    "llama-65b": _llama1(8192, 22016, 80, 64),
    "llama-2-7b": _llama2(4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama2(5120, 13824, 40, 40, 40),
    "llama-2-70b": _llama2(8192, 28672, 80, 64, 8),
    "llama-3-8b": _llama3(4096, 14336, 32, 32),
    "llama-3-70b": _llama3(8192, 28672, 80, 64),
    "llama-3.1-8b": _llama31(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama31(8192, 28672, 80, 64),
    "llama-3.1-405b": _llama31(16384, 53248, 126, 128),
    "llama-3.2-1b": _llama31(2048, 8192, 16, 32, 32.0, tie_word_embeddings=True),
    "llama-3.2-3b": _llama31(3072, 8192, 28, 24, 32.0, tie_word_embeddings=True),
    # https://huggingface.co/unsloth/tinyllama/blame/0e03f18bcb0aa8b3f2b61053ea73abcc86c41a6e/config.json
    "tinyllama-1.1b": LlamaConfig(32000, 2048, 5632, 22, 32, 4, 2048),
    # https://huggingface.co/MaxBlumenfeld/smollm2-135m-bootleg-instruct02/blob/main/config.json
    "smollm2-135m": _smollm2(576, 1536, 30, 9, 3, initializer_range=1 / 24),
    # https://huggingface.co/haripritam/SmolLM2-360M-VIT/blob/main/config.json
    "smollm2-360m": _smollm2(960, 2560, 32, 15, 5),
    # https://huggingface.co/mrfakename/failed-reasoning-1/blob/main/config.json (one token more)
    # https://huggingface.co/puettmann/SmolMaestra-1.7b-Translation/blame/4c7688724a0ce6c86e1dee0e4a3d5930935e100f/config.json
    "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32, rope_theta=130000.0),
    # https://huggingface.co/01-ai/Yi-6B/blob/main/config.json
    "yi-6b": _yi(4096, 11008, 32, 32, 4, 1e-5),
    # https://huggingface.co/Locutusque/Hyperion-3.0-Yi-34B/blob/976904c4a38bad2421704e38ed74f6c11a3a2fc0/config.json
    "yi-34b": _yi(7168, 20480, 60, 56, 8, 1e-5),
    # https://huggingface.co/01-ai/Yi-1.5-6B-Chat/blob/dd86db5e101a25cc977f978735b4eaf5a9e5a5cf/config.json
    "yi-1.5-6b": _yi(4096, 11008, 32, 32, 4, 1e-6),
    # https://huggingface.co/fakezeta/Yi-1.5-9B-Chat-ov-int4/blob/main/config.json
    "yi-1.5-9b": _yi(4096, 11008, 48, 32, 4, 1e-6),
    # https://huggingface.co/01-ai/Yi-1.5-34B-Chat/blob/7b967a3a456738c0330b1624980dd6a7d3ed33f5/config.json
    "yi-1.5-34b": _yi(7168, 20480, 60, 56, 8, 1e-6),
    # https://huggingface.co/hfl/chinese-llama-2-7b/blob/refs%2Fpr%2F3/config.json
    "chinese-llama-2-7b": _llama2(4096, 11008, 32, 32, 32).replace(
        vocab_size=55296, pad_token_id=0
    ),
    # https://huggingface.co/cuizhuyefei/ckpt2/blob/main/config.json
    "chinese-alpaca-2-13b": _llama2(5120, 13824, 40, 40, 40).replace(
        vocab_size=55296, pad_token_id=0
    ),
    # https://huggingface.co/IDEA-CCNL/Ziya-LLaMA-13B-v1/blob/refs%2Fpr%2F18/config.json
    "ziya-llama-13b": _llama1(5120, 13824, 40, 40).replace(vocab_size=39424, pad_token_id=0),
    # 3.8 M parameters: what `make demo` trains in minutes on two cores.
    "demo-llama": LlamaConfig(4096, 256, 640, 4, 4, 2, 512, tie_word_embeddings=True),
    "tiny-random-llama": _TINY,
    "tiny-llama-2": _TINY.replace(num_key_value_heads=4),
    "tiny-llama-3.1": _TINY.replace(
        rope_theta=500000.0,
        max_position_embeddings=131072,
        rope_scaling=RopeScaling("llama3", factor=8.0),
    ),
    "tiny-llama-3.2": _TINY.replace(tie_word_embeddings=True, rope_theta=500000.0),
}


# Published under another name, with the numbers of a preset.
_SAME_SHAPE = {
    # https://huggingface.co/relaxml/Llama-3.3-70B-Instruct-QTIP-3Bit/blame/d9f5da3eb82d0f86a19bb736a503ceb6bdd54fe4/config.json
    "llama-3.3-70b": "llama-3.1-70b",
    # https://huggingface.co/casperhansen/deepseek-r1-distill-llama-8b-awq/blob/652e9f65e08e78dfbdd5a2c724ac6cfb0bee11cf/config.json
    "deepseek-r1-distill-llama-8b": "llama-3.1-8b",
    # https://huggingface.co/unsloth/DeepSeek-R1-Distill-Llama-70B-bnb-4bit/blame/f20994a32f1f1f6b0c397d8e2fddbd7acdb970f1/config.json
    "deepseek-r1-distill-llama-70b": "llama-3.1-70b",
    # https://huggingface.co/Roselia-penguin/8-bit_medical_ChineseLLaMA2-7B-Chat/blob/main/config.json
    "chinese-alpaca-2-7b": "chinese-llama-2-7b",
}
# What a name says of training and not of shape.
_TRAINING = re.compile(r"(-(hf|instruct|chat|pretrain|v1(\.\d)?|intermediate-step-\w+-\w+))+$")


def preset_name(name: str) -> str | None:
    """Return the preset that a published model name stands for, or None.

    ``meta-llama/Meta-Llama-3.1-8B-Instruct``, ``deepseek-ai/DeepSeek-R1-Distill-Llama-8B``,
    ``Llama-2-7b-chat-hf`` and ``facebook/llama-7b`` name the shapes of ``llama-3.1-8b`` (twice),
    ``llama-2-7b`` and ``llama-7b``.
    """
    short = name.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    short = _TRAINING.sub("", re.sub(r"^llama(?=\d)", "llama-", short))
    short = _SAME_SHAPE.get(short, short)
    owner, _, _ = name.rpartition("/")
    if short.startswith("chinese-") and owner not in ("", "hfl"):
        return None  # others publish models of this name with vocabularies of their own
    return short if short in PRESETS else None


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: no such file, or one that holds something else.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file} has to hold a JSON object")
    return raw


def _about_adapter(path: Path) -> str:
    kind = read_json(path / "adapter_config.json").get("peft_type")
    said = f"{path} is an adapter, not a model; give the model that it was trained on"
    if kind == "PREFIX_TUNING":
        return (
            f"{said}, and the prefix as --prefix_path to the scripts that have it (finetune, "
            "predict, evaluate); a prefix cannot be part of a model"
        )
    return (
        f"{said}, and the adapter as --lora_path to the scripts that have it (finetune, predict, "
        "evaluate, export); for others, merge_lora.py makes one model of both"
    )


def read_raw(place: str | Path) -> tuple[dict[str, Any], str]:
    """Return config.json of a model, and where it stands; of a GGUF file, what it would hold.

    Args:
        place: a model directory, a GGUF file, or a directory that holds one.

    Raises:
        UserError: no model there.
    """
    path = Path(place)
    file = gguf_file(path)
    if file is not None:
        return described(read_gguf(file)), str(file)
    check_place(path)
    file = path / "config.json"
    if file.is_file():
        return read_json(file), str(file)
    if (path / "adapter_config.json").is_file():
        raise UserError(_about_adapter(path))
    if any(path.glob("*.manifest.json")):
        raise UserError(f"{path} is an exported program, not a model: give it as --model_dir")
    if any(any(path.glob(name)) for name in _CONVERTED):
        raise UserError(
            f"{path} holds Meta's or Megatron's files; convert them first: python "
            f"convert_checkpoint.py --input_dir {path} --output_dir NEW"
        )
    raise UserError(
        f"{path} has no config.json; give a model directory in the HF layout, or a GGUF file"
        + rank_of(path)
    )


def load_config(name_or_path: str | Path) -> LlamaConfig:
    """Return the architecture of a model directory, of a GGUF file or of a preset.

    A directory's generation_config.json, where there is one, overrides the end-of-sequence ids:
    Llama 3's chat models list all of theirs only there.

    Raises:
        UserError: neither; the message names the nearest preset.
    """
    path = Path(name_or_path)
    if path.is_dir() or path.is_file() or gguf_file(path) is not None:
        raw, source = read_raw(path)
        generation = path / "generation_config.json"
        if generation.is_file():
            eos = read_json(generation).get("eos_token_id")
            raw |= {"eos_token_id": eos} if eos is not None else {}
        return LlamaConfig.from_hf(raw, source)
    name = preset_name(str(name_or_path))
    if name is None:
        near = near_name(str(name_or_path).rsplit("/", 1)[-1].lower(), PRESETS)
        raise UserError(
            f"{str(name_or_path)!r} is neither a directory nor a built-in shape; "
            + (f"nearest built-in shape: {near!r}" if near else "README.md lists those")
        )
    return PRESETS[name]
