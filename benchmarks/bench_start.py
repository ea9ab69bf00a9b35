"""Seconds to the first token, memory and file sizes of a model of 1.2 billion weights.

    python benchmarks/bench_start.py [--rounds N] [--shape NAME] [--models DIRECTORY]

A random checkpoint in bfloat16 is written with the tokenizer of this suite's random model, and
quantized by ``quantize_generation.py``. Each form is then started as a user would, in a process of
its own: once without kept weights, which packs them, then with them. All files are in the system's
cache by then. Peak memory is the process's, pages of mapped files included.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import ROOT, environment, median, write_row

PROMPT = "The sky is"
# What each form is called, how it is quantized, and in which type it is opened.
FORMS = {
    "bfloat16": (None, "bfloat16"),
    "int8": ("A8W8", "float32"),
    "int4": ("A8W4", "float32"),
}


def write_model(shape: str, place: Path) -> None:
    """Write a random checkpoint; a process of its own frees the memory."""
    sys.path.insert(0, str(ROOT))
    import numpy as np

    from llm.llama.config import PRESETS
    from llm.llama.files.checkpoint import SINGLE_NAME
    from llm.llama.files.rank_layout import tensor_shapes
    from llm.llama.files.safetensors import write_file

    config = PRESETS[shape]
    shapes, random = tensor_shapes(config), np.random.default_rng(0)

    def draw(name: str) -> Any:
        if "norm" in name:
            return np.full(shapes[name], 0x3F80, np.uint16)  # 1
        wide = random.standard_normal(shapes[name], np.float32) * np.float32(0.02)
        return ((wide.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)

    place.mkdir(parents=True)
    write_file(place / SINGLE_NAME, shapes, "BF16", draw)
    (place / "config.json").write_text(json.dumps(config.to_hf("bfloat16")), encoding="utf-8")
    for file in (ROOT / "data" / "assets" / "tiny-random-llama").iterdir():
        shutil.copy(file, place)


def run(words: list[str | Path]) -> tuple[float, int]:
    """Start a program; return seconds until it writes its first byte, and its peak memory.

    Raises:
        SystemExit: it failed.
    """
    begin = time.perf_counter()
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=said) as process,
    ):
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - begin
        process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{words[1]} failed:\n{said.read().decode()[-2000:]}")
    return seconds, used.ru_maxrss * 1024


def import_paddle() -> tuple[float, int]:
    """Start a process that imports Paddle and does nothing else: what no model can go below."""
    return run([sys.executable, "-c", "import paddle; print()"])


def step(name: str, *flags: str | Path) -> tuple[float, int]:
    """Run one of the suite's scripts."""
    return run([sys.executable, ROOT / name, *flags])


def size(*patterns: Path) -> int:
    """Return the bytes of all files that match."""
    files = [file for one in patterns for file in one.parent.glob(one.name)]
    return sum(file.stat().st_size for file in files)


def make(shape: str, directory: Path) -> None:
    """Write the checkpoint and what is made of it, as far as it is not there yet."""
    source = directory / "bfloat16"
    if not source.exists():
        run([sys.executable, __file__, "--write", source, "--shape", shape])
    for form, (kind, dtype) in FORMS.items():
        place = directory / form
        if not place.exists():
            words = [
                "--model_name_or_path",
                source,
                "--output_dir",
                place,
                "--quant_type",
                str(kind),
            ]
            step("quantize_generation.py", *words, "--method", "rtn")
        if not (directory / f"{form}-program").exists():
            output = directory / f"{form}-program" / "llama"
            words = ["--model_path", place, "--output_path", output, "--dtype", dtype]
            step("export_generation_model.py", *words, "--check", "false", "--packed_cache", "off")


def measure(directory: Path, form: str, rounds: int) -> dict[str, Any]:
    """Start one form over and over; return the row's part of it."""
    place, program = directory / form, directory / f"{form}-program"
    asked = ["--prompt", PROMPT, "--max_length", "1"]
    predict = ["--model_name_or_path", place, "--dtype", FORMS[form][1], *asked]
    for file in place.glob("*.packed"):
        file.unlink()
    first = step("predict_generation.py", *predict)
    again = [step("predict_generation.py", *predict) for _ in range(rounds)]
    infer = [step("infer_generation.py", "--model_dir", program, *asked) for _ in range(rounds)]
    weights, kept = size(place / "*.safetensors"), size(place / "*.packed")
    found = {"first start": [first], "predict": again, "infer": infer}
    return {
        "file_gb": round(weights / 1e9, 3),
        "kept_gb": round(kept / 1e9, 3),
        "program_gb": round(size(program / "*.pdiparams", program / "*.packed") / 1e9, 3),
        "seconds": {name: round(median([s for s, _ in of]), 2) for name, of in found.items()},
        "peak_gb": {name: round(max(m for _, m in of) / 1e9, 2) for name, of in found.items()},
    }


def show(row: dict[str, Any]) -> None:
    """Print a row as a table."""
    print(f"\n{row['shape']}: seconds to the first token (peak memory in GB), load {row['load']}")
    print("| | weights GB | kept GB | program GB | first start | predict | infer |")
    print("|---" * 7 + "|")
    for form, one in row["forms"].items():
        cells = [f"{s} ({one['peak_gb'][name]})" for name, s in one["seconds"].items()]
        sizes = [str(one[name]) for name in ("file_gb", "kept_gb", "program_gb")]
        print(f"| {form} | {' | '.join([*sizes, *cells])} |")
    paddle = row["import_paddle"]
    print(f"import paddle alone: {paddle['seconds']} s, {paddle['peak_gb']} GB")


def main() -> None:
    """Write models, start them, print a table, append a row to the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--shape", default="llama-3.2-1b", help="a preset of llm.llama.config")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=3, help="starts; the median counts")
    parser.add_argument("--models", help="keep models in this directory, and use what is there")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_model(options.shape, Path(options.write))
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(options.models or name)
        make(options.shape, directory)
        load = round(os.getloadavg()[0], 2)
        forms = {form: measure(directory, form, options.rounds) for form in options.forms}
        alone = [import_paddle() for _ in range(options.rounds)]
    paddle = {
        "seconds": round(median([seconds for seconds, _ in alone]), 2),
        "peak_gb": round(max(memory for _, memory in alone) / 1e9, 2),
    }
    row = {"shape": options.shape, "rounds": options.rounds, "load": load, "forms": forms}
    row["import_paddle"] = paddle
    show(row)
    write_row("start", row | environment())


if __name__ == "__main__":
    main()
