"""Data preparation: MB/s of `python -m data.prepare` against one document at a time.

    python benchmarks/bench_prepare.py [--llama2 FILE] [--llama3 FILE] [--repeats 3]

The other side is what Megatron's preprocess_data does with its default of one worker: read a
line, parse it, encode its text by one call of the tokenizer library (sentencepiece's and
tiktoken's own), turn the ids into an array and write it. It loads no torch, and calls the two
libraries directly instead of through wrappers, so it is faster than the real script. Its
files are compared with ours byte for byte.

Both sides start with the tokenizer loaded. Ours pays for starting its processes and for filling
its table of words in every run. The two sides take turns; figures are medians.

Corpora: `web` is c4_300docs.jsonl and wikitext2.valid.txt of ../shared/data (or --data), 1.9 MB,
where most words are met for the first time; `docs` is the documentation strings of the standard
library and of the packages installed here, cut at --megabytes: a size at which words come again,
as in any real corpus.
"""

import argparse
import contextlib
import inspect
import io
import json
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks.record import environment, median, write_row
from data.corpus.readers import WikiText
from data.prepare import prepare
from data.tokenizer import Tokenizer, load_tokenizer

DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
SHORTEST = 200


def docstrings(limit: int) -> Iterable[str]:
    """Different documentation strings, about `limit` characters in all, in a fixed order."""
    seen: set[str] = set()
    held = 0
    paths = sysconfig.get_paths()
    for root in (paths["stdlib"], paths["purelib"]):
        for path in sorted(Path(root).rglob("*.py")):
            source = path.read_text(encoding="utf-8", errors="ignore")
            for match in DOCSTRING.finditer(source):
                text = inspect.cleandoc(match.group(1)).replace("\0", "")
                if len(text) >= SHORTEST and text not in seen:
                    seen.add(text)
                    held += len(text)
                    yield text
                if held >= limit:
                    return


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    """One {"text": ...} a line."""
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
    return path


def one_by_one(source: Path, prefix: Path, encode: Callable[[str], list[int]], eos: int) -> None:
    """The baseline: a document at a time, in one process."""
    dtype = np.uint16 if eos < 65500 else np.int32
    sizes = []
    with source.open(encoding="utf-8") as lines, prefix.with_suffix(".bin").open("wb") as out:
        for line in lines:
            ids = encode(json.loads(line)["text"])
            ids.append(eos)
            array = np.array(ids, dtype)
            out.write(array.tobytes(order="C"))
            sizes.append(len(array))
    np.array(sizes, np.int32).tofile(prefix.with_suffix(".sizes"))


def ours(source: Path, prefix: Path, tokenizer: Tokenizer, workers: int) -> None:
    """`python -m data.prepare`, quietly."""
    arguments = ["--input", str(source), "--tokenizer", str(tokenizer.source), "--append_eos"]
    arguments += ["--output_prefix", str(prefix), "--workers", str(workers), "--overwrite"]
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(arguments, tokenizer=tokenizer)


def library_call(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """The library's own function, as a user of it would call it."""
    if "sentencepiece" in tokenizer.name:
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.source)).encode
    return tokenizer.encode_plain


def cores_of_others() -> float:
    """Seconds of processor time that other programs have used since the machine started."""
    fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq = (int(field) for field in fields[:7])
    busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])


def measure(
    source: Path, tokenizer: Tokenizer, repeats: int, workers: int
) -> tuple[dict[str, float], float]:
    """Median seconds of each side, in turns, and how many cores others used meanwhile.

    Checks that all sides write the same.
    """
    encode, eos = library_call(tokenizer), tokenizer.eos_id
    assert eos is not None
    with tempfile.TemporaryDirectory() as directory:
        theirs_at, ours_at = Path(directory) / "theirs", Path(directory) / "ours"
        sides: dict[str, Callable[[], None]] = {
            "one_by_one": lambda: one_by_one(source, theirs_at, encode, eos),
            "ours_1": lambda: ours(source, ours_at, tokenizer, 1),
            f"ours_{workers}": lambda: ours(source, ours_at, tokenizer, workers),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        begun, others = time.perf_counter(), cores_of_others()
        for _ in range(repeats):
            for name, side in sides.items():
                begin = time.perf_counter()
                side()
                seconds[name].append(time.perf_counter() - begin)
        disturbed = (cores_of_others() - others) / (time.perf_counter() - begun)
        written = {path.with_suffix(".bin").read_bytes() for path in (theirs_at, ours_at)}
        assert len(written) == 1, "the two sides do not write the same ids"
    return {name: median(values) for name, values in seconds.items()}, disturbed


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = ROOT.parent / "shared" / "data"
    parser.add_argument("--data", type=Path, default=shared)
    parser.add_argument("--llama2", type=Path, default=shared / "llama2.tokenizer.model")
    parser.add_argument("--llama3", type=Path, default=shared / "llama3.tokenizer.model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=24)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


def make_corpora(directory: Path, data: Path, megabytes: int) -> dict[str, Path]:
    """The corpora as JSON lines."""
    corpora = {}
    if (data / "c4_300docs.jsonl").is_file():
        articles = WikiText().read((data / "wikitext2.valid.txt").read_bytes()).texts
        corpora["web"] = write_jsonl(directory / "web.jsonl", articles)
        with corpora["web"].open("ab") as file, (data / "c4_300docs.jsonl").open("rb") as more:
            shutil.copyfileobj(more, file)
    else:
        print(f"no {data / 'c4_300docs.jsonl'}: leaving out the corpus `web`")
    corpora["docs"] = write_jsonl(directory / "docs.jsonl", docstrings(megabytes * 1_000_000))
    return corpora


def main() -> None:
    """Measure, print a table, append the rows to benchmarks/results/prepare.jsonl."""
    options = parse()
    machine = environment(("numpy", "sentencepiece", "tiktoken"))
    print(f"{machine['processor']}, {machine['cores']} cores, commit {machine['commit']}")
    print("one by one = what Megatron's preprocess_data does with its default of one worker")
    print("others = cores that other programs used meanwhile: above 0.1, measure again\n")
    many = f"ours_{options.workers}"
    print(f"{'tokenizer':<10}{'corpus':<8}{'MB':>6}{'one by one':>12}{'ours, 1':>10}", end="")
    print(f"{f'ours, {options.workers}':>10}   (MB/s){'ratio':>8}{'others':>8}")
    with tempfile.TemporaryDirectory() as directory:
        corpora = make_corpora(Path(directory), options.data, options.megabytes)
        for name, file in (("llama2", options.llama2), ("llama3", options.llama3)):
            tokenizer = load_tokenizer(file)
            for corpus, source in corpora.items():
                size = source.stat().st_size / 1e6
                seconds, others = measure(source, tokenizer, options.repeats, options.workers)
                speed = {side: size / value for side, value in seconds.items()}
                ratio = seconds["one_by_one"] / seconds[many]
                print(
                    f"{name:<10}{corpus:<8}{size:>6.1f}{speed['one_by_one']:>12.2f}"
                    f"{speed['ours_1']:>10.2f}{speed[many]:>10.2f}{'':>9}{ratio:>7.2f}x{others:>8.2f}",
                    flush=True,
                )
                row = {
                    **machine,
                    "tokenizer": name,
                    "corpus": corpus,
                    "megabytes": round(size, 2),
                    "workers": options.workers,
                    "repeats": options.repeats,
                    **{f"{side}_mb_per_s": round(value, 3) for side, value in speed.items()},
                    "ratio": round(ratio, 3),
                    "cores_used_by_others": round(others, 2),
                }
                path = write_row("prepare", row)
    print(f"\nrows appended to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
