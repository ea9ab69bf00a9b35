"""Converting a checkpoint: this suite's stream against loading and saving with transformers.

Every run is a process of its own; its wall time and the high-water mark of its memory count,
imports included. Runs of all tasks take turns, and the files of the last round are compared tensor
by tensor, so that a faster run that writes something else would be noticed. Source files are in the
page cache. This suite's runs end when everything is on the disk, transformers' when it is written.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARD_GB = 1.0


def write_source(directory: Path, gigabytes: float) -> dict[str, Any]:
    """Write a random bfloat16 model of about that size; return its shape."""
    import numpy as np

    from llm.llama.config import PRESETS
    from llm.llama.files.checkpoint import SINGLE_NAME
    from llm.llama.files.rank_layout import tensor_shapes
    from llm.llama.files.safetensors import write_file

    config = PRESETS["llama-2-7b"].replace(
        hidden_size=2048, intermediate_size=5504, num_attention_heads=16, num_key_value_heads=8
    )
    config = config.replace(head_dim=128, num_hidden_layers=1)
    layer = config.replace(num_hidden_layers=2).num_parameters - config.num_parameters
    rest = config.num_parameters - layer
    config = config.replace(num_hidden_layers=max(2, round((gigabytes * 5e8 - rest) / layer)))
    shapes, rng = tensor_shapes(config), np.random.default_rng(0)

    def draw(name: str) -> Any:
        sign = rng.integers(0, 2, shapes[name], dtype=np.uint16) << 15
        return sign | rng.integers(0x3A00, 0x3D00, shapes[name], dtype=np.uint16)

    directory.mkdir()
    write_file(directory / SINGLE_NAME, shapes, "BF16", draw)
    (directory / "config.json").write_text(json.dumps(config.to_hf("bfloat16")), encoding="utf-8")
    largest = max(2 * int(np.prod(shape)) for shape in shapes.values())
    return {
        "bytes": config.num_parameters * 2,
        "largest_tensor_bytes": largest,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
    }


def peer_convert(source: str, target: str, dtype: str) -> None:
    """Load with transformers and save."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    model.save_pretrained(target, max_shard_size=f"{SHARD_GB:g}GB")


def _ours(*words: str) -> list[str]:
    return [sys.executable, str(ROOT / "convert_checkpoint.py"), *words]


def tasks(root: Path, peers_python: str, threads: int) -> dict[str, tuple[Path, list[str]]]:
    """Return the command of each task, and the directory that it writes."""
    source = str(root / "source")
    found: dict[str, tuple[Path, list[str]]] = {}
    shard = ("--threads", str(threads), "--max_shard_size", str(SHARD_GB))
    for dtype in ("bfloat16", "float16"):
        mine, theirs = root / f"ours-{dtype}", root / f"peer-{dtype}"
        words = ("--input_dir", source, "--output_dir", str(mine), "--dtype", dtype, *shard)
        found[f"ours_to_{dtype}"] = (mine, _ours(*words))
        command = [peers_python, __file__, "--peer", source, str(theirs), dtype]
        found[f"peer_to_{dtype}"] = (theirs, command)
    ranks, back = root / "ranks", root / "back"
    words = ("--input_dir", source, "--output_dir", str(ranks), "--threads", str(threads))
    degrees = ("--tensor_parallel_degree", "4", "--pipeline_parallel_degree", "2")
    found["ours_to_tp4_pp2"] = (ranks, _ours(*words, *degrees))
    words = ("--input_dir", str(ranks), "--output_dir", str(back), *shard)
    found["ours_from_tp4_pp2"] = (back, _ours(*words))
    return found


def measure(command: list[str], target: Path) -> tuple[float, int]:
    """Run a command that makes a directory; return seconds and the peak of its memory in bytes."""
    shutil.rmtree(target, ignore_errors=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    log = target.with_suffix(".log")
    with log.open("wb") as stream:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text(encoding='utf-8')[-2000:]}")
    return seconds, usage.ru_maxrss * 1024


def digests(directory: Path) -> dict[str, str]:
    """Return a digest of every tensor of a directory of safetensors."""
    from llm.llama.files.checkpoint import open_checkpoint
    from llm.llama.files.tensors import load

    found = {}
    for name, tensor in open_checkpoint(directory).tensors.items():
        (array,) = tensor.arrays
        found[name] = hashlib.sha256(load(array, mapped=True)).hexdigest()
    return found


def compare(root: Path, peers_python: str, threads: int, rounds: int) -> dict[str, Any]:
    """Run all tasks in turn; return medians by task."""
    import record

    planned = tasks(root, peers_python, threads)
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in planned}
    for _ in range(rounds):
        for name, (target, command) in planned.items():
            runs[name].append(measure(command, target))
    source = digests(root / "source")
    assert digests(root / "ours-bfloat16") == digests(root / "peer-bfloat16") == source
    assert digests(root / "ours-float16") == digests(root / "peer-float16") != source
    assert digests(root / "back") == source
    return {
        name: {
            "seconds": round(record.median([seconds for seconds, _ in values]), 2),
            "peak_bytes": max(peak for _, peak in values),
        }
        for name, values in runs.items()
    }


def main() -> None:
    """Parse flags; measure, or be a run of transformers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers_python", default=".venv-peers/bin/python")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", help="where files go; seven times the size has to fit")
    parser.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        peer_convert(*args.peer)
        return
    sys.path.insert(0, str(ROOT))
    if args.write:
        print(json.dumps(write_source(Path(args.write), args.gigabytes)))
        return
    import record

    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        root = Path(name)
        # A process inherits the high-water mark of the one that starts it, so this one stays small.
        command = [sys.executable, __file__, "--write", str(root / "source")]
        command += ["--gigabytes", str(args.gigabytes)]
        shape = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        found = compare(root, str(Path(args.peers_python).absolute()), args.threads, args.rounds)
    record.write_row(
        "convert",
        {"source": shape, "threads": args.threads, "rounds": args.rounds, **found}
        | record.environment(("numpy",)),
    )
    limit = 2 * shape["largest_tensor_bytes"] + 2**30
    for task, row in found.items():
        print(f"{task:18} {row['seconds']:7.2f} s {row['peak_bytes'] / 1e6:8.0f} MB")
    print(f"twice the largest tensor and 1 GiB: {limit / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
