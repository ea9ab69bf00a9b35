"""The first commands on a machine with GPUs, the cheapest first: ``make gpu-first``.

Every path of the suite runs once on the smallest model, then each layout of two GPUs where there
are two, and has to log the losses of one. What fails is shown and does not stop the rest. At the
end real networks of random weights train for some updates, and a table sets tokens per second, MFU
and peak memory beside what the planner predicts. ``--small`` takes a small network for that:

    python -m tests.device.run --role gpu -- -m benchmarks.gpu_first --small
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, environment, write_row
from llm.llama.config import TINY_NAME
from llm.planner import predict
from llm.planner.__main__ import read_recipe
from llm.planner.report import utilization
from llm.planner.workload import DEVICES, Hardware, hardware

HALF = ("--bf16", "true", "--fp16_opt_level", "O2")
# Losses near ln 1024 of two GPUs beside one's: sums of bfloat16 in another order.
BAND = 5e-3
SECONDS = 900


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        name: what it shows.
        words: script or ``-m`` and module, and its arguments; ``{out}`` is where results go.
        gpus: processes, with a GPU each.
        like: the step whose losses it has to log.
        float8: whether it wants float8 products by block, which few GPUs have.
    """

    name: str
    words: tuple[str, ...]
    gpus: int = 1
    like: str = ""
    float8: bool = False


def _pretrain(name: str, *words: str, gpus: int = 1, like: str = "", float8: bool = False) -> Step:
    """Return a step that pretrains a small model on random documents."""
    model = "{out}/blocks" if "blocks" in name else "{out}/model"
    usual = ("run_pretrain.py", "--model_name_or_path", model, "--input_dir", "{out}/corpus")
    usual += ("--max_seq_length", "64", "--max_steps", "6", "--logging_steps", "1", "--do_train")
    usual += ("--per_device_train_batch_size", "2", "--learning_rate", "0.003", "--device", "gpu")
    usual += ("--save_steps", "3", "--report_to", "none", "--disable_tqdm", "true")
    if "--gradient_accumulation_steps" not in words:
        usual += ("--gradient_accumulation_steps", "2")
    words = (*usual, "--output_dir", f"{{out}}/{_slug(name)}", *words)
    return Step(name, words, gpus, like, float8)


def _finetune(name: str, *words: str) -> Step:
    usual = ("finetune_generation.py", "--model_name_or_path", "{out}/model", "--device", "gpu")
    usual += ("--max_steps", "3", "--logging_steps", "1", "--do_train", "--src_length", "96")
    usual += ("--tgt_length", "16", "--on_long", "truncate", "--per_device_train_batch_size", "2")
    usual += ("--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no")
    if "--task_name" not in words:
        usual += ("--task_name", "squad")
    return Step(name, (*usual, "--output_dir", f"{{out}}/{_slug(name)}", *words))


def _predict(name: str, model: str, *words: str) -> Step:
    usual = ("predict_generation.py", "--model_name_or_path", model, "--device", "gpu")
    return Step(name, (*usual, "--prompt", "The", "--max_length", "8", *words))


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def steps() -> list[Step]:
    """Return what one GPU runs, then what two do."""
    float16 = ("--fp16", "true", "--fp16_opt_level", "O2", "--scale_loss", "1024")
    resumed = "{out}/" + _slug("pretrain bfloat16 O2") + "/checkpoint-3"
    export = (
        "export_generation_model.py",
        "--model_name_or_path",
        "{out}/model",
        "--device",
        "gpu",
    )
    quantize = ("quantize_generation.py", "--model_name_or_path", "{out}/model", "--device", "gpu")
    evaluate = ("evaluate_generation.py", "--model_name_or_path", "{out}/model", "--device", "gpu")
    master = ("--amp_master_grad", "true", "--recompute", "true", "--offload_optim", "static")
    one, gpu = "pretrain bfloat16 O2", ("--device", "gpu")
    blocks = "pretrain in blocks of 128"
    alone = [
        Step("ops, one by one", ("-m", "llama_paddle_ops")),
        _predict("predict float32", "{out}/model"),
        _predict("predict bfloat16", "{out}/model", "--dtype", "bfloat16"),
        _predict("predict float16", "{out}/model", "--dtype", "float16"),
        Step("export", (*export, "--output_path", "{out}/exported/llama", "--dtype", "bfloat16")),
        Step(
            "infer",
            ("infer_generation.py", "--model_dir", "{out}/exported", *gpu, "--prompt", "The"),
        ),
        Step(
            "evaluate",
            (*evaluate, "--task", "perplexity", "--data_file", "README.md", "--dtype", "bfloat16"),
        ),
        _pretrain(one, *HALF),
        _pretrain("resume", *HALF, "--resume_from_checkpoint", resumed, like=one),
        _pretrain("pretrain bfloat16 O1", "--bf16", "true", "--fp16_opt_level", "O1", like=one),
        _pretrain("pretrain float16 O2", *float16, like=one),
        _pretrain("master gradients, recompute, offload", *HALF, *master, like=one),
        _pretrain(blocks, *HALF),
        _pretrain(f"{blocks}, float8", *HALF, "--fp8", "true", like=blocks, float8=True),
        _finetune("all weights", *HALF),
        _finetune("LoRA", "--lora", "true", *HALF),
        _finetune("packed rows", "--packing", "true", "--max_seq_length", "256", *HALF),
        _finetune("prefix", "--prefix_tuning", "true", "--num_prefix_tokens", "4", *HALF),
        _finetune("DPO", "--dpo", "true", "--lora", "true", "--task_name", "preference", *HALF),
        _finetune("quantization-aware", "--qat", "true", *HALF),
        Step("quantize W8", (*quantize, "--output_dir", "{out}/w8", "--quant_type", "W8")),
        _predict("predict W8", "{out}/w8", "--dtype", "bfloat16"),
    ]
    alone_on_a_rank = ("--gradient_accumulation_steps", "1")
    layouts = {
        "data parallel": ("--data_parallel_degree", "2", *alone_on_a_rank),
        "ZeRO stage 1": (
            "--sharding",
            "stage1",
            "--sharding_parallel_degree",
            "2",
            *alone_on_a_rank,
        ),
        "ZeRO stage 3": (
            "--sharding",
            "stage3",
            "--sharding_parallel_degree",
            "2",
            *alone_on_a_rank,
        ),
        "tensor": ("--tensor_parallel_degree", "2", "--sequence_parallel", "true"),
        "pipeline": ("--pipeline_parallel_degree", "2"),
        "ring": ("--context_parallel_degree", "2"),
    }
    return alone + [
        _pretrain(f"2 GPUs, {name}", *HALF, *words, gpus=2, like=one)
        for name, words in layouts.items()
    ]


