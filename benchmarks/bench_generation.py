"""Generation with a whole model beside llama.cpp and transformers, on random weights.

    python benchmarks/bench_generation.py [--threads N ...] [--shapes 1.1B 100M] [--rounds N]

Every engine is a process; all take turns, and the machine's read bandwidth is measured in the same
turns: a step at batch 1 reads every weight once, so bandwidth over bytes bounds it. Before that,
the logits of one prompt are compared with those of transformers in float32. The models are written
to a temporary directory first.
"""

import argparse
import fnmatch
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import bounds
import generation_models as shared
from interleave import Worker, workers
from record import ROOT, environment, median, write_row

HERE = ROOT / "benchmarks"
CASES = {"prefill": shared.PROMPT} | {f"decode {b}": b * shared.STEPS for b in shared.BATCHES}
BOUNDED = "decode 1"  # by bandwidth
# This suite's form, and whose file it is measured against.
PAIRS = {"bfloat16": "bf16", "int8": "q8_0", "int4": "q4_0"}
FORMS = [f"{how} {kind}" for how in ("dygraph", "program") for kind in PAIRS]
FORMS += [f"llama.cpp {kind}" for kind in shared.GGUF]
FORMS += ["hf bfloat16", "hf float32"]
# What runs when nothing is asked for: programs of the larger model take a third more time.
USUAL = {"1.1B": ["dygraph *", "llama.cpp *", "hf *"], "100M": ["*"]}
# Largest distance of logits from those of the weights as they are, relative to their deviation. On
# random weights rounding adds up over the layers; logits that have nothing in common are 1.4 apart.
LIMITS = {"bfloat16": 0.05, "bf16": 0.05, "int8": 0.2, "q8_0": 0.1, "int4": 1.0, "q4_0": 1.0}


def command(form: str, directory: Path, peers_python: str, threads: int) -> list[str]:
    """Return the command of an engine's process."""
    how, kind = form.split()
    if how == "llama.cpp":
        words = [peers_python, HERE / "generation_llamacpp.py", directory / f"{kind}.gguf"]
    elif how == "hf":
        words = [peers_python, HERE / "generation_hf.py", directory, kind]
    else:
        words = [sys.executable, HERE / "generation_ours.py", how, kind, directory]
    return [*map(str, words), str(threads)]


def write_models(shape: str, directory: Path, peers_python: str) -> None:
    """Write the model in every format, each in a process that then frees its memory."""
    for python, kind in ((sys.executable, "hf"), (peers_python, "gguf")):
        words = [python, str(HERE / "generation_models.py"), kind, shape, str(directory)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"writing the {kind} models failed:\n{done.stderr[-2000:]}")


def check(directory: Path, peers_python: str, started: dict[str, Worker]) -> dict[str, Any]:
    """Compare logits of the prompt with those of transformers in float32.

    Raises:
        SystemExit: an engine that computes something else.
    """
    import numpy as np

    exact = "hf float32"
    if exact in started:
        started[exact].value("check")
    else:
        with workers({exact: command(exact, directory, peers_python, 2)}, 2) as alone:
            alone[exact].value("check")
    expected = np.load(directory / "hf-float32.npy")
    found = {}
    for form, worker in started.items():
        if form in ("bounds", exact):
            continue
        worker.value("check")
        logits = np.load(directory / f"{form.replace(' ', '-')}.npy")
        far = float(np.sqrt(np.mean((logits - expected) ** 2)) / expected.std())
        same = float(np.mean(logits.argmax(-1) == expected.argmax(-1)))
        found[form] = {"distance": round(far, 4), "same_first": round(same, 3)}
        if far > LIMITS[form.split()[1]]:
            raise SystemExit(f"{form} is {far:.3f} away from transformers in float32")
    return found


Speeds = dict[str, dict[str, list[float]]]


def weight_bytes(
    place: tuple[Path, str, int], chosen: list[str], started: dict[str, Worker]
) -> dict[str, int]:
    """Return what a step reads of each kind of weights; networks know it, programs do not."""
    found = {}
    for kind in PAIRS:
        form = f"dygraph {kind}"
        if form in started:
            found[kind] = started[form].value("bytes")
        elif f"program {kind}" in chosen:
            with workers({form: command(form, *place)}, place[2]) as alone:
                found[kind] = alone[form].value("bytes")
    return found


