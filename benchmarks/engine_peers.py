"""Loads of many requests on this suite's engine and on its peers': a part of bench_engine.py.

Engines of one kind of weights take turns load by load; every turn draws other tokens. A row is
printed and stored for each load, so that Ctrl-C keeps those that are done.
"""

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import generation_peers as peers
from generation_peers import HERE, PEERS
from interleave import Worker
from record import environment, median, write_row

OURS, WITHOUT = "engine", "engine-off"  # with its prefix cache, and without
# By load: the figure that is compared, and whether less of it is better.
COMPARED = {
    "prefix, 8 at a time": ("seconds", True),
    "prefix, together": ("seconds", True),
    "pauses, 24": ("worst_pause", True),
}


def commands(directory: Path, kind: str, options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the commands of all engines."""
    step, threads = str(options.step_tokens), options.threads
    own = [sys.executable, str(HERE / "generation_ours.py")]
    forms = [OURS]
    if any(load.startswith("prefix") for load in options.loads):
        forms.append(WITHOUT)
    found = {form: [*own, form, kind, str(directory), str(threads), step] for form in forms}
    for name in options.peers:
        found[name] = PEERS[name].command(directory, kind, threads, step, "on")
    return found


def turns(load: str, started: dict[str, Worker], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Return figures by engine and turn."""
    found: dict[str, list[dict[str, float]]] = {form: [] for form in started}
    for number in range(rounds):
        for form, worker in started.items():
            if form != WITHOUT or load.startswith("prefix"):
                found[form].append(worker.value(f"{load} {number + 1}"))
    return {form: values for form, values in found.items() if values}


def row_of(load: str, found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return a load's figures: medians, and how often better this suite is in the same turns."""
    name, less = COMPARED.get(load, ("tokens_per_second", False))
    row: dict[str, Any] = {
        "figures": {
            form: {key: round(median([one[key] for one in of]), 3) for key in of[0]}
            for form, of in found.items()
        },
        "compared": name,
        "times": {},
    }
    for form, values in found.items():
        if form != OURS:
            pairs = [(a[name], b[name]) for a, b in zip(found[OURS], values, strict=True)]
            row["times"][form] = round(median([b / a if less else a / b for a, b in pairs]), 3)
    among = {form: ratio for form, ratio in row["times"].items() if form in PEERS}
    if among:
        best = min(among, key=lambda form: among[form])
        row["times_best"] = [best, among[best]]
    return row


def show(kind: str, load: str, row: dict[str, Any]) -> None:
    """Print a load."""
    for form, figures in row["figures"].items():
        said = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
        times = row["times"].get(form)
        beside = "" if times is None else f"; {OURS} is {times:.2f} × in {row['compared']}"
        print(f"{kind:8} {load:20} {form:10} {said}{beside}", flush=True)


def measure(shape: str, kind: str, directory: Path, options: argparse.Namespace) -> None:
    """Run the loads with one kind of weights; print and store a row for each."""
    with ExitStack() as stack:
        started = {}
        for form, command in commands(directory, kind, options).items():
            log = directory / f"{form}-{kind}.log"
            worker = peers.start(f"{form} {kind}", command, options.threads, log)
            if worker is not None:
                started[form] = stack.enter_context(worker)
                worker.seconds("prompt 512", 1)  # warms up
        for load in options.loads:
            now = round(os.getloadavg()[0], 2)
            row = row_of(load, turns(load, started, options.rounds))
            show(kind, load, row)
            about = {"shape": shape, "kind": kind, "load_of": load, "threads": options.threads}
            about |= {"rounds": options.rounds, "step_tokens": options.step_tokens, "load": now}
            write_row("engine_peers", about | row | {"peers": options.versions} | environment())


def main(options: argparse.Namespace) -> None:
    """Write models where they are not there yet, and run the loads."""
    options.versions = peers.installed(options.peers)
    options.peers = list(options.versions)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(options.models or name) / options.shape.replace("/", "-")
        peers.write_models(options.shape, directory, options.kinds, options.peers)
        for kind in options.kinds:
            measure(options.shape, kind, directory, options)
