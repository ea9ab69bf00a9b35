"""Quantized checkpoints in the peers' environment: ``-m tests.parity.quantization_side``.

``read DIR``: transformers opens every directory below DIR with the compressed-tensors package and
stores its logits, and the weights as it widens them, as ``hf.safetensors``. ``write DIR``: that
package quantizes random models, and transformers saves and opens them. With the package missing,
neither writes anything.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import logging

THEIRS = {
    "W4A16": ({"num_bits": 4, "strategy": "group", "group_size": 32}, None),
    "W8A16": ({"num_bits": 8, "strategy": "channel"}, None),
    "W8A8": (
        {"num_bits": 8, "strategy": "channel"},
        {"num_bits": 8, "strategy": "token", "dynamic": True},
    ),
}


def read_model(directory: Path) -> None:
    """Write what transformers makes of a quantized directory."""
    ids = load_file(directory / "ids.safetensors")["ids"]
    described = json.loads((directory / "config.json").read_text())["quantization_config"]
    # transformers itself widens all linears by one group of settings, right or wrong; the package
    # does it in the first forward pass.
    several = len(described["config_groups"]) > 1
    model, said = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        quantization_config=CompressedTensorsConfig(run_compressed=several),
    )
    problems = {key: sorted(map(str, value)) for key, value in said.items() if value}
    if problems:
        raise ValueError(f"transformers loads {directory} with {problems}")
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    weights = {
        f"weight.{name}": parameter.detach().float().contiguous()
        for name, parameter in model.named_parameters()
        if name.endswith("_proj.weight")
    }
    save_file({"logits": logits.float(), **weights}, directory / "hf.safetensors")


def write_model(directory: Path, weights: dict, activations: dict | None) -> None:
    """Quantize a random model with compressed-tensors and store it, and what it answers."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config)
    of_weights = QuantizationArgs(type="int", symmetric=True, **weights)
    of_inputs = activations and QuantizationArgs(type="int", symmetric=True, **activations)
    scheme = QuantizationScheme(targets=["Linear"], weights=of_weights, input_activations=of_inputs)
    groups = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, groups)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            rows = module.weight.data.unflatten(1, (module.weight_scale.shape[1], -1))
            scale, _ = calculate_qparams(rows.amin(-1), rows.amax(-1), of_weights)
            module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)
    ids = torch.randint(96, (2, 16))
    save_file({"ids": ids}, directory / "ids.safetensors")
    read_model(directory)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("read", "write"))
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    if importlib.util.find_spec("compressed_tensors") is None:
        return
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if args.command == "write":
        for name, (weights, activations) in THEIRS.items():
            write_model(args.directory / name, weights, activations)
        return
    for directory in sorted(p for p in args.directory.iterdir() if p.is_dir()):
        read_model(directory)


if __name__ == "__main__":
    main()
