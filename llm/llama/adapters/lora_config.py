"""What LoRA adds to which layers, in the fields of Hugging Face PEFT's ``LoraConfig`` (0.21)."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from common.errors import UserError

ALL_LINEAR = "all-linear"

# Fields of adapter_config.json that change nothing about the function, or nothing once trained.
_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
    *("revision", "loftq_config", "megatron_core", "qalora_group_size", "runtime_config"),
}
_READ = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora"),
    *("rank_pattern", "alpha_pattern", "base_model_name_or_path"),
}
# PiSSA, OLoRA and the like change the base weights at their start; these do not.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def _matches(names: tuple[str, ...] | str, key: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, key) is not None
    return any(key == name or key.endswith(f".{name}") for name in names)


def _pattern_value(patterns: Mapping[str, Any], key: str, default: Any) -> Any:
    """Return the value of the first pattern that ends the key, as PEFT's get_pattern_key does."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return value
    return default


def _why_none(unknown: Iterable[str]) -> str:
    """Say what is known of layers that some models have or PEFT adapts."""
    ends = {name.rsplit(".", 1)[-1] for name in unknown}
    said = []
    if "embed_tokens" in ends:
        said.append("embeddings are not adapted here")
    if "lm_head" in ends:
        said.append("its output matrix is the embedding (tie_word_embeddings)")
    return f" ({', and '.join(said)})" if said else ""


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{name}: {pattern!r} is no regular expression: {error}") from error


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adaptation (Hu et al. 2021): which linears get ``B A``, and its scale.

    Args:
        r: rank.
        lora_alpha: scale; the product counts ``lora_alpha / r``.
        lora_dropout: chance that an input of ``A`` is dropped in training.
        target_modules: names of linears or ends of names (``q_proj``); a string is a regular
            expression of whole names, or ``all-linear``, which leaves out lm_head.
        exclude_modules: matched like ``target_modules``; these stay plain.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` (Kalajdzievski 2023).
        rank_pattern: other ranks by regular expression of the end of a name.
        alpha_pattern: other scales, likewise.
        base_model_name_or_path: recorded for readers; never opened.

    Raises:
        UserError: a value outside its range, by field.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    exclude_modules: tuple[str, ...] | str | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        for pattern, rank in {"r": self.r, **self.rank_pattern}.items():
            if type(rank) is not int or rank < 1:
                name = "r" if pattern == "r" else f"rank_pattern[{pattern!r}]"
                raise UserError(f"LoRA rank {name}={rank!r} has to be a whole number of at least 1")
        for pattern, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if not _is_number(alpha) or alpha <= 0:
                raise UserError(f"LoRA scale {pattern}={alpha!r} has to be a positive number")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout={self.lora_dropout!r} has to be at least 0 and below 1")
        for name in ("target_modules", "exclude_modules"):
            self._normalise(name)
        if not self.target_modules:
            raise UserError("target_modules is empty: name at least one layer, or all-linear")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            _check_regex("rank_pattern or alpha_pattern", pattern)

    def _normalise(self, name: str) -> None:
        """Store a list of names as a tuple, and check a regular expression."""
        value = getattr(self, name)
        if value is None and name == "exclude_modules":
            return
        if isinstance(value, str):
            if value.lower() == ALL_LINEAR:
                object.__setattr__(self, name, ALL_LINEAR)
            else:
                _check_regex(name, value)
            return
        names = tuple(value) if isinstance(value, Iterable) else (None,)
        if not all(isinstance(item, str) and item for item in names):
            raise UserError(f"{name}={value!r} has to be a list of names, or a regular expression")
        object.__setattr__(self, name, ALL_LINEAR if names == (ALL_LINEAR,) else names)

    def targets(self, linears: Iterable[str], *, strict: bool = True) -> list[str]:
        """Return those of a model's linears that get a product.

        Args:
            linears: full names, such as ``model.layers.0.self_attn.q_proj``.
            strict: every name in ``target_modules`` has to occur; otherwise one match is enough,
                as for PEFT.

        Raises:
            UserError: a name, or all names, that the model does not have.
        """
        linears = list(linears)
        known = sorted({name.rsplit(".", 1)[-1] for name in linears})
        if self.target_modules == ALL_LINEAR:
            chosen = [name for name in linears if name != "lm_head"]
        else:
            wanted = self.target_modules
            each = (wanted,) if isinstance(wanted, str) else wanted
            kinds = each if isinstance(wanted, str) else tuple((item,) for item in each)
            unknown = [
                item
                for item, kind in zip(each, kinds, strict=True)
                if not any(_matches(kind, name) for name in linears)
            ]
            if unknown and (strict or len(unknown) == len(each)):
                raise UserError(
                    f"target_modules: this model has no linear layer {', '.join(unknown)}"
                    f"{_why_none(unknown)}; it has {', '.join(known)} (or {ALL_LINEAR})"
                )
            chosen = [name for name in linears if _matches(wanted, name)]
        if self.exclude_modules is not None:
            chosen = [name for name in chosen if not _matches(self.exclude_modules, name)]
        if not chosen:
            raise UserError(f"exclude_modules={self.exclude_modules!r} leaves no layer to adapt")
        return chosen

    def rank(self, name: str) -> int:
        """Return the rank at one linear."""
        return _pattern_value(self.rank_pattern, name, self.r)

    def scaling(self, name: str) -> float:
        """Return what one linear's product is multiplied by."""
        rank = self.rank(name)
        alpha = _pattern_value(self.alpha_pattern, name, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def to_peft(self) -> dict[str, Any]:
        """Return the content of adapter_config.json."""
        target, exclude = (
            list(value) if isinstance(value, tuple) else value
            for value in (self.target_modules, self.exclude_modules)
        )
        return {
            "auto_mapping": None,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "exclude_modules": exclude,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "revision": None,
            "target_modules": target,
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": self.use_rslora,
        }

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], source: str) -> "LoRAConfig":
        """Read the content of adapter_config.json.

        Args:
            raw: as stored by any PEFT version.
            source: named in messages.

        Raises:
            UserError: a field that asks for something other than plain LoRA on linears.
        """
        _refuse_other_methods(raw, source)
        values = {name: raw[name] for name in _READ if raw.get(name) is not None}
        if "target_modules" not in values:
            raise UserError(f"{source}: target_modules is missing; which layers were adapted?")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        except (TypeError, AttributeError) as error:
            raise UserError(f"{source} is damaged: {error}") from error


def _refuse_other_methods(raw: Mapping[str, Any], source: str) -> None:
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"{source}: task_type={raw['task_type']!r}; only CAUSAL_LM is supported")
    if raw.get("bias", "none") != "none":
        raise UserError(f"{source}: bias={raw['bias']!r} is not supported, only 'none'")
    start = raw.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise UserError(
            f"{source}: init_lora_weights={start!r} changes the base weights; save the adapter as "
            "plain LoRA first (PEFT's path_initial_model_for_weight_conversion)"
        )
    handled = {"task_type", "bias", "init_lora_weights"} | _READ | _WITHOUT_EFFECT
    for name, value in raw.items():
        if name not in handled and value:
            raise UserError(f"{source}: {name}={value!r} is not supported: plain LoRA only")
