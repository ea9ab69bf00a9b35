"""The native ops on CPU beside PyTorch's, and beside what the machine can do at most.

    python benchmarks/bench_ops.py [--threads N] [--cases PATTERN ...] [--rounds N]

One process computes with this suite's kernels, one for each type with PyTorch; they take turns case
by case, and the machine's bandwidths and multiplications are measured in the same turns. Medians.
Peak memory is measured in processes of their own.
"""

import argparse
import fnmatch
import os
import sys
from typing import Any

import bounds
from interleave import Worker, workers
from ops_cases import CASES, Case
from record import ROOT, environment, median, write_row

HERE = ROOT / "benchmarks"
# Lengths whose peaks tell memory that grows with the rows from memory that grows with their square.
_PEAKS = ("attention forward S=4096 D=64", "attention forward S=8192 D=64")
_PEAKS += ("attention backward S=4096 D=64", "attention backward S=8192 D=64")


def commands(peers_python: str, threads: int) -> dict[str, list[str]]:
    """Return the command of every worker."""
    found = {"ours": [sys.executable, str(HERE / "ops_ours.py"), str(threads)]}
    for dtype in ("float32", "bfloat16"):
        found[dtype] = [peers_python, str(HERE / "ops_torch.py"), str(threads), dtype]
    return found


def measure(name: str, case: Case, started: dict[str, Worker], rounds: int) -> dict[str, Any]:
    """Return medians of one case: seconds by form, ratio to the best peer, share of the bound."""
    forms = ("ours", *case.peers)
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    limits = []
    for _ in range(rounds):
        for form in forms:
            seconds[form].append(started[form].seconds(name))
        limits.append(started["bounds"].value(case.bound))
    middle = {form: median(values) for form, values in seconds.items()}
    limit = median(limits)
    row: dict[str, Any] = {form: round(1e3 * value, 4) for form, value in middle.items()}
    for peer in case.peers:
        ratios = [p / o for o, p in zip(seconds["ours"], seconds[peer], strict=True)]
        row[f"times_{peer}"] = round(median(ratios), 3)
    row["bound"] = {case.bound: round(limit / 1e9, 1)}
    row["share_of_bound"] = round(case.work / middle["ours"] / limit, 3)
    return row


def peaks(peers_python: str, threads: int) -> dict[str, dict[str, float]]:
    """Return megabytes that attention takes beside its inputs, each in a process of its own."""
    found: dict[str, dict[str, float]] = {}
    for name in _PEAKS:
        found[name] = {}
        for form, command in commands(peers_python, threads).items():
            if form != "bfloat16":
                with workers({form: command}, threads) as started:
                    found[name][form] = round(started[form].peak(name) / 1e6, 1)
    return found


def main() -> None:
    """Measure, print a table, append a row to the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--peers_python", default=".venv-peers/bin/python")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5, help="turns; the median counts")
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN")
    options = parser.parse_args()
    chosen = [n for n in CASES if any(fnmatch.fnmatch(n, p) for p in options.cases)]
    if not chosen:
        parser.error(f"no case matches {options.cases}; there are {', '.join(CASES)}")
    load = os.getloadavg()[0]
    started_as = commands(options.peers_python, options.threads)
    started_as["bounds"] = bounds.command(options.threads)
    rows: dict[str, Any] = {}
    print("| case | ours, ms | torch float32 | torch bfloat16 | times the faster | of the bound |")
    print("|---|---|---|---|---|---|")
    with workers(started_as, options.threads) as started:
        for name in chosen:
            case = CASES[name]
            row = rows[name] = measure(name, case, started, options.rounds)
            cells = [f"{row[f]:.3g}" if f in row else "" for f in ("ours", "float32", "bfloat16")]
            cells.append(f"{min(row[f'times_{peer}'] for peer in case.peers):.2f}")
            cells.append(f"{100 * row['share_of_bound']:.0f} % {case.bound}")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    memory = peaks(options.peers_python, options.threads) if set(_PEAKS) <= set(chosen) else {}
    for name, sizes in memory.items():
        print(f"peak of {name}: {sizes['ours']} MB, torch {sizes['float32']} MB")
    row = {
        "threads": options.threads,
        "rounds": options.rounds,
        "load_before": round(load, 2),
        "milliseconds": rows,
        "peak_megabytes": memory,
        **environment(),
    }
    print(f"written to {write_row('ops', row).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
