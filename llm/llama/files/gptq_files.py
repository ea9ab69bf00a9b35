"""GPTQ's directories, seen in the layout of ``compressed-tensors`` that the network reads.

AutoGPTQ and GPTQModel store a linear of O outputs and I inputs as ``qweight`` I32 [I*b/32, O] (b
bits each, first input in the lowest), ``scales`` [N, O] for N groups of inputs, ``qzeros`` I32 [N,
O*b/32] and ``g_idx`` I32 [I], the group of each input. Where zero points are the middle of the
range and groups follow each other, the words of ``qweight`` are those of ``weight_packed``, turned.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from llm.llama.files.rank_layout import extent
from llm.llama.files.safetensors import StoredTensor
from llm.llama.files.tensors import Block, Tensor
from llm.llama.quant_config import GPTQSettings

_WORDS = ".qweight"
_BESIDE = ("scales", "qzeros", "g_idx")


@dataclass(frozen=True)
class _Scales(Tensor):
    """Scales, which are read once zero points and groups are known to be the usual ones."""

    zeros: StoredTensor | None = None
    groups: StoredTensor | None = None
    settings: GPTQSettings | None = None

    def bits(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        settings = self.settings
        assert settings is not None
        if self.zeros is not None:
            middle = (1 << (settings.bits - 1)) - (not settings.stores_zero_points)
            word = sum(middle << at for at in range(0, 32, settings.bits))
            if (self.zeros.bits().view(np.uint32) != word).any():
                raise UserError(
                    f"{self.zeros.file}: {self.zeros.name} has zero points off the middle of the "
                    "range, which the kernels do not have; quantize with sym=True"
                )
        if self.groups is not None:
            inputs = self.groups.shape[0]
            wanted = np.arange(inputs) // (settings.group_size or inputs)
            if (self.groups.bits() != wanted).any():
                raise UserError(
                    f"{self.groups.file}: {self.groups.name} puts inputs into groups out of order, "
                    "which the kernels do not have; quantize with desc_act=False"
                )
        return super().bits(part)


@dataclass(frozen=True)
class _Shape:
    """The two sizes of a linear, which no tensor of the files holds."""

    name: str
    sizes: tuple[int, int]
    arrays: tuple[StoredTensor, ...]
    shape: tuple[int, ...] = (2,)
    dtype: str = "I64"

    @property
    def file(self) -> Path:
        return self.arrays[0].file

    def read(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        return self.bits(part)

    def bits(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        return np.array(self.sizes, np.int64)[part]


def is_gptq(stored: Mapping[str, StoredTensor]) -> bool:
    """Whether tensors are those of a GPTQ directory."""
    return any(name.endswith(_WORDS) for name in stored)


def as_compressed(
    stored: Mapping[str, StoredTensor], settings: GPTQSettings
) -> dict[str, StoredTensor | Tensor | _Shape]:
    """Return tensors under the names, and in the shapes, of ``compressed-tensors``.

    Args:
        stored: of a GPTQ directory.
        settings: of its config.json.

    Raises:
        UserError: a linear that lacks a tensor.
    """
    found: dict[str, StoredTensor | Tensor | _Shape] = {}
    linears = [name.removesuffix(_WORDS) for name in stored if name.endswith(_WORDS)]
    theirs = {f"{linear}.{end}" for linear in linears for end in ("qweight", *_BESIDE)}
    found |= {name: tensor for name, tensor in stored.items() if name not in theirs}
    for linear in linears:
        words, scales = stored[linear + _WORDS], stored.get(f"{linear}.scales")
        if scales is None or len(words.shape) != 2 or len(scales.shape) != 2:
            raise UserError(f"{words.file} lacks {linear}.scales, which its integers need")
        sizes = (words.shape[1], words.shape[0] * 32 // settings.bits)
        beside = [stored.get(f"{linear}.{end}") for end in _BESIDE[1:]]
        found[f"{linear}.weight_packed"] = _turned(f"{linear}.weight_packed", words)
        turned = _turned(f"{linear}.weight_scale", scales)
        found[turned.name] = _Scales(
            *(turned.name, turned.shape, turned.dtype, turned.blocks, ()), *beside, settings
        )
        found[f"{linear}.weight_shape"] = _Shape(f"{linear}.weight_shape", sizes, (words,))
    for name in [name for name in found if name.endswith("_proj.bias")]:
        if not found[name].read().any():  # GPTQ's tools store biases of zeros where there are none
            del found[name]
    return found


def _turned(name: str, array: StoredTensor) -> Tensor:
    shape = array.shape[::-1]
    return Tensor(name, shape, array.dtype, (Block(array, True, *extent(shape)),))
