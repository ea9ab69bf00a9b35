"""Generation with a whole model beside llama.cpp, OpenVINO GenAI, vLLM and transformers.

    python benchmarks/bench_generation.py [--shapes 1.1B 1.1B/4 100M] [--kinds bfloat16 int8 int4]
        [--cells 'prompt *' 'decode 8'] [--forms dygraph] [--peers vLLM] [--rounds N] [--threads N]

Random weights, the same for all. Every engine is a process; those of one kind of weights take turns
cell by cell, and the machine's read bandwidth is measured in the same turns: a step at one sequence
reads every weight once, so bandwidth over bytes bounds it. Before that, what each says of a prompt
is compared with transformers in float32. A row is printed and stored for each cell, so that Ctrl-C
keeps those that are done. Peers that are not installed, or do not start here, are named and left
out. Models are written to a temporary directory, or to --models, where they stay.
"""

import argparse
import fnmatch
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bounds
import generation_models as shared
import generation_peers as peers
from generation_peers import HERE, KINDS, PEERS
from interleave import Worker, workers
from record import environment, median, write_row

OWN = ("dygraph", "mapped", "program")
BOUNDED = "decode 1"  # by bandwidth
# Largest distance of logits from those of the weights as they are, relative to their deviation. On
# random weights rounding adds up over the layers; logits that have nothing in common are 1.4 apart.
LIMITS = {"bfloat16": 0.05, "int8": 0.2, "int4": 1.0}
REFERENCE = "hf-float32.npy"


def commands(directory: Path, kind: str, threads: int, options: argparse.Namespace) -> Any:
    """Return the commands of all engines that compute with one kind of weights."""
    own = [str(HERE / "generation_ours.py")]
    found = {
        form: [sys.executable, *own, form, kind, str(directory), str(threads)]
        for form in options.forms
    }
    step = str(max(shared.PROMPTS) + 64)  # prompts are not cut
    for name in options.peers:
        found[name] = PEERS[name].command(directory, kind, threads, step, "off")
    if kind == "bfloat16" and options.transformers:
        found["transformers"] = hf_command(directory, "bfloat16", threads)
    return found


def hf_command(directory: Path, dtype: str, threads: int) -> list[str]:
    """Return the command of transformers."""
    python = PEERS["llama.cpp"].python
    return [python, str(HERE / "generation_hf.py"), str(directory), dtype, str(threads)]


def reference(directory: Path) -> Any:
    """Return transformers' logits in float32 and the tokens that follow, computed once."""
    import numpy as np

    file = directory / REFERENCE
    if not file.exists():
        with workers({"transformers": hf_command(directory, "float32", 2)}, 2) as alone:
            alone["transformers"].value("check")
    return np.load(file)


def distance(found: Any, expected: Any) -> float:
    """Return how far logits, or the tokens' log-probabilities, are from the expected logits."""
    import numpy as np

    deviation = expected.std()
    if found.ndim == 1:
        high = expected.max(-1, keepdims=True)
        logs = expected - high - np.log(np.exp(expected - high).sum(-1, keepdims=True))
        first = shared.PROMPT - shared.CHECKED + 1
        ids = shared.prompt(expected.shape[-1])[first : shared.PROMPT]
        found, expected = found[1:], logs[np.arange(len(ids)), ids]
    return float(np.sqrt(np.mean((found - expected) ** 2)) / deviation)


def check(directory: Path, kind: str, started: dict[str, Worker]) -> dict[str, float]:
    """Compare what engines say of the prompt with transformers in float32.

    Raises:
        SystemExit: an engine that computes something else.
    """
    import numpy as np

    expected, found = reference(directory), {}
    for form, worker in started.items():
        worker.value("check")
        name = f"hf-{kind}" if form == "transformers" else f"{form}-{kind}"
        far = distance(np.load(directory / f"{name}.npy"), expected)
        found[form] = round(far, 4)
        if not far <= LIMITS[kind]:
            raise SystemExit(f"{form} {kind} is {far:.3f} away from transformers in float32")
    return found


