"""Quantized checkpoints in the peers' environment: ``-m tests.parity.quantization_side read DIR``.

transformers opens every directory below DIR with the compressed-tensors package and stores its
logits, and the weights as it widens them, as ``hf.safetensors``. With the package missing, it
writes nothing.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.utils import logging


def read_model(directory: Path) -> None:
    """Write what transformers makes of a quantized directory."""
    ids = load_file(directory / "ids.safetensors")["ids"]
    model, said = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        quantization_config=CompressedTensorsConfig(run_compressed=False),
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


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("read",))
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    if importlib.util.find_spec("compressed_tensors") is None:
        return
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    for directory in sorted(p for p in args.directory.iterdir() if p.is_dir()):
        read_model(directory)


if __name__ == "__main__":
    main()
