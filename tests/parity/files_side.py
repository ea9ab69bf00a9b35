"""What runs in the peers' environment: files that PyTorch, transformers, llama.cpp write or read.

``python -m tests.parity.files_side write DIR`` makes ``pytorch_model.bin`` of every safetensors
file below a directory; ``read DIR`` writes what torch makes of every ``.pth``, transformers of
every GGUF file, and llama.cpp of a prompt beside it. None imports anything of the suite.
"""

import json
import sys
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def write(root: Path) -> None:
    """Write every model once more, as older releases of transformers did."""
    for file in sorted(root.glob("*/model.safetensors")):
        tensors = load_file(file)
        first = next(iter(tensors))
        tensors[first] = torch.nn.Parameter(tensors[first])  # as state_dict(keep_vars=True) has it
        torch.save(tensors, file.with_name("pytorch_model.bin"))


def greedy(file: Path, prompt: list[int], count: int) -> list[int]:
    """Return the likeliest tokens by llama.cpp, one after the other."""
    from xllamacpp import CommonParams, Server, ggml_type

    params = CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), 128, 1
    params.cpuparams.n_threads, params.warmup = 1, False
    params.cache_type_k = params.cache_type_v = ggml_type.GGML_TYPE_F32
    server = Server(params)
    asked = {"prompt": prompt, "n_predict": count, "temperature": 0, "return_tokens": True}
    request = urllib.request.Request(
        f"{server.listening_address}/completion",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        ids: list[int] = json.loads(answer.read())["tokens"]
    return ids


def read(root: Path) -> None:
    """Write what the peers make of our files, beside them."""
    for file in sorted(root.glob("*/*.pth")):
        found = torch.load(file, weights_only=True, mmap=True)
        save_file({k: v.contiguous() for k, v in found.items()}, file.with_suffix(".read"))
    for file in sorted(root.glob("*/model.gguf")):
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        ).eval()
        given = json.loads((file.parent / "prompt.json").read_text())
        with torch.no_grad():
            logits = model(torch.tensor([given["ids"]])).logits
        save_file({"logits": logits}, file.parent / "hf.read")
        answer = greedy(file, given["ids"], given["count"])
        (file.parent / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
