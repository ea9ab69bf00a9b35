"""A LoRA step over each type of frozen base: seconds, and the process's peak memory.

    python benchmarks/bench_lora_base.py [--bases float32 W4] [--one_by_one] [--layers N]

One worker process per type opens the same model directory as ``finetune_generation.py`` does; they
take turns step by step, or with --one_by_one run one after the other, where memory does not hold
all of them. All labels count, and each says its loss, so that a step that computes something else
would be noticed. Peak memory is the kernel's (VmHWM), from the start of the process:
imports and loading are in it. The model has random weights in bfloat16, and is written once.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import environment, write_row

BASES = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "W8": {"dtype": "bfloat16", "bits": 8},
    "W4": {"dtype": "bfloat16", "bits": 4},
}


def prepare(shape: str, layers: int | None, directory: Path) -> None:
    """Write a model directory with random weights in bfloat16."""
    from llm import runtime

    runtime.prepare(2)
    runtime.load_paddle()
    from llm.llama.build import build_model, save_model
    from llm.llama.config import load_config

    config = load_config(shape)
    if layers is not None:
        config = dataclasses.replace(config, num_hidden_layers=layers)
    model = build_model(config, seed=0, dtype="bfloat16", frozen=True)
    save_model(model, directory)


def opened(directory: str, base: str) -> Any:
    """Return a network with an adapter, as ``--weight_quantize_algo`` and ``--base_dtype`` do."""
    from llm.config.tools import group_size_of
    from llm.llama.adapters.lora import LoRAConfig, add_lora
    from llm.llama.build import load_model
    from llm.llama.config import load_config
    from llm.llama.quant_config import QuantConfig

    how = BASES[base]
    round_to = None
    if "bits" in how:
        config = load_config(directory)
        kind = f"W{how['bits']}"
        group = group_size_of(kind, (config.hidden_size, config.intermediate_size))
        round_to = QuantConfig.of_type(kind, group)
    model = load_model(directory, dtype=how["dtype"], frozen=True, round_to=round_to)
    return add_lora(model, LoRAConfig(r=8, lora_alpha=16), seed=0)


def serve(args: argparse.Namespace) -> None:
    """Run a step a line: seconds, loss and peak memory."""
    from llm import runtime

    runtime.prepare(args.threads)
    if args.role != "float32":
        runtime.return_large_memory()
    runtime.load_paddle()
    import numpy as np
    import paddle

    from llm.parallel.topology import single
    from llm.parallel.updater import Updater

    model = opened(args.directory, args.role)
    model.train()

    def adamw(owned: list[Any]) -> Any:
        return model.ops.adamw(1e-4, parameters=owned)

    optimizer = Updater(model.parameters(), adamw, single(), max_norm=1.0)
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        random = np.random.default_rng(int(line))
        ids = random.integers(0, model.config.vocab_size, [args.batch, args.length + 1])
        labels_n = paddle.to_tensor(ids[:, 1:]).flatten()
        loss = model.token_losses(paddle.to_tensor(ids[:, :-1]), labels_n)[0].mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        print(json.dumps([time.perf_counter() - start, loss.item(), peak()]), flush=True)


def peak() -> int:
    """Return the most bytes of memory that this process has had."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


class Worker:
    """One type of base in a process of its own."""

    def __init__(self, base: str, args: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--role", base, "--directory", args.directory]
        for name in ("batch", "length", "threads"):
            command += [f"--{name}", str(getattr(args, name))]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        assert self.process.stdout is not None
        while (line := self.process.stdout.readline()) != "ready\n":
            if not line:
                raise SystemExit(f"the {base} worker ended with {self.process.wait()}")

    def step(self, number: int) -> list[float]:
        """Return seconds, loss and peak bytes of one step."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with {self.process.wait()}")
        found: list[float] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process, and its memory with it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def in_turn(args: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Return what every base's steps gave, from workers that run beside each other."""
    workers = {base: Worker(base, args) for base in args.bases}
    found: dict[str, list[list[float]]] = {base: [] for base in workers}
    for number in range(args.steps + 1):
        for base, worker in workers.items():
            found[base].append(worker.step(number))
    for worker in workers.values():
        worker.close()
    return found


def alone(base: str, args: argparse.Namespace) -> list[list[float]]:
    """Return what one base's steps gave, with no other worker."""
    worker = Worker(base, args)
    found = [worker.step(number) for number in range(args.steps + 1)]
    worker.close()
    return found


def main() -> None:
    """Start the workers, take turns, print and store a row for each type."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="meta-llama/Llama-3.2-1B")
    parser.add_argument("--layers", type=int, help="of the shape; all when not given")
    parser.add_argument("--directory", default="outputs/bench-lora-base")
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--one_by_one", action="store_true", help="a base's process ends before the next begins"
    )
    parser.add_argument("--steps", type=int, default=3, help="after one that does not count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--role", help="of a worker process")
    args = parser.parse_args()
    if args.role:
        return serve(args)
    if not (Path(args.directory) / "config.json").is_file():
        with ProcessPoolExecutor(1) as pool:  # whose memory goes with it
            pool.submit(prepare, args.shape, args.layers, Path(args.directory)).result()
    written = json.loads((Path(args.directory) / "config.json").read_text(encoding="utf-8"))
    together = None if args.one_by_one else in_turn(args)
    first: float | None = None
    for base in args.bases:
        load = round(os.getloadavg()[0], 2)
        rows = alone(base, args) if together is None else together[base]
        seconds = median(row[0] for row in rows[1:])
        first = seconds if first is None else first
        result = {
            "shape": args.shape,
            "layers": written["num_hidden_layers"],
            "tokens": [args.batch, args.length],
            "base": base,
            "threads": args.threads,
            "one_by_one": args.one_by_one,
            "load": load,
            "seconds": round(seconds, 2),
            "times_the_first": round(seconds / first, 3),
            "loss": rows[0][1],
            "peak_gb": round(rows[-1][2] / 1e9, 2),
        }
        print(json.dumps(result), flush=True)
        write_row("lora_base", result | environment())
    return None


if __name__ == "__main__":
    main()
