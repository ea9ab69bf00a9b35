"""Turn text, or instruction data, into a token store.

    python -m data.prepare --input corpus/*.jsonl --tokenizer models/llama-2-7b \\
        --output_prefix data/corpus --append_eos
    python -m data.prepare --task instruct --input alpaca.json --tokenizer models/llama-2-7b \\
        --chat_template alpaca --output_prefix data/alpaca
"""

from common.ending import run_script  # isort: split

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError
from common.flags import load, meant
from data.arguments import (
    GROUPS,
    CorpusArguments,
    ExamplesArguments,
    PrepareArguments,
)
from data.corpus.prepare_job import AGAIN, Job, Progress, hidden, start_of
from data.corpus.prepare_worker import (
    Inputs,
    Worker,
    find_inputs,
    make_readers,
    piece_size,
    plan_pieces,
)
from data.corpus.shards import PIECES_EACH, SHARD, Shard
from data.corpus.token_store import StorePaths, best_dtype
from data.corpus.token_store_writer import check_output, present, remove_layout
from data.prepare_instruct import prepare_instruct
from data.tokenization.batch import check_workers
from data.tokenizer import Tokenizer, load_tokenizer

PROG = "python -m data.prepare"
DESCRIPTION = """\
Turn text into a token store for pretraining, or examples into one for finetuning, on all cores.

examples:
  # JSON lines with the text under "text"; a document ends with EOS, as Llama expects
  python -m data.prepare --input corpus.jsonl --tokenizer models/llama-2-7b \\
      --output_prefix data/corpus --append_eos

  # every .txt under a directory, one document a file
  python -m data.prepare --input books/ --txt_documents file --tokenizer models/llama-3-8b \\
      --output_prefix data/books --append_eos

  # the same on eight machines, which see the same files; then, on one, the whole of the shards
  python -m data.prepare --input corpus.jsonl --tokenizer models/llama-2-7b \\
      --output_prefix data/corpus --append_eos --shard 1/8
  python -m data.merge --input data/corpus --output_prefix data/corpus

  # examples to finetune on, tokenized beforehand (docs/instruct_data.md)
  python -m data.prepare --task instruct --input alpaca.json --tokenizer models/llama-2-7b \\
      --chat_template alpaca --src_length 1024 --tgt_length 512 --output_prefix data/alpaca

  # WikiText, in the older layout of PaddleNLP
  python -m data.prepare --input wiki.train.tokens --format npy --tokenizer models/llama-2-7b \\
      --output_prefix data/wiki

The store is PREFIX.bin + PREFIX.idx (Megatron's layout) or, with --format npy, PREFIX_ids.npy +
PREFIX_idx.npz; train on it with `run_pretrain.py --input_dir`. A run that was stopped, even by
kill -9 or a full disk, goes on when the same command is given again, and ends with the same bytes.
"""


Options = tuple[PrepareArguments, CorpusArguments, ExamplesArguments]


def prepare(words: Sequence[str] | None = None, *, tokenizer: Tokenizer | None = None) -> Progress:
    """Run the command line with --task pretrain; returns the counts.

    `tokenizer` saves loading the one at `--tokenizer` where a caller has it already.

    Raises:
        UserError: anything wrong with the arguments, the input or the output.
    """
    options, corpus, _ = _load(words)
    _check_output(options)
    return _prepare_text(options, corpus, tokenizer)


def _load(words: Sequence[str] | None) -> Options:
    groups: Options = load(GROUPS, words, prog=PROG, description=DESCRIPTION)
    options, corpus, _ = groups
    if corpus.shard is not None:
        options.output_prefix = str(Shard.read(corpus.shard).prefix(options.output_prefix))
    return groups


def _prepare_text(
    options: PrepareArguments, corpus: CorpusArguments, tokenizer: Tokenizer | None
) -> Progress:
    prefix = Path(options.output_prefix)
    inputs = find_inputs(options.input, options.input_format)
    _check_formats(corpus, {source.format for source in inputs.sources})
    tokenizer = tokenizer or load_tokenizer(options.tokenizer)
    job, writer_options = _make_job(options, corpus, prefix, inputs, tokenizer)
    begin = time.perf_counter()
    if options.overwrite:
        _start_over(prefix)
    if inputs.ignored:
        count, first = len(inputs.ignored), inputs.ignored[0]
        print(f"passed over {count} other, hidden or repeated files, e.g. {first}")
    progress, resumed = job.run(writer_options)
    if options.overwrite:
        remove_layout(prefix, "npy" if options.format == "bin" else "bin")
    _report(prefix, options, progress, time.perf_counter() - begin, resumed=resumed)
    return progress


