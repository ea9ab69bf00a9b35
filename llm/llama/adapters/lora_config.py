"""What LoRA adds to which layers, in the fields of Hugging Face PEFT's ``LoraConfig`` (0.21)."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from common.errors import UserError
from llm.llama.config import LlamaConfig

ALL_LINEAR = "all-linear"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

# Fields of adapter_config.json that change nothing about the function, or nothing once trained.
_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
    *("revision", "loftq_config", "megatron_core", "qalora_group_size", "runtime_config"),
}
_READ = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora"),
    *("rank_pattern", "alpha_pattern", "base_model_name_or_path", "use_dora"),
    *("modules_to_save", "ensure_weight_tying"),
}
# OLoRA, CorDA and the like change the base weights at their start; these do not, and PiSSA's start
# is known (llm.llama.adapters.pissa).
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_PISSA = re.compile(r"pissa(?:_niter_(\d+))?")


def _matches(names: tuple[str, ...] | str, key: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, key) is not None
    return any(key == name or key.endswith(f".{name}") for name in names)


def _ends_so(name: str, wanted: tuple[str, ...]) -> bool:
    """Say whether a layer, or one that it lies in, has a name that ends so."""
    parts = name.split(".")
    return any(".".join(parts[:count]).endswith(wanted) for count in range(1, len(parts) + 1))


def _layer_sizes(shape: LlamaConfig) -> dict[str, int]:
    """Return the numbers in each layer with weights of a network, in its order."""
    ends, hidden = shape.vocab_size * shape.hidden_size, shape.hidden_size
    inside = {
        name: (size_in + shape.has_bias(name)) * size_out
        for name, (size_in, size_out) in shape.linears.items()
    }
    inside |= {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    found = {EMBEDDING: ends}
    for number in range(shape.num_hidden_layers):
        found |= {f"model.layers.{number}.{name}": size for name, size in inside.items()}
    found["model.norm"] = hidden
    return found if shape.tie_word_embeddings else {**found, HEAD: ends}


def _pattern_value(patterns: Mapping[str, Any], key: str, default: Any) -> Any:
    """Return the value of the first pattern that ends the key, as PEFT's get_pattern_key does."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return value
    return default


