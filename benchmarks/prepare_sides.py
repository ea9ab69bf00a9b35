"""One side of bench_prepare.py: a way to turn texts into ids, in a process of its own.

It answers cases "TOKENIZER CORPUS" with seconds and a digest of the ids. What a side needs once is
made before the clock starts, and caches of words begin empty where they can be emptied.
"""

import argparse
import contextlib
import hashlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from interleave import Run, serve

from data.corpus.token_store import best_dtype
from data.prepare import prepare
from data.tokenizer import Tokenizer, load_tokenizer

Rows = Iterable[Sequence[int]]
# Encode texts on a number of threads.
Library = Callable[[Sequence[str], int], Rows]


def digest(ids: np.ndarray) -> str:
    """A digest of ids one after the other."""
    return hashlib.sha256(ids.astype(np.uint32).tobytes()).hexdigest()[:16]


def data_prepare(tokenizer: Tokenizer, source: Path, workers: int) -> Run:
    """`python -m data.prepare` from the first read to the last write."""
    dtype = best_dtype(tokenizer.vocab_size)

    def run() -> Any:
        fresh = load_tokenizer(tokenizer.source)
        fresh.packed_encoder(dtype, characters=source.stat().st_size)
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
            prefix = Path(place) / "corpus"
            words = ["--input", str(source), "--tokenizer", str(tokenizer.source)]
            words += ["--output_prefix", str(prefix), "--workers", str(workers)]
            begin = time.perf_counter()
            prepare(words, tokenizer=fresh)
            seconds = time.perf_counter() - begin
            return seconds, digest(np.fromfile(prefix.with_suffix(".bin"), dtype))

    return run


def one_by_one(tokenizer: Tokenizer, source: Path, workers: int) -> Run:
    """A line, its text, its ids, an array, a write: what Megatron's preprocess_data does."""
    del workers
    dtype = best_dtype(tokenizer.vocab_size)
    library = OWN["sentencepiece" in tokenizer.name](tokenizer)

    def run() -> Any:
        begin = time.perf_counter()
        with source.open(encoding="utf-8") as lines, tempfile.TemporaryFile() as out:
            for line in lines:
                (ids,) = library([json.loads(line)["text"]], 1)
                out.write(np.array(ids, dtype).tobytes())
            seconds = time.perf_counter() - begin
            out.seek(0)
            return seconds, digest(np.frombuffer(out.read(), dtype))

    return run


def tiktoken_batch(tokenizer: Tokenizer) -> Library:
    """tiktoken's own call."""
    from tests.same_tokens import tiktoken_itself

    encoding = tiktoken_itself(tokenizer.source)
    return lambda texts, threads: encoding.encode_ordinary_batch(list(texts), num_threads=threads)


def sentencepiece_batch(tokenizer: Tokenizer) -> Library:
    """sentencepiece's own call."""
    from tests.same_tokens import sentencepiece_itself

    processor = sentencepiece_itself(tokenizer.source)
    return lambda texts, threads: processor.encode(list(texts), num_threads=threads)


def gigatoken_batch(tokenizer: Tokenizer) -> Library:
    """gigatoken's own call with the vocabulary that is made for it here."""
    import awkward
    import gigatoken

    library = gigatoken.Tokenizer.from_json(tokenizer.bulk_models()[0])

    def encode(texts: Sequence[str], threads: int) -> Rows:
        rows = library.encode_batch(list(texts), parallel=threads > 1)
        return [awkward.to_numpy(awkward.flatten(rows))]

    return encode


def tokenizers_batch(tokenizer: Tokenizer) -> Library:
    """The `tokenizers` library on the same tokenizer.json."""
    import tokenizers

    library = tokenizers.Tokenizer.from_buffer(tokenizer.bulk_models()[0])

    def encode(texts: Sequence[str], threads: int) -> Rows:
        del threads  # TOKENIZERS_PARALLELISM
        return [one.ids for one in library.encode_batch_fast(texts, add_special_tokens=False)]

    return encode


OWN = {True: sentencepiece_batch, False: tiktoken_batch}


def in_memory(make: Callable[[Tokenizer], Library], *, forgets: bool) -> Callable[..., Run]:
    """A side that is given its texts in a list, and writes nothing."""

    def side(tokenizer: Tokenizer, source: Path, workers: int) -> Run:
        lines = source.read_text(encoding="utf-8").split("\n")
        texts = [json.loads(line)["text"] for line in lines if line]
        made = make(tokenizer)

        def run() -> Any:
            library = make(tokenizer) if forgets else made
            begin = time.perf_counter()
            rows = library(texts, workers)
            seconds = time.perf_counter() - begin
            return seconds, digest(np.concatenate([np.asarray(row, np.uint32) for row in rows]))

        return run

    return side


SIDES: dict[str, Callable[[Tokenizer, Path, int], Run]] = {
    "data.prepare": data_prepare,
    "gigatoken": in_memory(gigatoken_batch, forgets=True),
    "its own": lambda tokenizer, *given: in_memory(
        OWN["sentencepiece" in tokenizer.name], forgets=False
    )(tokenizer, *given),
    "tokenizers": in_memory(tokenizers_batch, forgets=False),
    "one by one": one_by_one,
}


def main() -> None:
    """Serve the cases of a side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=SIDES, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--tokenizers", type=Path, nargs="+", required=True)
    options = parser.parse_args()
    loaded = {path.name: load_tokenizer(path) for path in options.tokenizers}

    def make(case: str) -> Run:
        name, corpus = case.split()
        return SIDES[options.side](loaded[name], options.texts / f"{corpus}.jsonl", options.workers)

    serve(make)


if __name__ == "__main__":
    main()
