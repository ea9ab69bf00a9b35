"""Decoder steps on one thread and on all, on an otherwise idle machine and beside busy processes.

    python benchmarks/bench_threads.py [--threads N] [--neighbours N] [--rounds N]

Three processes take turns: one thread; as many threads as the work repays and other processes leave
cores for, which is how the suite runs; and as many as the work repays, whoever else is there
(LLAMA_OPS_THREADS=fixed). A busy process is a loop that never waits. Medians of turns.
"""

import argparse
import fnmatch
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from interleave import Worker
from ops_cases import STEPS
from record import ROOT, environment, median, write_row

# Turns so long that they span several looks at the cores (csrc/cpu/threads.cc).
_TURN_S = 0.6
_LOOP = "while True: pass"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Run busy loops meanwhile."""
    started = [subprocess.Popen([sys.executable, "-S", "-c", _LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for one in started:
            one.kill()
            one.wait()


def start(threads: int) -> dict[str, Worker]:
    """Start a process for each way to choose threads."""
    script = str(ROOT / "benchmarks" / "ops_ours.py")
    forms = {"one": (1, "measured"), "measured": (threads, "measured"), "fixed": (threads, "fixed")}
    return {
        name: Worker(
            name,
            [sys.executable, script, str(count)],
            {"OMP_NUM_THREADS": str(count), "LLAMA_OPS_THREADS": policy},
        )
        for name, (count, policy) in forms.items()
    }


def measure(name: str, started: dict[str, Worker], rounds: int) -> dict[str, float]:
    """Return milliseconds by form, and how often faster than one thread, turn by turn."""
    once = {form: worker.seconds(name, 3) for form, worker in started.items()}
    seconds: dict[str, list[float]] = {form: [] for form in started}
    for _ in range(rounds):
        for form, worker in started.items():
            calls = max(1, round(_TURN_S / once[form]))
            seconds[form].append(worker.seconds(name, calls))
    row = {form: round(1e3 * median(values), 4) for form, values in seconds.items()}
    for form in ("measured", "fixed"):
        pairs = zip(seconds["one"], seconds[form], strict=True)
        row[f"times_{form}"] = round(median([one / other for one, other in pairs]), 3)
    return row


def main() -> None:
    """Measure, print a table, append a row to the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1], help="busy loops")
    parser.add_argument("--rounds", type=int, default=5, help="turns; the median counts")
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN")
    options = parser.parse_args()
    chosen = [name for name in STEPS if any(fnmatch.fnmatch(name, p) for p in options.cases)]
    if not chosen:
        parser.error(f"no case matches {options.cases}; there are {', '.join(STEPS)}")
    load = os.getloadavg()[0]
    rows: dict[str, dict[str, Any]] = {}
    print(f"| step | neighbours | one thread, ms | {options.threads} threads | fixed |")
    print("|---|---|---|---|---|")
    started = start(options.threads)
    try:
        for name in chosen:
            for count in options.neighbours:
                with busy(count):
                    row = measure(name, started, options.rounds)
                rows.setdefault(name, {})[str(count)] = row
                shown = [f"{row[f]:.3g} ({row[f'times_{f}']:.2f}×)" for f in ("measured", "fixed")]
                print(f"| {name} | {count} | {row['one']:.3g} | {' | '.join(shown)} |", flush=True)
    finally:
        for worker in started.values():
            worker.close()
    row = {"threads": options.threads, "rounds": options.rounds, "load_before": round(load, 2)}
    row |= {"milliseconds": rows, **environment()}
    print(f"written to {write_row('threads', row).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
