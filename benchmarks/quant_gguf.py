"""Rounds a model as llama.cpp does and widens it again, for quant_table.py.

    python benchmarks/quant_gguf.py MODEL MIXTURE TARGET         (the peers' environment)

MIXTURE is Q4_0 or Q4_K_M. Blocks are rounded by llama.cpp's own library and widened by its package
gguf; which tensor takes which type is written down here, as its quantizer chooses without an
importance matrix. TARGET becomes MODEL's directory with what the rounded weights stand for, in
float32, so that one program measures everybody's weights; ``rounded.json`` in it says what they
take, and in which types.
"""

import argparse
import collections
import ctypes
import functools
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

DESCRIPTION = "rounded.json"
# A type of the linears, and the one of those that matter more.
MIXTURES = {"Q4_0": ("Q4_0", "Q4_0"), "Q4_K_M": ("Q4_K", "Q6_K")}
# In the place of types with blocks of 256, where those do not divide a row.
_FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}


@functools.lru_cache(maxsize=1)
def library() -> Any:
    """Return llama.cpp's functions of blocks."""
    package = importlib.util.find_spec("llama_cpp")  # found, not imported: it needs all libraries
    places = [] if package is None else package.submodule_search_locations or []
    for place in places:
        for file in Path(place).glob("lib/libggml-base.*"):
            loaded = ctypes.CDLL(str(file))
            loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
            loaded.ggml_quantize_chunk.argtypes = (
                *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
                *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
            )
            return loaded
    raise SystemExit(
        "error: llama.cpp's library is not there: pip install -r requirements-bench.txt -c "
        "constraints-peers.txt in the peers' environment builds it"
    )


def type_of(name: str, width: int, mixture: str, layers: int, tied: bool) -> str:
    """Return the type that a matrix takes.

    Args:
        name: in the Hugging Face layout.
        width: of its rows.
        mixture: one of :data:`MIXTURES`.
        layers: of the model.
        tied: the embedding is the output matrix too.
    """
    usual, finer = MIXTURES[mixture]
    kind = usual
    if name.startswith("lm_head") or (tied and "embed_tokens" in name):
        kind = "Q6_K"
    elif "v_proj" in name or "down_proj" in name:
        layer, eighth = int(name.split(".")[2]), layers // 8
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            kind = finer
    return _FALLBACK.get(kind, kind) if width % 256 else kind


def rounded(matrix: Any, kind: str) -> tuple[Any, int]:
    """Return what a float32 matrix becomes, and the bytes that it takes as blocks."""
    import gguf
    import numpy as np

    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    rows, columns = matrix.shape
    made = np.zeros((rows, columns // block * size), np.uint8)
    wide = np.ascontiguousarray(matrix, np.float32)
    written = library().ggml_quantize_chunk(
        int(number), wide.ctypes.data, made.ctypes.data, 0, rows, columns, None
    )
    if written != made.nbytes:
        raise SystemExit(f"error: llama.cpp wrote {written} bytes of {kind}, not {made.nbytes}")
    return gguf.quants.dequantize(made, number).astype(np.float32), written


def main(source: Path, mixture: str, target: Path) -> None:
    """Write the target, whole or not at all."""
    from safetensors.numpy import load_file, save_file

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    layers, tied = config["num_hidden_layers"], config["tie_word_embeddings"]
    tensors = load_file(source / "model.safetensors")
    types: collections.Counter[str] = collections.Counter()
    size = 0
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            kind = type_of(name, tensor.shape[1], mixture, layers, tied)
            tensors[name], written = rounded(tensor, kind)
            if "_proj." in name:
                size += written
                types[kind] += 1
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        for beside in source.iterdir():
            if beside.suffix in (".json", ".jinja", ".model"):
                shutil.copy(beside, made)
        save_file(tensors, made / "model.safetensors", {"format": "pt"})
        described = {"linear_bytes": size, "types": dict(types.most_common())}
        (made / DESCRIPTION).write_text(json.dumps(described), encoding="utf-8")
        made.rename(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("mixture", choices=MIXTURES)
    parser.add_argument("target", type=Path)
    parsed = parser.parse_args()
    main(parsed.model, parsed.mixture, parsed.target)
