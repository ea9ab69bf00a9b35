"""Turn text, or instruction data, into a token store.

    python -m data.prepare --input corpus/*.jsonl --tokenizer models/llama-2-7b \\
        --output_prefix data/corpus --append_eos
    python -m data.prepare --task instruct --input alpaca.json --tokenizer models/llama-2-7b \\
        --chat_template alpaca --output_prefix data/alpaca
"""

import argparse
import dataclasses
import difflib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from common.errors import DataError
from data.conversations.instruct_formats import FORMATS as INSTRUCT_FORMATS
from data.conversations.prepare_instruct import add_flags, check_flags, prepare_instruct
from data.corpus.prepare_job import Job, Progress, bad_lines_path, hidden
from data.corpus.prepare_worker import (
    Inputs,
    Worker,
    find_inputs,
    make_readers,
    piece_size,
    plan_pieces,
)
from data.corpus.readers import FORMATS
from data.corpus.token_store import StorePaths, best_dtype
from data.tokenization.batch import available_cores
from data.tokenizer import Tokenizer, load_tokenizer

EXAMPLES = """\
examples:
  # JSON lines with the text under "text"; a document ends with EOS, as Llama expects
  python -m data.prepare --input corpus.jsonl --tokenizer models/llama-2-7b \\
      --output_prefix data/corpus --append_eos

  # every .txt under a directory, one document a file
  python -m data.prepare --input books/ --txt_documents file --tokenizer models/llama-3-8b \\
      --output_prefix data/books --append_eos

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


# Files of examples that are told apart by their columns.
TABLES = ("csv", "parquet")
# Bytes of input from which the table of words is filled before the workers start.
WORTH_WARMING = 8_000_000


class Parser(argparse.ArgumentParser):
    """Names the nearest flag for one that does not exist, and raises `DataError`."""

    def error(self, message: str) -> NoReturn:
        raise DataError(f"{message}; see `python -m data.prepare --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Before argparse, which complains of missing flags first.
        for argument in sys.argv[1:] if args is None else args:
            name = argument.split("=", 1)[0]
            if name.startswith("--") and name not in self._option_string_actions:
                near = difflib.get_close_matches(name, self._option_string_actions, 1)
                hint = f": did you mean {near[0]}?" if near else ""
                raise DataError(
                    f"unknown flag {name}{hint} (`python -m data.prepare --help` has all)"
                )
        return super().parse_known_args(args, namespace)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m data.prepare",
        description="Turn text into a token store for pretraining, or examples into one for "
        "finetuning, on all cores.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--task",
        choices=("pretrain", "instruct"),
        default="pretrain",
        help="pretrain: every token is learnt; instruct: examples, of which the answers are",
    )
    add("--input", nargs="+", required=True, metavar="PATH", help="files, directories or globs")
    add(
        "--tokenizer",
        "--tokenizer_name_or_path",
        required=True,
        metavar="PATH",
        help="a model directory or a tokenizer file (tokenizer.model, tokenizer.json)",
    )
    add("--output_prefix", required=True, metavar="PREFIX", help="where the store goes")
    add(
        "--input_format",
        choices=("auto", *FORMATS, *INSTRUCT_FORMATS, *TABLES),
        default="auto",
        help="what the input is (auto: by ending and content)",
    )
    add("--json_key", default="text", help='the key of the text in JSON lines ("text")')
    add(
        "--txt_documents",
        choices=("blank_line", "file", "line"),
        default="blank_line",
        help="what ends a document in plain text (blank_line, as in PaddleNLP's tools)",
    )
    add(
        "--format",
        choices=("bin", "npy"),
        default="bin",
        help="layout of the store: bin = .bin + .idx, npy = _ids.npy + _idx.npz",
    )
    add(
        "--dtype",
        choices=("auto", "uint16", "int32"),
        default="auto",
        help="type of the ids on disk (auto: uint16 below 65500 ids, else int32)",
    )
    add("--append_eos", action="store_true", help="end each document with the EOS token")
    add("--prepend_bos", action="store_true", help="begin each document with the BOS token")
    add(
        "--on_bad_line",
        choices=("error", "skip"),
        default="error",
        help="error: stop at the first bad line (broken JSON, no such key, not UTF-8, ...), so "
        "that nothing is lost unnoticed; skip: leave it out, count it and list it in "
        "PREFIX.bad_lines.txt",
    )
    add("--workers", type=int, default=None, help="processes (all cores)")
    add("--overwrite", action="store_true", help="replace a store, or an unfinished run")
    add_flags(parser)
    return parser


def prepare(
    arguments: Sequence[str] | None = None, *, tokenizer: Tokenizer | None = None
) -> Progress:
    """Run the command line with --task pretrain; returns the counts.

    `tokenizer` saves loading the one at `--tokenizer` where a caller has it already.

    Raises:
        DataError: anything wrong with the arguments, the input or the output.
    """
    return _prepare_text(_parse(arguments), tokenizer)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    options = parser.parse_args(arguments)
    check_flags(parser, options)
    return options


def _prepare_text(options: argparse.Namespace, tokenizer: Tokenizer | None) -> Progress:
    workers = available_cores() if options.workers is None else options.workers
    if workers < 1:
        raise DataError(f"--workers must be at least 1, got {workers}")
    prefix = Path(options.output_prefix)
    _check_output(prefix, overwrite=options.overwrite)
    inputs = find_inputs(options.input, options.input_format)
    tokenizer = tokenizer or load_tokenizer(options.tokenizer)
    job, writer_options = _make_job(options, prefix, inputs, tokenizer, workers)
    begin = time.perf_counter()
    if inputs.ignored:
        print(f"passed over {len(inputs.ignored)} files of other kinds, e.g. {inputs.ignored[0]}")
    if inputs.total_bytes >= WORTH_WARMING:
        job.worker.warm_up()
    progress, resumed = job.run(writer_options)
    _report(prefix, options, progress, time.perf_counter() - begin, resumed=resumed)
    return progress


def _make_job(
    options: argparse.Namespace,
    prefix: Path,
    inputs: Inputs,
    tokenizer: Tokenizer,
    workers: int,
) -> tuple[Job, dict[str, Any]]:
    dtype = best_dtype(tokenizer.vocab_size) if options.dtype == "auto" else np.dtype(options.dtype)
    before, after = tokenizer.affixes(add_bos=options.prepend_bos, add_eos=options.append_eos)
    readers = make_readers(inputs, json_key=options.json_key, txt_documents=options.txt_documents)
    meta = {
        "tokenizer": tokenizer.source.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "append_eos": options.append_eos,
        "prepend_bos": options.prepend_bos,
        "eos_id": tokenizer.eos_id,
    }
    size = piece_size(inputs.total_bytes)
    settings = {
        **meta,
        "sources": [dataclasses.asdict(source) for source in inputs.sources],
        "json_key": options.json_key,
        "txt_documents": options.txt_documents,
        "format": options.format,
        "dtype": dtype.name,
        "piece_bytes": size,
    }
    job = Job(
        prefix=prefix,
        settings=settings,
        inputs=inputs,
        pieces=plan_pieces(inputs, readers, size),
        worker=Worker(tokenizer, inputs.sources, readers, dtype, before, after),
        workers=workers,
        skip_bad=options.on_bad_line == "skip",
    )
    writer_options = {
        "dtype": dtype,
        "layout": options.format,
        "vocab_size": tokenizer.vocab_size,
        "meta": meta,
    }
    return job, writer_options


def _check_output(prefix: Path, *, overwrite: bool) -> None:
    """`DataError` if something would be overwritten; with `overwrite`, make room."""
    if not prefix.name or prefix.is_dir():
        raise DataError(
            f"--output_prefix {prefix} is a directory: add a name, e.g. {prefix / 'corpus'}"
        )
    paths = StorePaths(prefix)
    store = [
        paths.index("bin"),
        paths.tokens("bin"),
        paths.index("npy"),
        paths.tokens("npy"),
        paths.meta,
        bad_lines_path(prefix),
    ]
    if overwrite:
        # The index goes first, so that a crash leaves no store with wrong tokens.
        for path in [*store, hidden(prefix, "journal")]:
            path.unlink(missing_ok=True)
        return
    present = [path for path in store[:4] if path.exists()]
    if present and not hidden(prefix, "journal").exists():
        raise DataError(f"{present[0]} exists already: choose another prefix, or --overwrite it")


def _report(
    prefix: Path, options: argparse.Namespace, progress: Progress, seconds: float, *, resumed: bool
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
        print(f"{progress.bad} bad lines were left out, listed in {bad_lines_path(prefix)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """`prepare` with errors as messages; returns the exit status."""
    try:
        options = _parse(arguments)
        if options.task == "instruct":
            prefix = Path(options.output_prefix)
            _check_output(prefix, overwrite=options.overwrite)
            prepare_instruct(options, bad_lines_path(prefix))
        else:
            _prepare_text(options, None)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
