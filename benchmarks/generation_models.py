"""Random models for bench_generation.py: written once, in every engine's format.

python benchmarks/generation_models.py hf SHAPE DIRECTORY       (this suite's environment)
python benchmarks/generation_models.py gguf SHAPE DIRECTORY     (the peers')
"""

import json
import sys
from pathlib import Path
from typing import Any

# The prompt of a prefill, the tokens before a decoding step, and the steps of a turn.
PROMPT, CONTEXT, STEPS = 512, 64, 8
BATCHES = (1, 8)
# Rows of the prompt whose logits all engines are compared in.
CHECKED = 32

SHAPES: dict[str, dict[str, int]] = {
    "1.1B": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "100M": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
}
# This suite's widths and what llama.cpp calls its nearest.
QUANTIZED = {"int8": "A8W8", "int4": "A8W4"}
GGUF = ("bf16", "q8_0", "q4_0")


def prompt(vocabulary: int) -> Any:
    """Return the ids of the prompt."""
    import numpy as np

    return np.random.default_rng(1).integers(3, vocabulary, PROMPT)


def write_hf(shape: str, directory: Path) -> None:
    """Write a bfloat16 checkpoint, and this suite's quantized ones beside it."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from llm import runtime

    runtime.prepare()
    runtime.load_paddle()
    import numpy as np

    from llm.llama.build import load_model, save_model
    from llm.llama.config import PRESETS
    from llm.llama.files.checkpoint import SINGLE_NAME
    from llm.llama.files.rank_layout import tensor_shapes
    from llm.llama.files.safetensors import write_file
    from llm.llama.quant_config import QuantConfig
    from llm.llama.quantization.network import quantize_model

    sizes = SHAPES[shape]
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    config = PRESETS["llama-2-7b"].replace(**sizes, head_dim=head)
    shapes, random = tensor_shapes(config), np.random.default_rng(0)

    def draw(name: str) -> Any:
        if "norm" in name:
            return np.full(shapes[name], 0x3F80, np.uint16)  # 1
        wide = random.standard_normal(shapes[name], np.float32) * np.float32(0.02)
        return ((wide.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)

    place = directory / "hf"
    place.mkdir(parents=True)
    write_file(place / SINGLE_NAME, shapes, "BF16", draw)
    (place / "config.json").write_text(json.dumps(config.to_hf("bfloat16")), encoding="utf-8")
    for name, kind in QUANTIZED.items():
        model = load_model(place, dtype="float32")
        quantize_model(model, QuantConfig.of_type(kind, 32 if kind.endswith("4") else None))
        save_model(model, directory / name)
        del model


_NAMES = {
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
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def _gguf_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def _interleaved(tensor: Any, heads: int) -> Any:
    """Reorder rows from halves to pairs, which is how llama.cpp rotates."""
    rows, columns = tensor.shape
    halves = tensor.reshape(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def write_gguf(shape: str, directory: Path) -> None:
    """Write the checkpoint for llama.cpp, and let llama.cpp quantize it."""
    import gguf
    import llama_cpp
    import torch
    from safetensors import safe_open

    sizes = SHAPES[shape]
    file = directory / f"{GGUF[0]}.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("random")
    writer.add_vocab_size(sizes["vocab_size"])
    writer.add_context_length(sizes["max_position_embeddings"])
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(sizes["num_attention_heads"])
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(json.loads(_config(directory))["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(sizes["hidden_size"] // sizes["num_attention_heads"])
    writer.add_file_type(llama_cpp.LLAMA_FTYPE_MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    heads = {"q": sizes["num_attention_heads"], "k": sizes["num_key_value_heads"]}
    with safe_open(directory / "hf" / "model.safetensors", "pt") as source:
        for name in source.keys():  # noqa: SIM118  (it is no mapping)
            tensor = source.get_tensor(name)
            for part, count in heads.items():
                if f"{part}_proj" in name:
                    tensor = _interleaved(tensor, count)
            if tensor.ndim == 1:
                writer.add_tensor(_gguf_name(name), tensor.float().numpy())
                continue
            raw = tensor.contiguous().view(torch.uint8).numpy()
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(_gguf_name(name), raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in GGUF[1:]:
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name.upper()}")
        target = str(directory / f"{name}.gguf").encode()
        if llama_cpp.llama_model_quantize(str(file).encode(), target, settings):
            raise SystemExit(f"llama.cpp did not quantize to {name}")


def _config(directory: Path) -> str:
    return (directory / "hf" / "config.json").read_text(encoding="utf-8")


if __name__ == "__main__":
    write = {"hf": write_hf, "gguf": write_gguf}[sys.argv[1]]
    write(sys.argv[2], Path(sys.argv[3]))
