"""One training step of ours against HF transformers on PyTorch: the same weights and tokens.

Two worker processes, one per stack, take turns step by step; the parent compares their times and
their losses, so a faster step that computes something else would be noticed. fp32, AdamW, gradient
clipping to 1.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "25M": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1280,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    },
    "100M": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
}
BATCH, LENGTH = 4, 512
ADAM = {"learning_rate": 3e-4, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "decay": 0.1}


def _tokens(shape: str, step: int) -> Any:
    import numpy as np

    rng = np.random.default_rng(step)
    return rng.integers(0, SHAPES[shape]["vocab_size"], [BATCH, LENGTH + 1])


def peer_step(shape: str, directory: str, threads: int) -> Any:
    """Return a function that runs one step of transformers on PyTorch."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPES[shape], rms_norm_eps=1e-5)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(directory)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=ADAM["learning_rate"],
        betas=(ADAM["beta1"], ADAM["beta2"]),
        eps=ADAM["epsilon"],
        weight_decay=ADAM["decay"],
        fused=True,  # the fastest of its three CPU forms
    )

    def step(number: int) -> float:
        ids = torch.from_numpy(_tokens(shape, number))
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def our_step(shape: str, directory: str, threads: int, ops: str) -> Any:
    """Return a function that runs one step of this suite."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from llm import runtime

    runtime.prepare(threads)
    runtime.load_paddle()
    import paddle

    from llm.llama.build import load_model
    from llm.parallel.topology import single
    from llm.parallel.updater import Updater

    model = load_model(directory, ops={"others": ops})
    model.train()

    def adamw(owned: list[Any]) -> Any:
        return model.ops.adamw(
            ADAM["learning_rate"],
            beta1=ADAM["beta1"],
            beta2=ADAM["beta2"],
            epsilon=ADAM["epsilon"],
            weight_decay=ADAM["decay"],
            parameters=owned,
        )

    optimizer = Updater(model.parameters(), adamw, single(), max_norm=1.0)

    def step(number: int) -> float:
        ids = _tokens(shape, number)
        labels_n = paddle.to_tensor(ids[:, 1:]).flatten()
        loss = model.token_losses(paddle.to_tensor(ids[:, :-1]), labels_n)[0].mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        return loss.item()

    return step


def serve(args: argparse.Namespace) -> None:
    """Run steps on request: a step number a line in, seconds and loss a line out."""
    place = (args.shape, args.directory, args.threads)
    step = our_step(*place, args.ops) if args.role == "ours" else peer_step(*place)
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        loss = step(int(line))
        print(json.dumps([time.perf_counter() - start, loss]), flush=True)


class Worker:
    """One stack in a process of its own."""

    def __init__(self, python: str, role: str, directory: str, args: argparse.Namespace) -> None:
        command = [python, __file__, "--role", role, "--directory", directory]
        command += ["--shape", args.shape, "--ops", args.ops, "--threads", str(args.threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.into, self.out = self.process.stdin, self.process.stdout
        while (line := self.out.readline()) != "ready\n":
            if not line:
                raise SystemExit(f"the {role} worker ended with {self.process.wait()}")

    def step(self, number: int) -> tuple[float, float]:
        """Run one step; return seconds and loss."""
        self.into.write(f"{number}\n")
        self.into.flush()
        seconds, loss = json.loads(self.out.readline())
        return seconds, loss

    def close(self) -> None:
        """End the process."""
        self.into.close()
        self.process.wait()


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Interleave the two stacks and return medians, their ratio and the largest loss difference."""
    import record

    with tempfile.TemporaryDirectory() as directory:
        peer = Worker(args.peers_python, "peer", directory, args)
        ours = Worker(sys.executable, "ours", directory, args)
        times: dict[str, list[float]] = {"ours": [], "peer": []}
        worst = 0.0
        for number in range(args.steps + 2):
            ours_seconds, ours_loss = ours.step(number)
            peer_seconds, peer_loss = peer.step(number)
            worst = max(worst, abs(ours_loss - peer_loss))
            if number >= 2:  # the first two warm up
                times["ours"].append(ours_seconds)
                times["peer"].append(peer_seconds)
        ours.close()
        peer.close()
    ratios = [p / o for o, p in zip(times["ours"], times["peer"], strict=True)]
    seconds = {name: record.median(values) for name, values in times.items()}
    return {
        "shape": {"name": args.shape, **SHAPES[args.shape]},
        "ops": args.ops,
        "threads": args.threads,
        "batch": BATCH,
        "length": LENGTH,
        "steps": args.steps,
        "ours_seconds": round(seconds["ours"], 4),
        "peer_seconds": round(seconds["peer"], 4),
        "ours_tokens_per_second": round(BATCH * LENGTH / seconds["ours"], 1),
        "speedup": round(record.median(ratios), 3),
        "largest_loss_difference": worst,
    }


def main() -> None:
    """Parse flags; compare, or be one of the workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers_python", default=".venv-peers/bin/python")
    parser.add_argument("--shape", choices=SHAPES, default="25M")
    parser.add_argument("--ops", choices=("auto", "reference"), default="auto", help="ours")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--role", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        serve(args)
        return
    import record

    result = compare(args) | record.environment()
    file = record.write_row("train_step", result)
    print(
        f"{args.shape}, {args.threads} threads: ours {result['ours_seconds']:.3f} s, "
        f"transformers {result['peer_seconds']:.3f} s: "
        f"{result['speedup']:.2f}x; largest loss difference "
        f"{result['largest_loss_difference']:.1e}\nwritten to {file}"
    )


if __name__ == "__main__":
    main()
