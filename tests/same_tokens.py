"""Ids of the encoder in bulk beside tiktoken's and sentencepiece's own, on any directory of text.

    python -m tests.same_tokens DIR... [--tokenizers FILE...] [--workers 2]

Every file below the directories that is UTF-8 is a text; copies are taken once. Before them come
texts that are made: every character of Unicode among letters, digits, spaces and line breaks, and
random rows of awkward ones. The libraries are called directly. Prints what was compared, and the
first place of every text whose ids differ; ends with status 1 if there is one.
"""

import argparse
import base64
import hashlib
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import sentencepiece
import tiktoken

from data.tokenizer import load_tokenizer

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared" / "data"
# Written down apart from the code under test: Meta's llama3/tokenizer.py.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Where a letter, a digit, white space and any other character are told apart.
AROUND = ("{}'s ", "a{}b ", " {} ", "1{}2345", "\n{}\n", "!{}!\n", "  {}  x", "{0}{0} \r\n")
SHOWN = 20
# Files that a worker takes at a time.
SHARE = 16
Encode = Callable[[str], list[int]]


def tiktoken_itself(path: Path) -> tiktoken.Encoding:
    """The library with Llama 3's pattern, on a file of ranks."""
    ranks = {}
    for line in path.read_text().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    special = {"<|begin_of_text|>": len(ranks), "<|eot_id|>": len(ranks) + 9}
    return tiktoken.Encoding(
        "itself", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


def sentencepiece_itself(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The library on a model file."""
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@dataclass
class Compared:
    """What was compared with one tokenizer: texts, bytes by kind, and what differs."""

    texts: int = 0
    tokens: int = 0
    size: Counter[str] = field(default_factory=Counter)
    left_out: int = 0
    different: list[str] = field(default_factory=list)

    def add(self, other: "Compared") -> None:
        """Count what another worker has compared."""
        self.texts += other.texts
        self.tokens += other.tokens
        self.size += other.size
        self.left_out += other.left_out
        self.different += other.different


class Pair:
    """The encoder in bulk of a tokenizer file, and its library."""

    def __init__(self, path: Path) -> None:
        ours = load_tokenizer(path)
        self.encoder = ours.packed_encoder(np.uint32)
        itself: Encode
        if "sentencepiece" in ours.name:
            itself = sentencepiece_itself(path).encode
        else:
            itself = tiktoken_itself(path).encode_ordinary
        self.itself = itself

    def compare(self, name: str, texts: Sequence[str], found: Compared) -> None:
        """Compare the ids of texts."""
        ids, sizes = self.encoder.encode(texts)
        ends = np.cumsum(sizes)
        for number, (text, stop, size) in enumerate(zip(texts, ends, sizes, strict=True)):
            own = ids[stop - size : stop]
            try:
                theirs = np.array(self.itself(text), np.uint32)
            except BaseException as error:
                if type(error).__name__ != "PanicException":  # of Rust: too much white space
                    raise
                found.left_out += 1
                continue
            found.texts += 1
            found.tokens += len(own)
            if not np.array_equal(own, theirs):
                found.different.append(f"{name}, text {number}: {_where(own, theirs)}")


def _where(own: np.ndarray, theirs: np.ndarray) -> str:
    shorter = min(len(own), len(theirs))
    at = int(np.argmin(np.append(own[:shorter] == theirs[:shorter], False)))
    return f"token {at}: {own[at : at + 6].tolist()} instead of {theirs[at : at + 6].tolist()}"


def every_character(count: int = 64) -> Iterator[list[str]]:
    """Every character but surrogates, `count` in each text, once in each surrounding."""
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    for first in range(0, len(points), count):
        block = [chr(one) for one in points[first : first + count]]
        yield ["".join(map(around.format, block)) for around in AROUND]


def awkward(count: int) -> Iterator[list[str]]:
    """Random rows of the characters at which tokenizers go wrong."""
    sys.path.insert(0, str(REPO / "tests" / "unit" / "data"))
    from hard_texts import hard_texts

    for seed in range(count):
        yield hard_texts(1000, seed=seed)


def files_below(directories: Sequence[Path]) -> list[Path]:
    """Every regular file."""
    below = (path for one in directories for path in sorted(one.rglob("*")))
    return [path for path in below if path.is_file() and not path.is_symlink()]


def read(path: Path) -> str | None:
    """The text of a file; None where it is none."""
    content = path.read_bytes()
    if b"\0" in content:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


@cache
def _pair(path: Path) -> Pair:
    return Pair(path)


def compare_files(work: tuple[Path, list[Path]]) -> Compared:
    """Compare some files, in any process."""
    pair, found = _pair(work[0]), Compared()
    for path in work[1]:
        text = read(path)
        if text is not None:
            pair.compare(str(path), [text], found)
            found.size[path.suffix or "none"] += path.stat().st_size
    return found


def different_files(directories: Sequence[Path]) -> list[Path]:
    """The files that hold text, copies left out."""
    seen: set[bytes] = set()
    taken = []
    for path in files_below(directories):
        digest = hashlib.sha256(path.read_bytes()).digest()
        if digest not in seen and read(path):
            taken.append(path)
        seen.add(digest)
    return taken


def compare_made(path: Path) -> Compared:
    """Compare texts that are made."""
    pair, found = _pair(path), Compared()
    for name, made in (("characters", every_character()), ("awkward", awkward(100))):
        for number, texts in enumerate(made):
            pair.compare(f"{name} {number}", texts, found)
            found.size[name] += sum(len(text.encode()) for text in texts)
    return found


def _report(path: Path, found: Compared, seconds: float) -> None:
    megabytes = sum(found.size.values()) / 1e6
    kinds = ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in found.size.most_common(12))
    print(
        f"{path.name}: {found.texts} texts, {megabytes:.1f} MB, {found.tokens} tokens in "
        f"{seconds:.0f} s; {len(found.different)} differ; {found.left_out} are too much for the "
        f"library\n  MB: {kinds}",
        flush=True,
    )
    for line in found.different[:SHOWN]:
        print(f"  {line}", flush=True)


def main() -> int:
    """Compare, print, and return the status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [SHARED / "llama3.tokenizer.model", SHARED / "llama2.tokenizer.model"]
    parser.add_argument("directories", type=Path, nargs="*")
    parser.add_argument("--tokenizers", type=Path, nargs="+", default=known)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    for path in (*options.directories, *options.tokenizers):
        if not path.exists():
            parser.error(f"{path} does not exist: name what there is")
    files = different_files(options.directories)
    wrong = False
    for path in options.tokenizers:
        begin = time.perf_counter()
        found = compare_made(path)
        work = [(path, files[at : at + SHARE]) for at in range(0, len(files), SHARE)]
        with multiprocessing.get_context("fork").Pool(options.workers) as pool:
            for part in pool.imap_unordered(compare_files, work):
                found.add(part)
        _report(path, found, time.perf_counter() - begin)
        wrong |= bool(found.different)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
