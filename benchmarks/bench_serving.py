"""Servers under load over HTTP: this suite's beside vLLM's, and beside its own engine.

    python benchmarks/bench_serving.py [--parts PART ...] [--rounds N]
    python benchmarks/bench_serving.py --url http://HOST:PORT (--clients N ... | --rates R ...)

With --url any server of OpenAI's completions is driven. Without it, servers are started on the same
random weights and take turns; figures are medians, every turn draws other prompts.

start       seconds from the command to /health, on the demo's export (`make demo`)
clients     8 and 24 clients; the same requests from Python, on the engine alone; CPU time outside
            of the engine's process
latency     seconds to the first token: one client, and Poisson arrivals at half of the requests a
            second that 24 clients got
prefix      16 clients whose prompts share 1,000 tokens
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import generation_models as shared
import generation_peers as peers
import serving_load as loads
from interleave import Worker
from record import ROOT, environment, median, write_row
from serving_servers import OURS, Server, Sizes, model_of

ENGINE = "engine"
PARTS = ("start", "clients", "latency", "prefix")
TOKENIZER = ROOT / "data" / "assets" / "tiny-random-llama"
PROMPT, NEW = (64, 256), 64
SHARED = 1000
LENGTH = 2048
CLIENTS = (8, 24)
SIDES = (OURS, "vLLM")

Figures = dict[str, float]


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2, help="of each client in a turn")
    parser.add_argument("--slo_ttft", type=float, default=2.0, help="goodput: seconds to the first")
    parser.add_argument("--slo_per_token", type=float, default=0.2, help="and for each behind it")
    parser.add_argument("--new_tokens", type=int, default=NEW)
    here = parser.add_argument_group("servers that are started")
    here.add_argument("--parts", nargs="+", choices=PARTS)
    here.add_argument("--shape", help="NAME, or NAME/LAYERS; 1.1B/2 when not given")
    here.add_argument("--kind", choices=("bfloat16", "int8"), help="bfloat16 when not given")
    here.add_argument("--peers", nargs="*", choices=SIDES[1:], help="all when not given")
    here.add_argument("--models", help="keep models in this directory, and use what is there")
    here.add_argument("--threads", type=int, help="all cores when not given")
    there = parser.add_argument_group("a server that runs")
    there.add_argument("--url", help="its address, without /v1")
    there.add_argument("--clients", type=int, nargs="+", help="one load for each number")
    there.add_argument("--rates", type=float, nargs="+", help="one for each, in requests a second")
    there.add_argument("--shared", type=int, help="words that all prompts begin with")
    args = parser.parse_args()
    if min(args.rounds, args.requests, args.new_tokens) < 1:
        parser.error("--rounds, --requests and --new_tokens have to be at least 1")
    own = ("parts", "shape", "kind", "peers", "models", "threads")
    foreign = ("clients", "rates", "shared")
    idle = [name for name in (own if args.url else foreign) if getattr(args, name) is not None]
    if idle:
        parser.error(f"--{idle[0]} has no effect {'beside' if args.url else 'without'} --url")
    if args.url and not (args.clients or args.rates):
        parser.error("--url needs --clients or --rates")
    if min([*(args.clients or [1]), *(args.rates or [1])]) <= 0:
        parser.error("--clients and --rates have to be above 0")
    return args


def show(name: str, figures: Figures) -> None:
    """Print a line of figures."""
    said = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
    print(f"{name:32} {said}", flush=True)


def over(values: Sequence[Figures]) -> Figures:
    """Return medians."""
    return {key: round(median([one[key] for one in values]), 4) for key in values[0]}


class Bench:
    """Servers on the same weights, and the engine; turns of loads on them."""

    def __init__(self, args: argparse.Namespace, directory: Path, stack: ExitStack) -> None:
        self.args, self._turn = args, 0
        self.threads = args.threads or len(os.sched_getaffinity(0))
        sizes = Sizes(self.threads, max(CLIENTS), LENGTH)
        self.vocabulary = shared.sizes_of(args.shape)["vocab_size"]
        self.servers: dict[str, Server] = {}
        for name in (OURS, *args.peers):
            file = peers.PEERS[name].files[args.kind] if name in peers.PEERS else _ours(args.kind)
            log = directory / f"{name}-server.log"
            place = _served(directory / file, self.vocabulary)
            try:
                one = stack.enter_context(Server(name, place, sizes, log))
            except SystemExit as error:
                if name == OURS:
                    raise
                print(f"{name} is left out: {error}", flush=True)
                continue
            self.servers[name] = one
            show(f"ready: {name}", {"seconds": one.ready_seconds})
        words = [sys.executable, ROOT / "benchmarks/serving_engine.py"]
        words += [
            _served(directory / _ours(args.kind), self.vocabulary),
            self.threads,
            max(CLIENTS),
            LENGTH,
            512,
        ]
        own = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        command = [str(word) for word in words]
        self.engine = stack.enter_context(Worker(ENGINE, command, own, directory / "engine.log"))

    def bodies(self, count: int, **more: Any) -> list[dict[str, Any]]:
        """Return requests that no turn had before."""
        self._turn += 1
        return loads.requests_of(
            count,
            more.pop("prompt", PROMPT),
            self.args.new_tokens,
            vocabulary=self.vocabulary,
            seed=self._turn,
            **more,
        )

    def drive(self, name: str, load: loads.Load) -> Figures:
        """Send a load to a server; return its figures, with CPU time a token."""
        server = self.servers[name]
        model = server.model
        named = [{**body, "model": model} for body in load.requests]
        own, below = server.cpu_seconds()
        records, seconds = loads.drive(
            server.url, loads.Load(named, load.clients, load.rate, load.seed)
        )
        found = loads.figures(records, seconds, self.args.slo_ttft, self.args.slo_per_token)
        after = server.cpu_seconds()
        tokens = sum(one.tokens for one in records)
        found["cpu_ms_per_token"] = round(1000 * (sum(after) - own - below) / tokens, 4)
        found["children_cpu_ms_per_token"] = round(1000 * (after[1] - below) / tokens, 4)
        return found

    def alone(self, bodies: Sequence[dict[str, Any]], clients: int) -> Figures:
        """Answer the requests on the engine, without a server."""
        case = json.dumps([[one["prompt"] for one in bodies], clients, self.args.new_tokens])
        found = self.engine.value(case)
        return {"tokens_per_second": round(found["tokens"] / found["seconds"], 4)}

    def rounds(self, load_of: Callable[[], loads.Load], engine: bool = False) -> dict[str, Figures]:
        """Let all take turns with one load; return medians by name."""
        found: dict[str, list[Figures]] = {}
        for _ in range(self.args.rounds):
            load = load_of()
            for name in self.servers:
                found.setdefault(name, []).append(self.drive(name, load))
            if engine:
                assert load.clients is not None
                found.setdefault(ENGINE, []).append(self.alone(load.requests, load.clients))
        return {name: over(values) for name, values in found.items()}


def _ours(kind: str) -> str:
    return "hf" if kind == "bfloat16" else kind


def _served(place: Path, vocabulary: int) -> Path:
    """Return a directory of links to a model's files, with a tokenizer of as many tokens.

    Each token beyond the small tokenizer's own is a word, so that every token of an answer shows.
    """
    target = place.with_name(f"{place.name}-served")
    if target.exists():
        return target
    target.mkdir()
    for file in place.iterdir():
        (target / file.name).symlink_to(file.resolve())
    shutil.copy(TOKENIZER / "tokenizer_config.json", target)
    content = json.loads((TOKENIZER / "tokenizer.json").read_text("utf-8"))
    tokens = content["model"]["vocab"]
    tokens |= {f"\u0120word{number}": number for number in range(len(tokens), vocabulary)}
    (target / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    return target


def _keep(args: argparse.Namespace, part: str, load: str, found: dict[str, Figures]) -> None:
    """Print and store a load's figures."""
    for name, figures in found.items():
        show(f"{load}: {name}", figures)
    row: dict[str, Any] = {"part": part, "load_of": load, "figures": found}
    if part == "clients":
        rate = found[OURS]["tokens_per_second"]
        row["of_engine"] = round(rate / found[ENGINE]["tokens_per_second"], 3)
        others = {n: f["tokens_per_second"] for n, f in found.items() if n not in (OURS, ENGINE)}
        row["times_best"] = round(rate / max(others.values()), 3) if others else None
        print(f"{load}: {row['of_engine']} of the engine, {row['times_best']} x the best peer")
    options = ("shape", "kind", "rounds", "requests", "new_tokens", "slo_ttft", "slo_per_token")
    row |= {name: getattr(args, name) for name in options}
    row["load"] = round(os.getloadavg()[0], 2)
    write_row("serving", row | {"peers": args.versions} | environment())


