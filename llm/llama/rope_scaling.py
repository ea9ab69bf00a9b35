"""How rotary frequencies are stretched, as config.json says it in either spelling.

The function of the frequencies is that of ``transformers/modeling_rope_utils.py``; where its two
spellings say different things one of them would win there without a word, and is refused here.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import UserError

# What a type asks for beside its name, and what it may have.
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL = {
    "yarn": (
        *("attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    )
}
ROPE_TYPES = tuple(_NEEDED)
_ORIGINAL = "original_max_position_embeddings"
_GENERAL = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_THETA = 10000.0  # transformers' default
_LONG = ("longrope", "su")


def check_positive(name: str, value: Any) -> None:
    """Refuse what is no positive number.

    Raises:
        UserError: names it.
    """
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise UserError(f"{name}={value!r} has to be a positive number")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    Field names are those of Hugging Face's ``rope_scaling``. ``low_freq_factor`` and
    ``high_freq_factor`` belong to ``llama3``, the last six to ``yarn`` (Peng et al. 2023),
    ``original_max_position_embeddings`` to both.
    """

    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float | None = None  # of cosines and sines; None: from the factor
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type in _LONG:
            raise UserError(
                f"rope type {self.rope_type!r}, with factors of its own for short and for long "
                f"rows, is not supported; supported: {', '.join(ROPE_TYPES)}"
            )
        if self.rope_type not in ROPE_TYPES:
            raise UserError(
                f"rope type {self.rope_type!r} is not one of {', '.join(ROPE_TYPES)}; this "
                "checkpoint needs a rotary variant that Llama models do not use"
            )
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            check_positive(f"rope scaling {name}", getattr(self, name))
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                check_positive(f"rope scaling {name}", getattr(self, name))
        if type(self.truncate) is not bool:
            raise UserError(f"rope scaling truncate={self.truncate!r} has to be true or false")
        original = self.original_max_position_embeddings
        if type(original) is not int or original < 1:
            raise UserError(
                f"rope scaling {_ORIGINAL}={original!r} has to be a positive whole number"
            )
        if self.factor < 1:
            raise UserError(f"rope scaling factor={self.factor} has to be at least 1")
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"high_freq_factor={self.high_freq_factor} has to exceed "
                f"low_freq_factor={self.low_freq_factor}"
            )
        if self.beta_fast < self.beta_slow:
            raise UserError(
                f"rope scaling beta_fast={self.beta_fast} has to be at least "
                f"beta_slow={self.beta_slow}"
            )

    @property
    def cosine_scale(self) -> float:
        """What cosines and sines are multiplied by, so that attention stays as sharp (YaRN)."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return float(self.attention_factor)
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor)

    def context(self, trained: int) -> int:
        """Return the tokens that a row may have.

        Hugging Face's ``max_position_embeddings`` stays the trained context where ``linear``,
        ``dynamic`` or ``yarn`` stretch it; only ``llama3`` configs have the stretched one there.

        Args:
            trained: ``max_position_embeddings``.
        """
        if self.rope_type in ("linear", "dynamic"):
            return int(trained * self.factor)
        if self.rope_type == "yarn":
            return max(trained, int(self.original_max_position_embeddings * self.factor))
        return trained

    def to_hf(self) -> dict[str, Any] | None:
        """Return ``rope_scaling`` as transformers 4 and 5 both read it."""
        if self.rope_type == "default":
            return None
        kept = ("rope_type", *_NEEDED[self.rope_type], *_OPTIONAL.get(self.rope_type, ()))
        values = dataclasses.asdict(self)
        return {name: values[name] for name in kept if values[name] is not None}


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def read_rope(raw: Mapping[str, Any], source: str) -> tuple[Any, RopeScaling, list[str]]:
    """Read ``rope_parameters`` (transformers 5) or ``rope_theta`` with ``rope_scaling`` (4).

    Args:
        raw: config.json.
        source: named in messages.

    Returns:
        theta, the scaling, and the names of keys that mean nothing to it.

    Raises:
        UserError: a variant that no Llama has, or two spellings that say different things.
    """
    found = {name: raw[name] for name in ("rope_parameters", "rope_scaling") if raw.get(name)}
    read = {name: _read(raw, name, section, source) for name, section in found.items()}
    if not read:
        return _read(raw, "rope_scaling", {}, source)
    first = next(iter(read.values()))
    if any(other[:2] != first[:2] for other in read.values()):
        raise UserError(
            f"{source}: rope_parameters and rope_scaling say different things ("
            + "; ".join(f"{name}: {_said(*value[:2])}" for name, value in read.items())
            + "); keep the one that the weights were trained with"
        )
    return *first[:2], [name for value in read.values() for name in value[2]]


def _said(theta: Any, scaling: RopeScaling) -> str:
    return f"rope_theta {theta}, {scaling.to_hf() or 'no scaling'}"


def _read(
    raw: Mapping[str, Any], name: str, section: Any, source: str
) -> tuple[Any, RopeScaling, list[str]]:
    if not isinstance(section, dict):
        raise UserError(f"{source}: rope settings {section!r} are not a mapping")
    _check_whole_heads(raw, section, source)
    theta = _one(raw, section, "rope_theta", name, source)
    rope_type = section.get("rope_type", section.get("type", "default"))
    needed = _NEEDED.get(rope_type, ()) if isinstance(rope_type, str) else ()
    kept = (*needed, *_OPTIONAL.get(str(rope_type), ()))
    values = {key: section[key] for key in kept if section.get(key) is not None}
    if _ORIGINAL in needed:
        values[_ORIGINAL] = _original(raw, section, name, source)
    missing = [key for key in sorted(needed) if values.get(key) is None]
    if missing:
        raise UserError(f"{source}: rope type {rope_type!r} needs {', '.join(missing)}")
    idle = [key for key in section if key not in (*_GENERAL, *kept)]
    _refuse_idle(section, rope_type, idle, f"{source}: {name}")
    # As transformers has it, 0 stands for the default.
    for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if values.get(key) == 0:
            del values[key]
    try:
        scaling = RopeScaling(rope_type, **values)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return _THETA if theta is None else theta, scaling, [f"{name}.{key}" for key in idle]


def _check_whole_heads(raw: Mapping[str, Any], section: Mapping[str, Any], source: str) -> None:
    for place in (section, raw):
        rotated = place.get("partial_rotary_factor")
        if rotated is not None and rotated != 1:
            raise UserError(
                f"{source}: partial_rotary_factor={rotated}; Llama models rotate whole heads"
            )


def _one(
    raw: Mapping[str, Any], section: Mapping[str, Any], key: str, name: str, source: str
) -> Any:
    """Return a value that may stand in the section or beside it, and not differ."""
    inside, beside = section.get(key), raw.get(key)
    if inside is not None and beside is not None and inside != beside:
        raise UserError(
            f"{source}: {key} is {beside!r}, and {inside!r} in {name}; keep the one that the "
            "weights were trained with"
        )
    return beside if inside is None else inside


def _original(raw: Mapping[str, Any], section: Mapping[str, Any], name: str, source: str) -> Any:
    found = _one(raw, section, _ORIGINAL, name, source)
    if found is None and section.get("rope_type", section.get("type")) == "yarn":
        return raw.get("max_position_embeddings") or 2048  # as transformers fills it in
    return found


def _refuse_idle(
    section: Mapping[str, Any], rope_type: Any, idle: Iterable[str], place: str
) -> None:
    """Refuse keys that would mean something were the type another."""
    if rope_type == "default" and section.get("factor") not in (None, 1):
        raise UserError(
            f"{place} has factor={section['factor']!r} and no type that stretches by it: name the "
            f"rope_type ({', '.join(ROPE_TYPES[1:])}), or drop the factor"
        )
    nested = [key for key in idle if isinstance(section[key], dict)]
    if nested and rope_type in ROPE_TYPES:
        raise UserError(
            f"{place}.{nested[0]} is a mapping of its own: layers of Llama models share one"
        )