def _why_none(unknown: Iterable[str], whole: Iterable[str]) -> str:
    """Say what is known of layers that some models have, PEFT adapts, or train whole."""
    ends = {name.rsplit(".", 1)[-1] for name in unknown}
    said = []
    if ends & {name.rsplit(".", 1)[-1] for name in whole}:
        said.append("modules_to_save trains it whole")
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
        use_dora: learn the lengths of weights' columns as well (Liu et al. 2024).
        init_lora_weights: True starts B at zero; ``pissa`` starts the product as the principal part
            of its weight (Meng et al. 2024), ``pissa_niter_4`` as that part found by 4 iterations.
        modules_to_save: ends of names of layers that train whole, beside the products.
        ensure_weight_tying: recorded where the embedding is such a layer and the output matrix too.

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
    use_dora: bool = False
    init_lora_weights: bool | str = True
    modules_to_save: tuple[str, ...] | None = None
    ensure_weight_tying: bool = False

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
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            self._normalise(name)
        if not self.target_modules:
            raise UserError("target_modules is empty: name at least one layer, or all-linear")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            _check_regex("rank_pattern or alpha_pattern", pattern)
        for name in ("use_dora", "ensure_weight_tying"):
            if type(getattr(self, name)) is not bool:
                raise UserError(f"{name}={getattr(self, name)!r} has to be true or false")
        if not self.is_pissa:
            object.__setattr__(self, "init_lora_weights", True)

    def _normalise(self, name: str) -> None:
        """Store a list of names as a tuple, and check a regular expression."""
        value = getattr(self, name)
        if name == "modules_to_save" and not value:
            object.__setattr__(self, name, None)
            return
        if value is None and name == "exclude_modules":
            return
        if isinstance(value, str) and name != "modules_to_save":
            if value.lower() == ALL_LINEAR:
                object.__setattr__(self, name, ALL_LINEAR)
            else:
                _check_regex(name, value)
            return
        listed = isinstance(value, Iterable) and not isinstance(value, str)
        names = tuple(value) if listed else (None,)
        if not all(isinstance(item, str) and item for item in names):
            also = "" if name == "modules_to_save" else ", or a regular expression"
            raise UserError(f"{name}={value!r} has to be a list of names{also}")
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
        whole = [name for name in linears if self._trains_whole(name)]
        linears = [name for name in linears if name not in whole]
        if not linears:
            raise UserError(
                f"modules_to_save takes every linear ({', '.join(self.modules_to_save or ())}); "
                "leave some to adapt, or train all weights without --lora"
            )
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
                    f"{_why_none(unknown, whole)}; it has {', '.join(known)} (or {ALL_LINEAR})"
                )
            chosen = [name for name in linears if _matches(wanted, name)]
        if self.exclude_modules is not None:
            chosen = [name for name in chosen if not _matches(self.exclude_modules, name)]
        if not chosen:
            raise UserError(f"exclude_modules={self.exclude_modules!r} leaves no layer to adapt")
        return chosen

    def modules(self, shape: LlamaConfig) -> dict[str, int]:
        """Return the layers of a network that train whole, and the numbers in each.

        Names are matched by their ends, as in PEFT.

        Args:
            shape: of the network.

        Raises:
            UserError: a name that ends no layer's.
        """
        wanted, names = self.modules_to_save or (), _layer_sizes(shape)
        for one in wanted:
            if any(_ends_so(name, (one,)) for name in names):
                continue
            if HEAD.endswith(one):
                raise UserError(
                    f"modules_to_save: {one} is the embedding of this model (tie_word_embeddings); "
                    "name embed_tokens, which trains both"
                )
            ends = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise UserError(
                f"modules_to_save: this model has no layer {one}; it has {', '.join(ends)}"
            )
        return {name: size for name, size in names.items() if _ends_so(name, wanted)}

    def _trains_whole(self, name: str) -> bool:
        """Say whether ``modules_to_save`` takes a linear, which then has no product, as in PEFT."""
        return any(
            re.match(rf"(^|.*\.){re.escape(one)}($|\..*)", name)
            for one in self.modules_to_save or ()
        )

    @property
    def is_pissa(self) -> bool:
        """Whether products start as a part of their weights."""
        start = self.init_lora_weights
        return isinstance(start, str) and _PISSA.fullmatch(start) is not None

    @property
    def pissa_iterations(self) -> int | None:
        """How many iterations find that part; None computes all singular values."""
        found = _PISSA.fullmatch(str(self.init_lora_weights))
        return None if found is None or found[1] is None else int(found[1])

    def as_plain(self) -> "LoRAConfig":
        """Return what a PiSSA adapter's product less its start is: LoRA of twice the rank."""
        # The scaling stays what it is.
        growth = math.sqrt(2) if self.use_rslora else 2
        return replace(
            self,
            init_lora_weights=True,
            r=2 * self.r,
            lora_alpha=growth * self.lora_alpha,
            rank_pattern={name: 2 * rank for name, rank in self.rank_pattern.items()},
            alpha_pattern={name: growth * alpha for name, alpha in self.alpha_pattern.items()},
        )

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
        target, exclude, whole = (
            list(value) if isinstance(value, tuple) else value
            for value in (self.target_modules, self.exclude_modules, self.modules_to_save)
        )
        # Only where it says something: PEFT knew no such field before 0.18.
        tying = {"ensure_weight_tying": True} if self.ensure_weight_tying else {}
        return tying | {
            "auto_mapping": None,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "exclude_modules": exclude,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": self.init_lora_weights,
            "layers_pattern": None,
            "layers_to_transform": None,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "modules_to_save": whole,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "revision": None,
            "target_modules": target,
            "task_type": "CAUSAL_LM",
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
        }

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], source: str) -> "LoRAConfig":
        """Read the content of adapter_config.json.

        Args:
            raw: as stored by any PEFT version.
            source: named in messages.

        Raises:
            UserError: a field that asks for something other than LoRA, DoRA or PiSSA on linears.
        """
        _refuse_other_methods(raw, source)
        values = {name: raw[name] for name in _READ if raw.get(name) is not None}
        values["init_lora_weights"] = raw.get("init_lora_weights", True)
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
    if start not in _PLAIN_STARTS and _PISSA.fullmatch(str(start)) is None:
        raise UserError(
            f"{source}: init_lora_weights={start!r} changes the base weights; save the adapter as "
            "plain LoRA first (PEFT's path_initial_model_for_weight_conversion)"
        )
    handled = {"task_type", "bias", "init_lora_weights"} | _READ | _WITHOUT_EFFECT
    for name, value in raw.items():
        if name not in handled and value:
            raise UserError(f"{source}: {name}={value!r} is not supported")
