"""What is quantized and how: the one description that files, layers and scripts share.

In config.json it is a ``quantization_config`` of the ``compressed-tensors`` format
(https://github.com/vllm-project/compressed-tensors), which transformers and vLLM read too.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import UserError

METHOD = "compressed-tensors"
TYPES = ("W8", "W4", "A8W8", "A8W4")
# A packed word of the files holds eight 4-bit values.
_GROUP_STEP = 8


@dataclass(frozen=True)
class QuantConfig:
    """Symmetric integers for the linears' weights, and for their inputs where asked for.

    Args:
        weight_bits: 8 or 4.
        activation_bits: 8: each token's inputs are rounded with a scale of their own. None: inputs
            stay as they are.
        group_size: neighbouring weights of an output that share a scale; None is one scale for
            each output.
        packed: files hold weights in 32-bit words (``pack-quantized``) instead of 8-bit integers.
        ignored: names of linears that stay as they are; those that start with ``re:`` are regular
            expressions.
        embedding_bits: 8: the embedding has integers too, with a scale for each token. None: it
            stays as it is.
        wide: names, or expressions, of linears that take 8 bits and one scale per output where the
            others take 4.

    Raises:
        UserError: widths or groups that do not exist.
    """

    weight_bits: int
    activation_bits: int | None = None
    group_size: int | None = None
    packed: bool = False
    ignored: tuple[str, ...] = ("lm_head",)
    embedding_bits: int | None = None
    wide: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.weight_bits not in (4, 8):
            raise UserError(f"weights of {self.weight_bits!r} bits are not supported: 8 or 4")
        if self.activation_bits not in (None, 8):
            raise UserError(f"activations of {self.activation_bits!r} bits are not supported: 8")
        if self.embedding_bits not in (None, 8):
            raise UserError(f"embeddings of {self.embedding_bits!r} bits are not supported: 8")
        if self.weight_bits == 4 and not self.packed:
            raise UserError("4-bit weights have to be packed (format pack-quantized)")
        if self.wide and self.weight_bits == 8:
            raise UserError("linears of 8 bits among others need others of 4 bits")
        size = self.group_size
        if size is not None and (type(size) is not int or size < 1 or size % _GROUP_STEP):
            raise UserError(
                f"group_size={size!r} has to be a positive multiple of {_GROUP_STEP}, such as 128, "
                "or -1 for one scale per output"
            )

    @classmethod
    def of_type(
        cls, kind: str, group_size: int | None = None, embedding_bits: int | None = None
    ) -> "QuantConfig":
        """Return the description of one of :data:`TYPES`.

        Raises:
            UserError: another type, or groups where one scale per output is enough.
        """
        if kind not in TYPES:
            raise UserError(f"quantization type {kind!r} is not one of {', '.join(TYPES)}")
        bits = 4 if kind.endswith("4") else 8
        if bits == 8 and group_size is not None:
            raise UserError(
                f"group_size={group_size} is for 4-bit weights; {kind} has one scale per output, "
                "drop it"
            )
        activations = 8 if kind.startswith("A8") else None
        return cls(bits, activations, group_size, packed=bits == 4, embedding_bits=embedding_bits)

    @property
    def embedding(self) -> "QuantConfig | None":
        """The description of the embedding alone; None where it is not quantized."""
        bits = self.embedding_bits
        return None if bits is None else QuantConfig(bits)

    @property
    def kind(self) -> str:
        """The name among :data:`TYPES`."""
        return ("A8" if self.activation_bits else "") + f"W{self.weight_bits}"

    def quantizes(self, name: str) -> bool:
        """Say whether the linear of that name is quantized."""
        return not _matches(name, self.ignored)

    def of(self, name: str) -> "QuantConfig":
        """Return what holds for the linear of that name alone."""
        if _matches(name, self.wide):
            return replace(self, weight_bits=8, group_size=None, wide=())
        return replace(self, wide=()) if self.wide else self

    def groups(self, size_in: int, name: str = "a linear", beside: Iterable[int] = ()) -> int:
        """Return the number of scales per output.

        Args:
            size_in: inputs of a linear.
            name: of the linear.
            beside: inputs of the others, which what a message advises has to fit too.

        Raises:
            UserError: inputs that the groups, or the words of the files, do not divide.
        """
        if self.group_size is not None and size_in % self.group_size:
            raise UserError(
                f"group_size={self.group_size} does not divide the {size_in} inputs of {name}; "
                + _group_that_does(math.gcd(size_in, *beside), self.group_size)
            )
        if self.packed and size_in % _GROUP_STEP:
            raise UserError(
                f"{name} has {size_in} inputs, which 4-bit weights cannot pack into words of "
                f"{_GROUP_STEP}; use 8 bits"
            )
        return size_in // (self.group_size or size_in)

    def to_hf(self) -> dict[str, Any]:
        """Return ``quantization_config`` for config.json."""
        groups = [self._group_to_hf(["Linear"])]
        if self.wide:
            # A name goes before a class, whatever their order.
            wide = replace(self, weight_bits=8, group_size=None, wide=())
            groups.append(wide._group_to_hf(list(self.wide)))
        if self.embedding is not None:
            groups.append(self._embedding_to_hf(self.embedding))
        return {
            "quant_method": METHOD,
            "quantization_status": "compressed",
            "format": "pack-quantized" if self.packed else "int-quantized",
            "ignore": list(self.ignored),
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        }

    def _group_to_hf(self, targets: list[str]) -> dict[str, Any]:
        grouped = self.group_size is not None
        weights = {
            "num_bits": self.weight_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group" if grouped else "channel",
            "group_size": self.group_size,
            "dynamic": False,
        }
        activations = {
            "num_bits": self.activation_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": activations if self.activation_bits else None,
            "output_activations": None,
        }

    def _embedding_to_hf(self, embedding: "QuantConfig") -> dict[str, Any]:
        described = embedding.to_hf()
        group = {**described["config_groups"]["group_0"], "targets": ["Embedding"]}
        return {**group, "format": described["format"]}

    @classmethod
    def from_hf(cls, raw: Any, source: str = "config.json") -> "QuantConfig":
        """Read ``quantization_config``.

        Raises:
            UserError: another method, or a scheme of it that is not supported.
        """
        settings = GPTQSettings.of(raw, source)
        if settings is not None:
            return cls(settings.bits, None, settings.group_size, True, ("lm_head",))
        if not isinstance(raw, dict) or raw.get("quant_method") != METHOD:
            method = raw.get("quant_method", "unknown") if isinstance(raw, dict) else raw
            raise UserError(
                f"{source}: weights are quantized ({method}); use the checkpoint they were made "
                f"from, or one of {METHOD}, or of gptq with sym=true and desc_act=false"
            )
        try:
            return cls._from_hf(raw)
        except UserError as error:
            raise UserError(f"{source}: quantization_config: {error}") from error
        except (KeyError, TypeError, AttributeError, re.error) as error:
            raise UserError(f"{source}: damaged quantization_config: {error!r}") from error

    @classmethod
    def _from_hf(cls, raw: dict[str, Any]) -> "QuantConfig":
        every = list(raw["config_groups"].values())
        embeddings = [group for group in every if group["targets"] == ["Embedding"]]
        for group in embeddings:
            if group.get("format", raw["format"]) != "int-quantized":
                raise UserError("an embedding has to lie as int-quantized, each integer in a byte")
            one = group["weights"]
            _expect(one, "an embedding", type="int", symmetric=True, strategy="channel")
        if len(embeddings) > 1:
            raise UserError("only one group of settings for Embedding is supported")
        layout = raw["format"]
        if layout not in ("int-quantized", "pack-quantized"):
            raise UserError(f"format={layout!r}; supported: int-quantized, pack-quantized")
        ignored = tuple(raw.get("ignore") or ())
        found = [
            (tuple(group["targets"]), _read_group(group, layout, ignored))
            for group in every
            if group not in embeddings
        ]
        whole = [config for targets, config in found if targets == ("Linear",)]
        named = [(targets, config) for targets, config in found if targets != ("Linear",)]
        if len(whole) != 1:
            raise UserError("only one group of settings for all of Linear is supported, and needed")
        wide = tuple(name for targets, _ in named for name in targets)
        for pattern in (*ignored, *wide):
            re.compile(pattern.removeprefix("re:"))
        config = replace(whole[0], wide=wide)
        if any(other != config.of(targets[0]) for targets, other in named):
            raise UserError(
                "settings for some linears alone are supported where they have 8 bits, one scale "
                "per output and the inputs of the others, which have 4 bits"
            )
        bits = embeddings[0]["weights"]["num_bits"] if embeddings else None
        return replace(config, embedding_bits=bits)


def _read_group(group: dict[str, Any], layout: str, ignored: tuple[str, ...]) -> QuantConfig:
    weights, inputs = group["weights"], group.get("input_activations")
    _expect(weights, "weights", type="int", symmetric=True, dynamic=False)
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise UserError("weights reordered by activation (actorder=group) are not supported")
    if weights["strategy"] not in ("channel", "group"):
        raise UserError(f"strategy={weights['strategy']!r} of weights; supported: channel, group")
    if inputs is not None:
        _expect(inputs, "activations", type="int", symmetric=True, strategy="token")
        _expect(inputs, "activations", dynamic=True)
    return QuantConfig(
        weight_bits=weights["num_bits"],
        activation_bits=None if inputs is None else inputs["num_bits"],
        group_size=weights["group_size"] if weights["strategy"] == "group" else None,
        packed=layout == "pack-quantized",
        ignored=ignored,
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(
        name == pattern
        or (pattern.startswith("re:") and re.match(pattern.removeprefix("re:"), name) is not None)
        for pattern in patterns
    )


@dataclass(frozen=True)
class GPTQSettings:
    """What config.json of a GPTQ directory says, where the kernels have the type.

    Attributes:
        bits: of an integer, 4 or 8.
        group_size: inputs that share a scale; None is one scale per output.
        stores_zero_points: zero points as they are; the older format stores them less one.
    """

    bits: int
    group_size: int | None
    stores_zero_points: bool

    @classmethod
    def of(cls, raw: Any, source: str) -> "GPTQSettings | None":
        """Read ``quantization_config``; None where it is of another method.

        Raises:
            UserError: settings that the kernels do not have.
        """
        if not isinstance(raw, dict) or raw.get("quant_method") != "gptq":
            return None
        for key, wanted in (("sym", True), ("desc_act", False), ("lm_head", False)):
            if raw.get(key, wanted) != wanted:
                raise UserError(
                    f"{source}: weights are quantized (gptq) with {key}={raw[key]!r}, and the "
                    f"kernels have {wanted!r} alone; use the checkpoint they were made from, and "
                    "quantize_generation.py"
                )
        bits, group = raw.get("bits"), raw.get("group_size", -1)
        fits = (bits, group == -1) in ((4, True), (4, False), (8, True))
        if type(bits) is not int or type(group) is not int or not fits:
            raise UserError(
                f"{source}: weights are quantized (gptq) to bits={bits!r} with group_size="
                f"{group!r}; 4 bits are supported, and 8 with one scale per output (-1). Use the "
                "checkpoint they were made from, and quantize_generation.py"
            )
        newer = raw.get("checkpoint_format", "gptq") == "gptq_v2"
        return cls(bits, None if group == -1 else group, newer)


def load_quantization(directory: Path) -> QuantConfig | None:
    """Return the description in a model directory's config.json, None where there is none.

    Raises:
        UserError: a method or scheme that is not supported.
    """
    file = directory / "config.json"
    if not file.is_file():  # a GGUF file, whose integers are widened when they are read
        return None
    section = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
    return QuantConfig.from_hf(section, str(file)) if section else None


def _expect(section: dict[str, Any], what: str, **wanted: Any) -> None:
    for name, value in wanted.items():
        found = section.get(name, False if name == "dynamic" else value)
        if found != value:
            raise UserError(f"{name}={found!r} of {what}; supported: {value!r}")


def _group_that_does(size: int, limit: int) -> str:
    steps = (n for n in range(limit - limit % _GROUP_STEP, 0, -_GROUP_STEP) if size % n == 0)
    largest = next(steps, None)
    return f"the largest that does is {largest}" if largest else "none does: use 8 bits"