def clients(bench: Bench) -> dict[int, Figures]:
    """Measure clients that send one request after another; returns our figures by number."""
    ours = {}
    for number in CLIENTS:
        count = number * bench.args.requests
        found = bench.rounds(lambda n=number, c=count: loads.Load(bench.bodies(c), n), engine=True)
        _keep(bench.args, "clients", f"{number} clients", found)
        ours[number] = found
    return ours


def latency(bench: Bench, ours: dict[int, dict[str, Figures]]) -> None:
    """Measure the first token of one client, and at half of what 24 clients got."""
    found = bench.rounds(lambda: loads.Load(bench.bodies(8), 1))
    _keep(bench.args, "latency", "unloaded", found)
    most = ours.get(max(CLIENTS)) or bench.rounds(
        lambda: loads.Load(bench.bodies(2 * max(CLIENTS)), max(CLIENTS))
    )
    half: dict[str, list[Figures]] = {}
    for turn in range(bench.args.rounds):
        bodies = bench.bodies(2 * max(CLIENTS))
        for name in bench.servers:
            rate = most[name]["requests_per_second"] / 2
            load = loads.Load(bodies, rate=rate, seed=turn)
            half.setdefault(name, []).append({**bench.drive(name, load), "rate": rate})
    at_half = {name: over(values) for name, values in half.items()}
    for name, figures in at_half.items():
        figures["ttft_p95_times_unloaded"] = round(figures["ttft_p95"] / found[name]["ttft_p95"], 3)
    _keep(bench.args, "latency", "half load", at_half)