def _make_job(
    options: PrepareArguments,
    corpus: CorpusArguments,
    prefix: Path,
    inputs: Inputs,
    tokenizer: Tokenizer,
) -> tuple[Job, dict[str, Any]]:
    dtype = best_dtype(tokenizer.vocab_size) if corpus.dtype == "auto" else np.dtype(corpus.dtype)
    before, after = tokenizer.affixes(add_bos=corpus.prepend_bos, add_eos=corpus.append_eos)
    readers = make_readers(inputs, json_key=corpus.json_key, txt_documents=corpus.txt_documents)
    meta = {
        "tokenizer": tokenizer.source.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "append_eos": corpus.append_eos,
        "prepend_bos": corpus.prepend_bos,
        "eos_id": tokenizer.eos_id,
    }
    size = piece_size(inputs.total_bytes)
    shard = None if corpus.shard is None else Shard.read(corpus.shard)
    if shard is not None:
        size = max(min(size, inputs.total_bytes // (PIECES_EACH * shard.count)), 1)
    settings = {
        **meta,
        "sources": [dataclasses.asdict(source) for source in inputs.sources],
        "json_key": corpus.json_key,
        "txt_documents": corpus.txt_documents,
        "format": options.format,
        "dtype": dtype.name,
        "piece_bytes": size,
    }
    pieces = plan_pieces(inputs, readers, size)
    begin = Progress()
    if shard is not None:
        first, stop = shard.bounds(len(pieces))
        pieces = pieces[first:stop]
        begin = start_of(inputs, pieces[0])
        meta[SHARD] = shard.meta(_shared(settings, inputs))
        settings[SHARD] = corpus.shard
    job = Job(
        prefix=prefix,
        settings=settings,
        inputs=inputs,
        readers=readers,
        pieces=pieces,
        begin=begin,
        worker=Worker(tokenizer, inputs.sources, readers, dtype, before, after),
        workers=check_workers(corpus.workers),
        skip_bad=options.on_bad_line == "skip",
    )
    writer_options = {
        "dtype": dtype,
        "layout": options.format,
        "vocab_size": tokenizer.vocab_size,
        "meta": meta,
    }
    return job, writer_options


def _shared(settings: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
    """What the machines of all shards have in common: files may lie elsewhere on each of them."""
    files = [[Path(one.path).name, one.format, one.size] for one in inputs.sources]
    return {**settings, "sources": files}


def _check_output(options: PrepareArguments) -> None:
    """`DataError` if something would be replaced without `--overwrite`."""
    prefix = Path(options.output_prefix)
    unfinished = hidden(prefix, "journal").exists()
    check_output(prefix, overwrite=options.overwrite or unfinished)


def _check_formats(corpus: CorpusArguments, formats: set[str]) -> None:
    """`DataError` for a flag of a format that no input has."""
    for name, form in (("json_key", "jsonl"), ("txt_documents", "txt")):
        if name in meant(corpus) and form not in formats:
            raise DataError(
                f"--{name} is for inputs of format {form}, and there are only "
                f"{', '.join(sorted(formats))}: drop it, or see --input_format"
            )


def _start_over(prefix: Path) -> None:
    """Forget an unfinished run. A finished store stays until the new one takes its place."""
    hidden(prefix, "journal").unlink(missing_ok=True)


def _report(
    prefix: Path, options: PrepareArguments, progress: Progress, seconds: float, *, resumed: bool
) -> None:
    paths = StorePaths(prefix)
    speed = "" if resumed else f", {progress.input_bytes / seconds / 1e6:.1f} MB/s"
    print(
        f"{progress.documents} documents, {progress.tokens} tokens from "
        f"{progress.input_bytes} bytes in {seconds:.1f} s{speed}\n"
        f"{paths.tokens(options.format)}\n{paths.index(options.format)}"
    )
    if progress.empty:
        print(f"{progress.empty} blank documents were left out")
    if progress.bad:
        print(f"{progress.bad} bad lines were left out, listed in {StorePaths(prefix).bad_lines}")


@contextlib.contextmanager
def _telling_how_to_go_on(options: PrepareArguments) -> Iterator[None]:
    """Within this, a signal that ends the process ends it with a line on what helps."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        prefix, advice = Path(options.output_prefix), "the same command starts again"
        if options.task == "pretrain" and hidden(prefix, "journal").exists():
            advice = AGAIN
        elif not options.overwrite and present(prefix):
            advice = f"{prefix} may not be whole: the same command with --overwrite starts again"
        sys.stderr.write(f"stopped; {advice}\n")
        raise


def main(words: Sequence[str] | None = None) -> None:
    """Read flags and prepare the data of the task."""
    options, corpus, examples = _load(words)
    prefix = Path(options.output_prefix)
    _check_output(options)
    with _telling_how_to_go_on(options):
        if options.task == "instruct":
            prepare_instruct(options, examples, StorePaths(prefix).bad_lines)
            hidden(prefix, "journal").unlink(missing_ok=True)
        else:
            _prepare_text(options, corpus, None)


if __name__ == "__main__":
    run_script(main)
