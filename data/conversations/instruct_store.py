"""Instruction data prepared beforehand: token ids and label masks on disk.

A store is a token store (PREFIX.bin + .idx, or PREFIX_ids.npy + _idx.npz) with one document an
example, and beside it

- PREFIX.labels.bin + .idx (or .npy/.npz): a token store of bytes, 1 where a token is to be learnt;
- PREFIX.examples.jsonl: the conversations, read only where they are scored;
- PREFIX.meta.json: which tokenizer, chat template and limits it was made with.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from common import jsonl
from common.errors import DataError
from common.files import writing
from data.conversations.instruct import (
    Example,
    OnBad,
    bad_list,
    collect_examples,
    report_bad,
)
from data.conversations.instruct_dataset import InstructDataset, Limits, OnLong
from data.corpus.token_store import (
    LAYOUTS,
    StoreFormat,
    StorePaths,
    TokenStore,
    best_dtype,
)
from data.corpus.token_store_writer import TokenStoreWriter, remove_layout
from data.tokenization.base import TOOL_USE
from data.tokenizer import Tokenizer
from data.vocabulary import check_origin

# What PREFIX.meta.json and PREFIX.labels.meta.json say under "task".
TASK = "ids"
LABELS = "labels"


def labels_prefix(prefix: Path) -> Path:
    """Where the label mask of a store lies."""
    return prefix.with_name(f"{prefix.name}.labels")


def examples_path(prefix: Path) -> Path:
    """Where the conversations of a store lie."""
    return prefix.with_name(f"{prefix.name}.examples.jsonl")


def is_store(path: Path) -> bool:
    """Whether a token store of either layout has this prefix."""
    paths = StorePaths(path)
    return paths.index("bin").is_file() or paths.index("npy").is_file()


def write_instruct_store(
    prefix: str | Path,
    dataset: InstructDataset,
    limits: Limits,
    *,
    layout: StoreFormat = "bin",
) -> Path:
    """Write a dataset; `open_instruct_store` gives an equal one. Returns the prefix.

    It is written under a hidden name and takes the place of an older one when it is whole. The
    index of the ids comes last: what was broken off there leaves nothing that opens.

    Raises:
        DataError: a file that cannot be written.
    """
    place = Path(prefix)
    tokenizer = dataset.tokenizer
    meta = {
        "task": TASK,
        "tokenizer": tokenizer.source.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "chat_template": tokenizer.chat_template,
        "tool_template": tokenizer.templates.get(TOOL_USE),
        **dataclasses.asdict(limits),
    }
    new = place.with_name(f".{place.name}.new")
    try:
        _write(new, dataset, layout, meta)
        _take_place(new, place, layout)
    finally:
        for part in _files(new, layout):
            part.unlink(missing_ok=True)
    return place


def _write(
    place: Path, dataset: InstructDataset, layout: StoreFormat, meta: dict[str, Any]
) -> None:
    jsonl.write(examples_path(place), map(dataclasses.asdict, dataset.examples))
    mask = TokenStoreWriter(
        labels_prefix(place), np.uint8, layout=layout, vocab_size=2, meta={"task": LABELS}
    )
    with mask as writer:
        for index in range(len(dataset)):
            writer.add_document(dataset.document(index)[1])
    vocab = dataset.tokenizer.vocab_size
    ids = TokenStoreWriter(place, best_dtype(vocab), layout=layout, vocab_size=vocab, meta=meta)
    with ids as writer:
        for index in range(len(dataset)):
            writer.add_document(dataset.document(index)[0])


def _files(prefix: Path, layout: StoreFormat) -> list[Path]:
    """The files of a store, the index of the ids last."""
    paths, mask = StorePaths(prefix), StorePaths(labels_prefix(prefix))
    labels = [mask.tokens(layout), mask.index(layout), mask.meta]
    return [examples_path(prefix), *labels, paths.meta, paths.tokens(layout), paths.index(layout)]


def _take_place(new: Path, place: Path, layout: StoreFormat) -> None:
    for old in LAYOUTS:
        StorePaths(place).index(old).unlink(missing_ok=True)
    with writing(place):
        for source, target in zip(_files(new, layout), _files(place, layout), strict=True):
            source.replace(target)
    for old in LAYOUTS:
        if old != layout:
            remove_layout(place, old)
            remove_layout(labels_prefix(place), old)


def open_instruct_store(
    prefix: str | Path, tokenizer: Tokenizer, *, limits: Limits | None = None
) -> InstructDataset:
    """The dataset that was written; tokens stay on disk until they are used.

    Args:
        prefix: of the store.
        tokenizer: the one, with the chat template, that the store was made with.
        limits: where given, src_length and tgt_length that are not None have to be those of the
            store.

    Raises:
        DataError: no store, a damaged one, one for pretraining, or one made with another
            tokenizer, chat template or limits.
    """
    place = Path(prefix)
    store = TokenStore.open(place)
    _check_meta(place, store.meta, tokenizer, limits or Limits())
    mask = TokenStore.open(labels_prefix(place))
    if not np.array_equal(mask.starts, store.starts):
        raise DataError(
            f"{labels_prefix(place)} does not describe the examples of {place}: one of the two is "
            "from another run; prepare the data again"
        )
    examples = StoredExamples(examples_path(place), store.num_documents)
    return InstructDataset(
        store.tokens, mask.tokens, store.starts, examples=examples, tokenizer=tokenizer
    )


def _check_meta(prefix: Path, meta: dict[str, Any], tokenizer: Tokenizer, limits: Limits) -> None:
    again = "prepare the data again with `python -m data.prepare --task instruct`"
    if meta.get("task") != TASK:
        raise DataError(
            f"{prefix} holds text for pretraining, not examples with labels: {again}, or train on "
            "it with run_pretrain.py"
        )
    check_origin(
        f"{prefix} was made",
        tokenizer.fingerprint,
        recorded=meta.get("tokenizer_fingerprint", "unknown"),
        recorded_name=meta.get("tokenizer"),
        name=tokenizer.name,
        fix=again,
    )
    recorded = meta.get("chat_template"), meta.get("tool_template")
    if recorded != (tokenizer.chat_template, tokenizer.templates.get(TOOL_USE)):
        raise DataError(
            f"{prefix} was made with another chat template than {tokenizer.name} has now: give "
            f"the same chat_template, or {again}"
        )
    for name in ("src_length", "tgt_length", "max_length"):
        wanted = getattr(limits, name)
        if wanted is not None and wanted != meta.get(name):
            raise DataError(
                f"{prefix} was made with {name}={meta.get(name)}, not {wanted}: leave {name} out, "
                f"or {again}"
            )


class StoredExamples(Sequence[Example]):
    """The conversations of a store, read when the first of them is asked for."""

    def __init__(self, path: Path, count: int) -> None:
        if not path.is_file():
            raise DataError(f"{path} is missing: copy it with the store, or prepare the data again")
        self._path = path
        self._count = count

    @cached_property
    def _examples(self) -> list[Example]:
        try:
            found = list(self._read())
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self._path} is damaged ({error}): prepare the data again") from error
        if len(found) != self._count:
            raise DataError(
                f"{self._path} holds {len(found)} examples, the store {self._count}: one of the "
                "two is cut off or from another run"
            )
        return found

    def _read(self) -> Iterator[Example]:
        for _, item in jsonl.read(self._path):
            if not isinstance(item, dict):
                raise TypeError(f"an example is an object, not {item!r:.40}")
            yield Example(
                tuple(item["messages"]),
                tuple(item["answers"]),
                item["name"],
                tuple(item.get("tools", ())),
            )

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        return self._examples[index]


def open_instruct(
    path: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    raw: bool | None = None,
    format: str = "auto",
    src_length: int | None = None,
    tgt_length: int | None = None,
    max_length: int | None = None,
    on_long: OnLong = "error",
    on_bad: OnBad = "error",
    max_samples: int | None = None,
) -> InstructDataset:
    """Instruction data for training, from files of examples or from a prepared store.

    Args:
        path: files or directories of examples, or the prefix of a store.
        tokenizer: with the chat template to train, which is to be saved with the model.
        raw: True reads examples and encodes them now, False opens a store; None tells by what
            is there.
        format: of `read_examples`; for examples only.
        on_bad: likewise; "skip" also leaves out examples that the chat template refuses.
        src_length, tgt_length, max_length, on_long: `Limits`. A store has its own: they may be
            left out.
        max_samples: the first so many examples only; None for all.

    Raises:
        DataError: nothing there, or whatever `read_examples`, `InstructDataset.from_examples`
            and `open_instruct_store` object to.
    """
    limits = Limits(src_length, tgt_length, on_long, max_length)
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(item) for item in path]
    stores = [item for item in paths if is_store(item) and not item.is_file()]
    if raw is None:
        raw = not stores
    if raw:
        if stores:
            raise DataError(f"{stores[0]} is a prepared store, not a file of examples: raw=False")
        bad = bad_list(on_bad)
        examples = collect_examples(paths, format, bad)[:max_samples]
        dataset = InstructDataset.from_examples(examples, tokenizer, limits=limits, bad=bad)
        report_bad(bad)
        return dataset
    if on_bad == "skip":
        raise DataError(
            f"{paths[0]} is a prepared store, which has no bad examples: they were left out or "
            "refused when it was made; drop on_bad_example=skip"
        )
    if max_samples is not None:
        raise DataError(
            f"{paths[0]} is a prepared store, of which all examples are used: drop max_samples, or "
            "prepare fewer"
        )
    if len(paths) != 1:
        raise DataError(f"one store is opened at a time, not {len(paths)}: prepare them as one")
    if paths[0].is_file():
        raise DataError(
            f"{paths[0]} is a file of examples, not the prefix of a store; drop raw_data=false"
        )
    return open_instruct_store(paths[0], tokenizer, limits=limits)
