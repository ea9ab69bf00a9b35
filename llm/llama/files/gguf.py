"""GGUF's tensors: names, the order of rows, and numbers in blocks of llama.cpp's types.

llama.cpp rotates neighbouring channels of a head, where Hugging Face's files rotate channels half a
head apart: the rows of the query and key matrices stand in another order, as
``llama.cpp/convert_hf_to_gguf.py`` puts them (``LlamaModel.permute``). Blocks are widened and made
by the ``gguf`` package, which llama.cpp's authors keep.
"""

from dataclasses import dataclass

import numpy as np

from common.errors import UserError
from common.gguf import BLOCKS, GGUFHeader
from llm.llama.config import LlamaConfig
from llm.llama.files.dtypes import FLOATS
from llm.llama.files.rank_layout import (
    EMBEDDING,
    HEAD,
    NORM,
    ArrayPlan,
    interleaved_rows,
    tensor_shapes,
    whole,
)
from llm.llama.files.safetensors import StoredTensor
from llm.llama.gguf_config import ROPE_FACTORS

_ENDS = {EMBEDDING: "token_embd", NORM: "output_norm", HEAD: "output"}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass(frozen=True)
class BlockTensor(StoredTensor):
    """A matrix in blocks of small integers with scales; read, it is float32."""

    blocks: str = ""  # of common.gguf.BLOCKS

    @property
    def verbatim(self) -> bool:
        """False: what is read was computed."""
        return False

    def packed(self, rows: np.ndarray) -> np.ndarray:
        """Round float32 rows to blocks; returns their bytes, row by row."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import quantize

        made: np.ndarray = quantize(rows, GGMLQuantizationType[self.blocks])
        return made

    def bits(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Widen the numbers, of which the leading slice alone is read."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        numbers, size = BLOCKS[self.blocks]
        row = self.shape[-1] // numbers * size
        stored = np.memmap(self.file, np.uint8, "r", self.offset, (*self.shape[:-1], row))
        wide = dequantize(stored[part[:1]], GGMLQuantizationType[self.blocks])
        return wide[(slice(None), *part[1:])].astype(np.float32, copy=False)


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of one of Hugging Face's tensors."""
    if name in _ENDS:
        return f"{_ENDS[name]}.weight"
    _, _, layer, inner = name.split(".", 3)
    inner, _, ending = inner.rpartition(".")
    return f"blk.{layer}.{_LAYER[inner]}.{ending}"


def gguf_arrays(config: LlamaConfig) -> dict[str, ArrayPlan]:
    """Return the arrays of a file by llama.cpp's name, in the order of Hugging Face's tensors."""
    plans = {}
    for name, shape in tensor_shapes(config).items():
        part = whole(name, shape)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = next((n for inner, n in heads.items() if f".{inner}." in name), None)
        parts = (part,) if count is None else interleaved_rows(part, count)
        plans[gguf_name(name)] = ArrayPlan(gguf_name(name), parts, False, len(shape) == 1)
    return plans


def stored_tensors(header: GGUFHeader) -> dict[str, StoredTensor]:
    """Return the tensors of a file by llama.cpp's name.

    Rotary factors are not among them: the configuration has them.
    """
    found: dict[str, StoredTensor] = {}
    for name, tensor in header.tensors.items():
        place = (header.file, name, tensor.dtype, tensor.shape, tensor.offset)
        if tensor.dtype in FLOATS:
            found[name] = StoredTensor(*place)
        elif name != ROPE_FACTORS:
            wide = (header.file, name, "F32", tensor.shape, tensor.offset)
            found[name] = BlockTensor(*wide, tensor.dtype)
    found.pop(ROPE_FACTORS, None)
    return found


def check_blocks(config: LlamaConfig, blocks: str) -> None:
    """Refuse a type whose blocks do not divide the rows of a model.

    Raises:
        UserError: names the size.
    """
    size = BLOCKS[blocks][0]
    for name, shape in tensor_shapes(config).items():
        if len(shape) > 1 and shape[-1] % size:
            raise UserError(
                f"gguf_type={blocks.lower()} has blocks of {size} numbers, which do not divide the "
                f"{shape[-1]} columns of {name}; leave it out, and give --dtype float16"
            )
