"""Put token stores together: python -m data.merge --input A B --output_prefix WHOLE."""

from common.ending import run_script  # isort: split

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError
from common.files import write_whole
from common.flags import arg, load
from data.corpus.shards import bad_lines, find_parts, merge, merged_meta
from data.corpus.token_store import LAYOUTS, StoreFormat, StorePaths
from data.corpus.token_store_writer import check_output, remove_layout

PROG = "python -m data.merge"
DESCRIPTION = """\
Put token stores of one tokenizer together: the documents of the first, then those of the second,
and so on. Shards of one run (data.prepare --shard) come in their own order, all of them; the whole
is byte for byte the store of a run without shards. It is read back and compared with its parts.

  python -m data.merge --input data/web --output_prefix data/web      # all shards of data/web
  python -m data.merge --input data/a data/b --output_prefix data/ab  # two stores
"""


@dataclass
class MergeArguments:
    """Which stores, and where the whole goes."""

    input: list[str] = arg(
        [], "prefixes of stores; one whose shards lie there stands for all of them", required=True
    )
    output_prefix: str = arg("", "where the store goes", required=True)
    format: StoreFormat = arg(
        "bin", "layout of the store: bin = .bin + .idx, npy = _ids.npy + _idx.npz"
    )
    overwrite: bool = arg(False, "replace a store")


def main(words: Sequence[str] | None = None) -> None:
    """Read flags, check the parts, write and compare."""
    (options,) = load((MergeArguments,), words, prog=PROG, description=DESCRIPTION)
    target = Path(options.output_prefix)
    check_output(target, overwrite=options.overwrite)
    begin = time.perf_counter()
    stores = find_parts(options.input)
    if any(store.prefix.resolve() == target.resolve() for store in stores):
        raise DataError(f"output_prefix={target} is one of the parts: choose another")
    merged_meta(stores)
    skipped = bad_lines(stores)
    whole = merge(stores, target, options.format)
    if options.overwrite:
        for layout in LAYOUTS:
            if layout != options.format:
                remove_layout(target, layout)
    report = StorePaths(target).bad_lines
    if skipped:
        write_whole(report, skipped)
    else:
        report.unlink(missing_ok=True)
    print(
        f"{whole.num_documents} documents, {whole.num_tokens} tokens of {len(stores)} stores in "
        f"{time.perf_counter() - begin:.1f} s, read back and equal\n{target}"
    )


if __name__ == "__main__":
    run_script(main)
