"""`data.prepare --task instruct`: examples to a store of ids and label masks."""

import time
from collections.abc import Sequence
from pathlib import Path

from common.errors import DataError
from common.files import write_whole
from common.flags import meant
from data.arguments import ExamplesArguments, PrepareArguments
from data.conversations.instruct import collect_examples
from data.conversations.instruct_dataset import InstructDataset, Limits
from data.conversations.instruct_store import examples_path, labels_prefix, write_instruct_store
from data.corpus.token_store import StoreFormat, StorePaths
from data.input_files import expand
from data.tokenizer import load_tokenizer


def prepare_instruct(
    options: PrepareArguments, examples: ExamplesArguments, bad_lines: Path
) -> InstructDataset:
    """Make the store that the arguments describe, and say what was made.

    Raises:
        DataError: anything wrong with the input, the tokenizer or the output.
    """
    begin = time.perf_counter()
    prefix = Path(options.output_prefix)
    if "on_long" in meant(examples) and examples.src_length is examples.tgt_length is None:
        raise DataError(
            f"on_long={examples.on_long} is about examples above a length, and none is given: add "
            "--src_length or --tgt_length, or drop it"
        )
    limits = Limits(examples.src_length, examples.tgt_length, examples.on_long)
    paths = [path for pattern in options.input for path in expand(pattern)]
    tokenizer = load_tokenizer(options.tokenizer, chat_template=examples.chat_template)
    tokenizer.require_template()
    bad: list[str] | None = [] if options.on_bad_line == "skip" else None
    found = collect_examples(paths, options.input_format, bad)
    dataset = InstructDataset.from_examples(found, tokenizer, limits=limits, bad=bad)
    write_instruct_store(prefix, dataset, limits, layout=options.format)
    bad_lines.unlink(missing_ok=True)
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