def measure(started: dict[str, Worker], rounds: int) -> tuple[Speeds, dict[str, list[float]]]:
    """Return tokens per second by form and case for every round, and the bandwidth by case."""
    found: Speeds = {f: {case: [] for case in CASES} for f in started if f != "bounds"}
    bandwidth: dict[str, list[float]] = {case: [] for case in CASES}
    # Case by case, since a worker makes a case anew when it changes.
    for case, tokens in CASES.items():
        for _ in range(rounds):
            for form, speeds in found.items():
                # The comparison of logits has warmed the prompt up, which takes longest.
                calls = 1 if case == "prefill" else None
                speeds[case].append(tokens / started[form].seconds(case, calls))
            bandwidth[case].append(started["bounds"].value("read"))
    return found, bandwidth


def ratios(speeds: Speeds) -> dict[str, dict[str, float]]:
    """Return this suite's speeds as multiples of llama.cpp's in the same turns."""
    found: dict[str, dict[str, float]] = {}
    for form, cases in speeds.items():
        peer = speeds.get(f"llama.cpp {PAIRS.get(form.split()[1])}")
        if peer is not None and not form.startswith("hf"):
            found[form] = {
                case: round(median([a / b for a, b in zip(mine, peer[case], strict=True)]), 3)
                for case, mine in cases.items()
            }
    return found


def shares(
    speeds: Speeds, bandwidths: dict[str, list[float]], read: dict[str, int]
) -> dict[str, float]:
    """Return this suite's speeds at batch 1 as shares of what the bandwidth of the turn allows."""
    found = {}
    for form, cases in speeds.items():
        how, kind = form.split()
        if how in ("dygraph", "program"):
            turns = zip(cases[BOUNDED], bandwidths[BOUNDED], strict=True)
            found[form] = round(median([speed * read[kind] / limit for speed, limit in turns]), 3)
    return found


def compare(
    shape: str, threads: int, directory: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure one model with one number of threads; return the row."""
    patterns = options.forms or USUAL[shape]
    chosen = [f for f in FORMS if any(fnmatch.fnmatch(f, p) for p in patterns)]
    place = (directory, options.peers_python, threads)
    commands = {form: command(form, *place) for form in chosen}
    commands["bounds"] = bounds.command(threads)
    with workers(commands, threads) as started:
        logits = check(directory, options.peers_python, started)
        speeds, bandwidths = measure(started, options.rounds)
        read = weight_bytes(place, chosen, started)
    middle = {
        form: {case: round(median(values), 2) for case, values in cases.items()}
        for form, cases in speeds.items()
    }
    return {
        "shape": shape,
        "threads": threads,
        "rounds": options.rounds,
        "read_gb_per_s": round(median(bandwidths[BOUNDED]) / 1e9, 2),
        "tokens_per_second": middle,
        "times_llama.cpp": ratios(speeds),
        "weight_bytes": read,
        "share_of_bound": shares(speeds, bandwidths, read),
        "logits": logits,
    }


def show(row: dict[str, Any]) -> None:
    """Print a row as a table."""
    print(f"\n{row['shape']}, {row['threads']} threads, {row['read_gb_per_s']} GB/s; tokens/s")
    print(f"| | {' | '.join(CASES)} | times llama.cpp | of the bound | logits off |")
    print("|---" * (len(CASES) + 4) + "|")
    for form, speeds in row["tokens_per_second"].items():
        cells = [f"{speed:.1f}" for speed in speeds.values()]
        cells.append(", ".join(f"{r:.2f}" for r in row["times_llama.cpp"].get(form, {}).values()))
        share = row["share_of_bound"].get(form)
        cells.append("" if share is None else f"{100 * share:.0f} %")
        cells.append(str(row["logits"].get(form, {}).get("distance", "")))
        print(f"| {form} | {' | '.join(cells)} |")
    sys.stdout.flush()


def main() -> None:
    """Write models, measure, print tables, append rows to the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--peers_python", default=".venv-peers/bin/python")
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--shapes", nargs="+", choices=shared.SHAPES, default=list(shared.SHAPES))
    parser.add_argument("--rounds", type=int, default=3, help="turns; the median counts")
    parser.add_argument("--forms", nargs="+", metavar="PATTERN")
    parser.add_argument("--scratch", help="where models go; 12 GB for the larger")
    parser.add_argument("--models", help="keep models in this directory, and use what is there")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    if options.scratch:
        Path(options.scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        for shape in options.shapes:
            directory = Path(options.models or name) / shape
            if not (directory / f"{shared.GGUF[-1]}.gguf").exists():
                write_models(shape, directory, options.peers_python)
            for threads in options.threads:
                row = compare(shape, threads, directory, options)
                show(row)
                write_row("generation", row | {"load_before": round(load, 2)} | environment())


if __name__ == "__main__":
    main()