@dataclass(frozen=True)
class Measured:
    """A network that trains for some updates at a size that matters.

    Args:
        shape: a built-in one, or a directory.
        flags: of pretraining, beyond those of all.
    """

    shape: str
    flags: tuple[str, ...]

    def words(self, out: Path) -> list[str]:
        """Return the command line behind ``run_pretrain.py``."""
        usual = ["--model_name_or_path", self.shape, "--input_dir", f"{out}/corpus", "--do_train"]
        usual += ["--max_steps", "12", "--logging_steps", "1", "--save_strategy", "no", *HALF]
        usual += ["--report_to", "none", "--disable_tqdm", "true", "--device", "gpu"]
        return [*usual, "--output_dir", str(out / _slug(self.shape)), *self.flags]


_ROWS = ("--per_device_train_batch_size", "2", "--max_seq_length", "4096")
SIZES = {
    "small": [Measured("tiny-random-llama", ("--max_seq_length", "64"))],
    "full": [
        Measured("llama-3.2-1b", (*_ROWS, "--gradient_accumulation_steps", "4")),
        Measured(
            "llama-3.2-3b", (*_ROWS, "--recompute", "true", "--use_fused_head_and_loss_fn", "true")
        ),
    ],
}


def run(words: Sequence[str], log: Path, gpus: int) -> int:
    """Run a command with its output in a file; return its exit status."""
    launcher = ["-m", "paddle.distributed.launch", "--devices", ",".join(map(str, range(gpus)))]
    before = [*launcher, "--log_dir", str(log.with_suffix(".ranks"))] if gpus > 1 else []
    with log.open("w", encoding="utf-8") as out:
        try:
            done = subprocess.run(
                [sys.executable, *before, *words],
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return 124
    return done.returncode


def rows(output: Path) -> list[dict[str, Any]]:
    """Return what a training run logged at each update."""
    lines = (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def differs(output: Path, like: Path) -> str:
    """Return how the losses of a run are not those of another, or an empty string."""
    known = {row["step"]: row["loss"] for row in rows(like)}
    far = max(abs(row["loss"] - known[row["step"]]) for row in rows(output))
    return f"losses differ by {far:.1e}, more than {BAND}" if far > BAND else ""


def card(name: str) -> tuple[Hardware, str]:
    """Return what the planner knows of a GPU by the name that its driver gives, and a remark."""
    for known in sorted(DEVICES, key=len, reverse=True):
        model, _, size = known.partition("-")
        if model in name and f"{size}GB" * bool(size) in name:
            return hardware(known), ""
    return hardware("H100"), f"{name} is unknown to the planner: predictions are for an H100"


def measured_row(one: Measured, words: list[str], output: Path, gpu: Hardware) -> dict[str, Any]:
    """Return what a run measured and what the planner predicts of it."""
    recipe = read_recipe([*words, "--gpus", "1"])
    found = predict(recipe.shape, recipe.layout, recipe.work, gpu)
    late = rows(output)[4:]  # the first updates take memory and choose algorithms
    middle = sorted(late, key=lambda row: float(row["tokens_per_second"]))[len(late) // 2]
    return {
        "network": one.shape,
        "tokens_per_second": middle["tokens_per_second"],
        "predicted_tokens_per_second": round(found.tokens_per_second, 1),
        "mfu": middle.get("mfu"),
        "predicted_mfu": round(utilization(found, gpu), 4),
        "peak_gb": middle["peak_memory_gb"],
        "predicted_gb": round(found.bytes_per_rank / 1e9, 3),
    }


def table(measured: Sequence[dict[str, Any]]) -> str:
    """Return measured figures and, behind each, what was predicted."""
    lines = ["network               tokens/s  predicted     MFU  predicted  peak GB  predicted"]
    for row in measured:
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            f"{row['network']:20}  {row['tokens_per_second']:8.0f}  "
            f"{row['predicted_tokens_per_second']:9.0f}  {mfu:>6}  {row['predicted_mfu']:9.1%}  "
            f"{row['peak_gb']:7.2f}  {row['predicted_gb']:9.2f}"
        )
    return "\n".join(lines)


_PREPARE = f"""
import json
import sys
from pathlib import Path
import numpy as np
from llm import runtime
runtime.prepare()
runtime.load_paddle("gpu")
import paddle
from data.corpus.token_store_writer import TokenStoreWriter
from data.tokenizer import load_tokenizer
from external_ops.fp8 import why_not
from llm.llama.build import load_model, save_model
from llm.llama.config import LlamaConfig
out = Path(sys.argv[1])
save_model(load_model({TINY_NAME!r}), out / "model")
load_tokenizer({TINY_NAME!r}).save(out / "model")
random = np.random.default_rng(1)
with TokenStoreWriter(out / "corpus", "uint16", vocab_size=1024) as writer:
    for _ in range(300):
        writer.add_document(random.integers(3, 1024, random.integers(1000, 3000)))
shape = LlamaConfig(vocab_size=1024, hidden_size=128, intermediate_size=256,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    max_position_embeddings=64)
(out / "blocks").mkdir(exist_ok=True)
(out / "blocks" / "config.json").write_text(json.dumps(shape.to_hf("float32")))
print(json.dumps([paddle.device.cuda.device_count(), paddle.device.cuda.get_device_name(),
    why_not()]))
"""


def prepare(out: Path) -> tuple[int, str, str]:
    """Write models and random documents.

    Returns:
        How many GPUs there are, their name, and why they have no float8 products by block.
    """
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-c", _PREPARE, str(out)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit("error: Paddle does not work on a GPU here; what it said is above")
    count, name, no_float8 = json.loads(done.stdout.strip().splitlines()[-1])
    return count, name, no_float8


def run_all(out: Path, gpus: int, no_float8: str, first: str) -> list[str]:
    """Run what the GPUs allow; print a line for each step, and return the names of failures.

    Args:
        out: where results go.
        gpus: how many there are.
        no_float8: why there are no float8 products by block; empty where there are.
        first: text in the name of the step to begin with; empty for all.
    """
    failed: list[str] = []
    for step in itertools.dropwhile(lambda step: first not in step.name, steps()):
        missing = f"{gpus} GPU" if step.gpus > gpus else no_float8 if step.float8 else ""
        if missing:
            print(f"{step.name:40} left out: {missing}", flush=True)
            continue
        words = [word.format(out=out) for word in step.words]
        start, log = time.monotonic(), out / f"{_slug(step.name)}.log"
        why = f"status {status}" if (status := run(words, log, step.gpus)) else ""
        if not why and step.like:
            why = differs(out / _slug(step.name), out / _slug(step.like))
        took = time.monotonic() - start
        print(f"{step.name:40} {'FAILED: ' + why if why else 'ok'} ({took:.0f} s)", flush=True)
        if why:
            failed.append(step.name)
            print("\n".join(f"    {line}" for line in log.read_text("utf-8").splitlines()[-12:]))
    return failed


def main() -> None:
    """Run everything; the status is 1 where something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_dir", default="outputs/gpu_first")
    parser.add_argument("--small", action="store_true", help="measure a small network only")
    parser.add_argument("--first", default="", help="begin with the step that has this in its name")
    options = parser.parse_args()
    out = (ROOT / options.output_dir).resolve()
    count, name, no_float8 = prepare(out)
    print(f"{count} x {name}", flush=True)
    failed = run_all(out, count, no_float8, options.first)
    gpu, remark = card(name)
    measured = []
    for one in SIZES["small" if options.small else "full"]:
        words = one.words(out)
        if run(["run_pretrain.py", *words], out / f"{_slug(one.shape)}.log", 1):
            failed.append(one.shape)
            print(f"{one.shape:40} FAILED: {out / _slug(one.shape)}.log")
            continue
        measured.append(measured_row(one, words, out / _slug(one.shape), gpu))
    print(f"\n{table(measured)}")
    if remark:
        print(remark)
    if not options.small:
        row = environment(["paddlepaddle-gpu"]) | {"gpu": name, "measured": measured}
        print(f"written to {write_row('gpu_first', row | {'failed': failed})}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
