"""`data.prepare --task instruct`: examples to a store of ids and label masks."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from common.errors import DataError
from common.files import write_whole
from data.conversations.instruct import collect_examples
from data.conversations.instruct_dataset import InstructDataset, Limits
from data.conversations.instruct_store import examples_path, labels_prefix, write_instruct_store
from data.corpus.prepare_worker import expand
from data.corpus.token_store import StoreFormat, StorePaths
from data.tokenizer import load_tokenizer

# Flags that say nothing in the other task.
PRETRAIN_ONLY = ("json_key", "txt_documents", "append_eos", "prepend_bos", "dtype", "workers")
INSTRUCT_ONLY = ("chat_template", "src_length", "tgt_length", "on_long")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of --task instruct."""
    add = parser.add_argument_group("with --task instruct").add_argument
    add(
        "--chat_template",
        default=None,
        metavar="NAME",
        help="a built-in template or a Jinja file, to train and to serve with (the tokenizer's)",
    )
    add("--src_length", type=int, default=None, help="tokens before the last answer (no limit)")
    add("--tgt_length", type=int, default=None, help="tokens of the last answer (no limit)")
    add(
        "--on_long",
        choices=("error", "truncate", "skip"),
        default="error",
        help="what happens to examples above these lengths",
    )


def check_flags(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """`DataError` for a flag of the other task."""
    foreign = INSTRUCT_ONLY if options.task == "pretrain" else PRETRAIN_ONLY
    other = "instruct" if options.task == "pretrain" else "pretrain"
    for name in foreign:
        if getattr(options, name) != parser.get_default(name):
            raise DataError(f"--{name} is for --task {other}, this is --task {options.task}")


def prepare_instruct(options: argparse.Namespace, bad_lines: Path) -> InstructDataset:
    """Make the store that `options` describe, and say what was made.

    Raises:
        DataError: anything wrong with the input, the tokenizer or the output.
    """
    begin = time.perf_counter()
    prefix = Path(options.output_prefix)
    limits = Limits(options.src_length, options.tgt_length, options.on_long)
    paths = [path for pattern in options.input for path in expand(pattern)]
    tokenizer = load_tokenizer(options.tokenizer, chat_template=options.chat_template)
    tokenizer.require_template()
    bad: list[str] | None = [] if options.on_bad_line == "skip" else None
    examples = collect_examples(paths, options.input_format, bad)
    dataset = InstructDataset.from_examples(examples, tokenizer, limits=limits)
    write_instruct_store(prefix, dataset, limits, layout=options.format)
    if bad:
        write_whole(bad_lines, "".join(f"{line}\n" for line in bad))
        print(f"{len(bad)} bad records were left out, listed in {bad_lines}")
    tokens, labels = int(dataset.lengths.sum()) + len(dataset), int(dataset.label_counts.sum())
    print(
        f"{len(dataset)} examples, {tokens} tokens of which {labels} are labels, in "
        f"{time.perf_counter() - begin:.1f} s\n" + "\n".join(map(str, made(prefix, options.format)))
    )
    return dataset


def made(prefix: Path, layout: StoreFormat) -> Sequence[Path]:
    """The files of a store."""
    paths, mask = StorePaths(prefix), StorePaths(labels_prefix(prefix))
    stores = [part for at in (paths, mask) for part in (at.tokens(layout), at.index(layout))]
    return [*stores, mask.meta, examples_path(prefix), paths.meta]
