"""Tokenizing: MB/s of `python -m data.prepare` beside the libraries' own calls.

    python benchmarks/bench_prepare.py [--chinese DIR] [--tokenizers FILE...] [--rounds 3]

Sides, each in a process of its own, take turns on the same texts with one worker and with two:

- data.prepare: from the first read of a file of JSON lines to the last write of the store;
- gigatoken, with the vocabulary that data.prepare makes for it, and texts in a list;
- the tokenizer's own library (tiktoken, sentencepiece): its batch call, texts in a list;
- tokenizers: Hugging Face's, `encode_batch_fast` on the same tokenizer.json, texts in a list;
- one by one: a line, its ids by the tokenizer's own library, an array, a write, which is what
  Megatron's preprocess_data does with its default of one worker.

All sides start with the tokenizer loaded; what making gigatoken's takes is printed. The first two
begin every turn without words that they have met. The others, whose speed does not depend on that,
encode the first `--peer_megabytes` only. Ids of all sides are compared with data.prepare's. MB are
bytes of the texts in UTF-8, figures are medians. Corpora: benchmarks/prepare_texts.py.
"""

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil
from interleave import Worker

from benchmarks.prepare_texts import corpora, limited, write_jsonl
from benchmarks.record import environment, median, write_row
from data.corpus.token_store import best_dtype
from data.tokenizer import load_tokenizer

WHOLE = ("data.prepare", "gigatoken")
PEERS = ("its own", "tokenizers", "one by one")


def cores_of_others() -> float:
    """Seconds of processor time that other programs have used since the machine started."""
    fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq = (int(field) for field in fields[:7])
    busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    this = psutil.Process()
    return busy - sum(sum(one.cpu_times()[:4]) for one in (this, *this.children(recursive=True)))


def start(stack: ExitStack, side: str, workers: int, texts: Path, files: list[Path]) -> Worker:
    """Start the process of a side."""
    command = [sys.executable, str(ROOT / "benchmarks" / "prepare_sides.py"), "--side", side]
    command += ["--workers", str(workers), "--texts", str(texts)]
    command += ["--tokenizers", *map(str, files)]
    environment = {
        "RAYON_NUM_THREADS": str(workers),
        "TOKENIZERS_PARALLELISM": "true" if workers > 1 else "false",
    }
    return stack.enter_context(Worker(side, command, environment))


def measure(
    processes: dict[tuple[str, int], Worker], case: str, rounds: int
) -> tuple[dict[tuple[str, int], float], list[str]]:
    """Median seconds of each side, in turns, and the sides whose ids differ from data.prepare's."""
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in processes}
    head = f"{case}-head"
    ids = {head: processes["data.prepare", 1].value(head)[1]}
    differ: dict[str, None] = {}
    for _ in range(rounds):
        for (side, workers), process in processes.items():
            texts = case if side in WHOLE else head
            took, digest = process.value(texts)
            seconds[side, workers].append(took)
            if digest != ids.setdefault(texts, digest):
                differ[f"{side}, {workers}"] = None
    return {key: median(values) for key, values in seconds.items()}, list(differ)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = ROOT.parent / "shared" / "data"
    known = [shared / "llama3.tokenizer.model", shared / "llama2.tokenizer.model"]
    parser.add_argument("--data", type=Path, default=shared)
    parser.add_argument("--chinese", type=Path, help="directory with Chinese text")
    parser.add_argument("--tokenizers", type=Path, nargs="+", default=known)
    parser.add_argument("--corpora", nargs="+", help="some of those that there are")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=25)
    parser.add_argument("--peer_megabytes", type=float, default=4)
    return parser.parse_args()


def write_texts(options: argparse.Namespace, directory: Path) -> dict[str, tuple[float, float]]:
    """Write corpora and their first part; returns the MB of both."""
    sizes = {}
    found = corpora(options.data, options.chinese, int(options.megabytes * 1e6))
    for name, texts in found.items():
        if options.corpora and name not in options.corpora:
            continue
        head = limited(texts, int(options.peer_megabytes * 1e6))
        write_jsonl(directory / f"{name}.jsonl", texts)
        write_jsonl(directory / f"{name}-head.jsonl", head)
        whole, part = (sum(len(text.encode()) for text in some) / 1e6 for some in (texts, head))
        sizes[name] = whole, part
    return sizes


def making(file: Path) -> float:
    """Seconds that data.prepare takes to make gigatoken for a tokenizer, and to try it."""
    tokenizer = load_tokenizer(file)
    begin = time.perf_counter()
    tokenizer.packed_encoder(best_dtype(tokenizer.vocab_size))
    return time.perf_counter() - begin


def main() -> None:
    """Measure, print tables, append rows to benchmarks/results/prepare.jsonl."""
    options = parse()
    packages = ("numpy", "sentencepiece", "tiktoken", "tokenizers", "gigatoken")
    machine = environment(packages)
    print(f"{machine['processor']}, {machine['cores']} cores, commit {machine['commit']}")
    print("others = cores that other programs used meanwhile: above 0.1, measure again\n")
    keys = [(side, workers) for workers in (1, 2) for side in (*WHOLE, *PEERS)]
    keys.remove(("one by one", 2))
    print(" | ".join(["tokenizer", "corpus", "MB", *(f"{s} {w}" for s, w in keys), "others"]))
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        sizes = write_texts(options, Path(place))
        processes = {
            key: start(stack, *key, Path(place), options.tokenizers)  # type: ignore[arg-type]
            for key in keys
        }
        for file in options.tokenizers:
            made = making(file)
            print(f"{file.name}: gigatoken is made and tried in {made:.2f} s")
            for corpus, (whole, head) in sizes.items():
                begun, others = time.perf_counter(), cores_of_others()
                seconds, differ = measure(processes, f"{file.name} {corpus}", options.rounds)
                busy = (cores_of_others() - others) / (time.perf_counter() - begun)
                speed = {
                    (side, workers): (whole if side in WHOLE else head) / value
                    for (side, workers), value in seconds.items()
                }
                cells = [f"{value:.1f}" for value in speed.values()]
                cells = [file.name, corpus, f"{whole:.1f}", *cells, f"{busy:.2f}"]
                print(" | ".join(cells), f"other ids: {differ}" if differ else "", flush=True)
                row = {
                    **machine,
                    "tokenizer": file.name,
                    "corpus": corpus,
                    "megabytes": round(whole, 2),
                    "peer_megabytes": round(head, 2),
                    "rounds": options.rounds,
                    "making_s": round(made, 3),
                    "mb_per_s": {f"{s}, {w}": round(v, 2) for (s, w), v in speed.items()},
                    "other_ids": differ,
                    "cores_used_by_others": round(busy, 2),
                }
                path = write_row("prepare", row)
    print(f"\nrows appended to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
