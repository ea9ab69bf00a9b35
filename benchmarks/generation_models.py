"""Random models of bench_generation.py and bench_engine.py: written once, in every engine's format.

    python benchmarks/generation_models.py FORMAT SHAPE DIRECTORY

FORMAT is hf, int8, int4 or int4-w (this suite's environment), one of llama.cpp's files (the
peers') or openvino-KIND (OpenVINO's). A model has its name when it is whole.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

# Prompts of a prefill, the tokens before a decoding step, the steps of a turn, and turns at most:
# every turn goes on where the last one ended.
PROMPTS, CONTEXT, STEPS, TURNS = (512, 4096), 64, 8, 24
BATCHES = (1, 8, 32)
CELLS = {f"prompt {n}": n for n in PROMPTS} | {f"decode {b}": b * STEPS for b in BATCHES}
# The prompt, and its last rows, whose logits all engines are compared in.
PROMPT, CHECKED = 512, 32

SHAPES: dict[str, dict[str, int]] = {
    "1.1B": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
    },
    "100M": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
    },
    "tiny": {  # to rehearse with
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    },
}
# This suite's types of integers. vLLM has no product of 4-bit weights and 8-bit inputs on x86 and
# opens the same weights with inputs as they are.
QUANTIZED = {"int8": "A8W8", "int4": "A8W4", "int4-w": "W4"}
GROUP = 32  # weights of 4 bits that share a scale, in every engine
GGUF = ("bf16.gguf", "q8_0.gguf", "q4_0.gguf")
# OpenVINO's integers, as its own exporter writes them but for the groups.
OPENVINO = {
    "openvino-bfloat16": None,
    "openvino-int8": {"bits": 8},
    "openvino-int4": {"bits": 4, "sym": True, "group_size": GROUP, "ratio": 1.0},
}

_TOKENIZER = Path(__file__).resolve().parent.parent / "data" / "assets" / "tiny-random-llama"


def sizes_of(shape: str) -> dict[str, int]:
    """Return the sizes of a shape; ``1.1B/4`` is the first with 4 layers.

    Raises:
        ValueError: no such shape.
    """
    name, _, layers = shape.partition("/")
    if name not in SHAPES or (layers and not layers.isdigit()):
        known = ", ".join(SHAPES)
        raise ValueError(f"shape {shape!r} is not one of {known}, or such a name with /LAYERS")
    return SHAPES[name] | ({"num_hidden_layers": int(layers)} if layers else {})


def prompt(vocabulary: int) -> Any:
    """Return the ids of the longest prompt; others are its beginnings."""
    import numpy as np

    return np.random.default_rng(1).integers(3, vocabulary, max(PROMPTS))


def _load_suite() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from llm import runtime

    runtime.prepare()
    runtime.load_paddle()


def write_hf(shape: str, place: Path) -> None:
    """Write a checkpoint in bfloat16."""
    _load_suite()
    import numpy as np

    from llm.llama.config import PRESETS
    from llm.llama.files.checkpoint import SINGLE_NAME
    from llm.llama.files.rank_layout import tensor_shapes
    from llm.llama.files.safetensors import write_file

    sizes = sizes_of(shape)
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    config = PRESETS["llama-2-7b"].replace(**sizes, head_dim=head)
    shapes, random = tensor_shapes(config), np.random.default_rng(0)

    def draw(name: str) -> Any:
        if "norm" in name:
            return np.full(shapes[name], 0x3F80, np.uint16)  # 1
        wide = random.standard_normal(shapes[name], np.float32) * np.float32(0.02)
        return ((wide.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)

    place.mkdir(parents=True)
    write_file(place / SINGLE_NAME, shapes, "BF16", draw)
    (place / "config.json").write_text(json.dumps(config.to_hf("bfloat16")), encoding="utf-8")


def write_quantized(name: str, source: Path, place: Path) -> None:
    """Write the checkpoint with linears of integers."""
    _load_suite()
    from llm.llama.build import load_model, save_model
    from llm.llama.quant_config import QuantConfig
    from llm.llama.quantization.network import quantize_model

    kind = QUANTIZED[name]
    model = load_model(source, dtype="float32")
    quantize_model(model, QuantConfig.of_type(kind, GROUP if kind.endswith("4") else None))
    save_model(model, place)


def write_openvino(name: str, source: Path, place: Path) -> None:
    """Let OpenVINO's exporter write the checkpoint."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    integers = OPENVINO[name]
    how = None if integers is None else OVWeightQuantizationConfig(**integers)
    model = OVModelForCausalLM.from_pretrained(
        source, export=True, compile=False, load_in_8bit=False, quantization_config=how
    )
    model.save_pretrained(place)
    # Its pipeline does not open without one, though it is given ids.
    tokenizer = AutoTokenizer.from_pretrained(_TOKENIZER)
    both = convert_tokenizer(tokenizer, with_detokenizer=True)
    for part, one in zip(("tokenizer", "detokenizer"), both, strict=True):
        openvino.save_model(one, place / f"openvino_{part}.xml")


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


def write_gguf(shape: str, source: Path, file: Path) -> None:
    """Write the checkpoint for llama.cpp."""
    import gguf
    import llama_cpp
    import torch
    from safetensors import safe_open

    sizes = sizes_of(shape)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("random")
    writer.add_vocab_size(sizes["vocab_size"])
    writer.add_context_length(sizes["max_position_embeddings"])
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(sizes["num_attention_heads"])
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(json.loads(_config(source))["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(sizes["hidden_size"] // sizes["num_attention_heads"])
    writer.add_file_type(llama_cpp.LLAMA_FTYPE_MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    heads = {"q": sizes["num_attention_heads"], "k": sizes["num_key_value_heads"]}
    with safe_open(source / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (it is no mapping)
            tensor = tensors.get_tensor(name)
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


def quantize_gguf(source: Path, name: str, file: Path) -> None:
    """Let llama.cpp quantize its file."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    kind = name.removesuffix(".gguf").upper()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), settings):
        raise SystemExit(f"llama.cpp did not quantize to {kind}")


def _config(source: Path) -> str:
    return (source / "config.json").read_text(encoding="utf-8")


def main(name: str, shape: str, directory: Path) -> None:
    """Write one format beside its name, then give it that."""
    place, source = directory / f"{name}.part", directory / "hf"
    shutil.rmtree(place, ignore_errors=True)
    if name == "hf":
        write_hf(shape, place)
    elif name in QUANTIZED:
        write_quantized(name, source, place)
    elif name in OPENVINO:
        write_openvino(name, source, place)
    elif name == GGUF[0]:
        write_gguf(shape, source, place)
    else:
        quantize_gguf(directory / GGUF[0], name, place)
    place.replace(directory / name)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