def prefix(bench: Bench) -> None:
    """Measure clients whose prompts begin with the same tokens."""
    found = bench.rounds(
        lambda: loads.Load(bench.bodies(16, prompt=(16, 64), shared=SHARED), clients=16)
    )
    _keep(bench.args, "prefix", f"16 clients, {SHARED} tokens shared", found)


def start(args: argparse.Namespace) -> None:
    """Measure how long a server takes to be ready."""
    model = ROOT / "outputs/demo/inference"
    if not model.is_dir():
        print(f"start is left out: no {model}; make demo makes it")
        return
    seconds = []
    sizes = Sizes(args.threads or len(os.sched_getaffinity(0)), 16, 512)
    with tempfile.TemporaryDirectory() as place:
        for _ in range(args.rounds):
            with Server(OURS, model, sizes, Path(place) / "start.log") as server:
                seconds.append({"ready_seconds": server.ready_seconds})
    _keep(args, "start", "demo", {OURS: over(seconds)})


def started(args: argparse.Namespace) -> None:
    """Run the parts on servers that are started here."""
    args.parts, args.shape = args.parts or list(PARTS), args.shape or "1.1B/2"
    args.kind = args.kind or "bfloat16"
    args.versions = peers.installed(SIDES[1:] if args.peers is None else args.peers)
    args.peers = list(args.versions)
    if "start" in args.parts:
        start(args)
    if set(args.parts) == {"start"}:
        return
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        directory = Path(args.models or name).absolute() / args.shape.replace("/", "-")
        peers.write_models(args.shape, directory, [args.kind], args.peers)
        bench = Bench(args, directory, stack)
        bench.rounds(lambda: loads.Load(bench.bodies(4), 4))  # warms up
        ours = clients(bench) if "clients" in args.parts else {}
        if "latency" in args.parts:
            latency(bench, ours)
        if "prefix" in args.parts:
            prefix(bench)


def driven(args: argparse.Namespace) -> None:
    """Drive a server that runs; nothing is stored, since nothing is known of it."""
    url = args.url.rstrip("/").removesuffix("/v1")
    model = model_of(url)
    cases = [(f"{n} clients", n, None) for n in args.clients or []]
    cases += [(f"{r:g} requests/s", None, r) for r in args.rates or []]
    for seed, (name, number, rate) in enumerate(cases):
        values = []
        for turn in range(args.rounds):
            count = args.requests * (number or 16)
            bodies = loads.requests_of(
                count,
                PROMPT,
                args.new_tokens,
                vocabulary=None,
                shared=args.shared or 0,
                seed=1000 * seed + turn,
                model=model,
            )
            records, seconds = loads.drive(url, loads.Load(bodies, number, rate, turn))
            values.append(loads.figures(records, seconds, args.slo_ttft, args.slo_per_token))
        show(name, over(values))


def main() -> None:
    """Measure, and store rows."""
    args = parse()
    if args.url:
        driven(args)
    else:
        started(args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped; the rows of finished loads are kept") from None