def turns(
    cell: str, started: dict[str, Worker], bound: Worker, rounds: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Return tokens per second by form, and the bandwidth, for every turn but the first."""
    speeds: dict[str, list[float]] = {form: [] for form in started}
    bandwidth = []
    for _ in range(rounds + 1):
        for form, worker in started.items():
            speeds[form].append(shared.CELLS[cell] / worker.seconds(cell, 1))
        bandwidth.append(bound.value("read"))
    return {form: values[1:] for form, values in speeds.items()}, bandwidth[1:]


def times(mine: list[float], other: list[float]) -> float:
    """Return how often faster in the same turns, the median."""
    return round(median([a / b for a, b in zip(mine, other, strict=True)]), 3)


def row_of(speeds: dict[str, list[float]], bandwidth: list[float], read: int) -> dict[str, Any]:
    """Return a cell's figures.

    Args:
        speeds: tokens per second by form and turn.
        bandwidth: of the same turns.
        read: bytes that a step reads; 0 where it is not bounded by them.
    """
    row: dict[str, Any] = {
        "tokens_per_second": {form: round(median(of), 2) for form, of in speeds.items()},
        "range": {form: [round(min(of), 2), round(max(of), 2)] for form, of in speeds.items()},
        "read_gb_per_s": round(median(bandwidth) / 1e9, 2),
    }
    own = [form for form in speeds if form in OWN]
    for form in own:
        beside = {peer: times(speeds[form], of) for peer, of in speeds.items() if peer in PEERS}
        if beside:
            best = min(beside, key=lambda peer: beside[peer])
            row.setdefault("times_peers", {})[form] = beside
            row.setdefault("times_best", {})[form] = [best, beside[best]]
        if form != own[0]:
            row.setdefault(f"times_{own[0]}", {})[form] = times(speeds[form], speeds[own[0]])
        if read:
            shares = [s * read / limit for s, limit in zip(speeds[form], bandwidth, strict=True)]
            row.setdefault("share_of_bound", {})[form] = round(median(shares), 3)
    return row


def show(kind: str, cell: str, row: dict[str, Any]) -> None:
    """Print a cell."""
    speeds = ", ".join(f"{form} {speed:.1f}" for form, speed in row["tokens_per_second"].items())
    words = [f"{kind:8} {cell:11} {speeds}"]
    for form, (best, ratio) in row.get("times_best", {}).items():
        words.append(f"{form} is {ratio:.2f} × {best}")
    for name in OWN:
        words += [f"{f} is {r:.2f} × {name}" for f, r in row.get(f"times_{name}", {}).items()]
    words += [f"{f} {100 * s:.0f} % of bound" for f, s in row.get("share_of_bound", {}).items()]
    print("; ".join(words), flush=True)


def measure(shape: str, kind: str, threads: int, directory: Path, options: Any) -> None:
    """Measure the cells of one kind of weights; print and store a row for each."""
    stack = ExitStack()
    with stack:
        started = {}
        for form, command in commands(directory, kind, threads, options).items():
            log = directory / f"{form}-{kind}.log"
            worker = peers.start(f"{form} {kind}", command, threads, log)
            if worker is not None:
                started[form] = stack.enter_context(worker)
        bound = stack.enter_context(Worker("bounds", bounds.command(threads), {}))
        logits = check(directory, kind, started)
        print(f"{kind:8} logits off: {logits}", flush=True)
        weights = started["dygraph"].value("bytes") if "dygraph" in started else 0
        for cell in options.cells:
            load = round(os.getloadavg()[0], 2)
            speeds, bandwidth = turns(cell, started, bound, options.rounds)
            row = row_of(speeds, bandwidth, weights if cell == BOUNDED else 0)
            show(kind, cell, row)
            about = {"shape": shape, "kind": kind, "cell": cell, "threads": threads}
            about |= {"rounds": options.rounds, "load": load, "load_before": options.load}
            row |= {"logits_off": logits, "weight_bytes": weights, "peers": options.versions}
            write_row("generation", about | row | environment())


def parse() -> argparse.Namespace:
    """Return the options; patterns are names, peers are those that are there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--shapes", nargs="+", default=["1.1B"], help="NAME, or NAME/LAYERS")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--cells", nargs="+", metavar="PATTERN", default=["*"])
    parser.add_argument(
        "--forms", nargs="+", choices=OWN, default=["dygraph"], help="of this suite"
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--transformers", action="store_true", help="in bfloat16, too")
    parser.add_argument("--rounds", type=int, default=3, help="turns; the median counts")
    parser.add_argument("--models", help="keep models in this directory, and use what is there")
    parser.add_argument("--prepare", action="store_true", help="write models and end")
    options = parser.parse_args()
    if options.prepare and options.models is None:
        parser.error("--prepare needs --models, where the models stay")
    options.load = round(os.getloadavg()[0], 2)
    cells = [c for c in shared.CELLS if any(fnmatch.fnmatch(c, p) for p in options.cells)]
    if not cells:
        parser.error(f"no cell matches {options.cells}; there are {', '.join(shared.CELLS)}")
    if not 1 <= options.rounds < shared.TURNS:
        parser.error(f"--rounds {options.rounds} is not between 1 and {shared.TURNS - 1}")
    for shape in options.shapes:
        try:
            shared.sizes_of(shape)
        except ValueError as error:
            parser.error(str(error))
    options.cells = cells
    options.versions = peers.installed(options.peers)
    options.peers = list(options.versions)
    return options


def main() -> None:
    """Write models, measure, print and store rows."""
    options = parse()
    with tempfile.TemporaryDirectory() as name:
        for shape in options.shapes:
            directory = Path(options.models or name) / shape.replace("/", "-")
            peers.write_models(shape, directory, options.kinds, options.peers)
            if options.prepare:
                reference(directory)
                continue
            for threads in options.threads:
                print(f"\n{shape}, {threads} threads, tokens per second", flush=True)
                for kind in options.kinds:
                    measure(shape, kind, threads, directory, options)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped; the rows of finished cells are kept") from None
