"""Stores made in parts on several machines, and stores put together into one."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError, UserError
from data.corpus.token_store import (
    CODES,
    StoreFormat,
    StorePaths,
    TokenStore,
    find_stores,
    shared_store,
)
from data.corpus.token_store_writer import TokenStoreWriter, remove_store

_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}")
SHARD = "shard"  # of a store's meta
# Of meta: what all stores that are put together have to share.
_SHARED = ("tokenizer_fingerprint", "append_eos", "prepend_bos", "eos_id")
# Of meta: what the writer counts anew.
_COUNTED = frozenset({"documents", "tokens", "dtype", "vocab_size", SHARD})
BLOCK = 1 << 22
# Pieces of input for each shard, so that all have about as much of it.
PIECES_EACH = 8


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count`, counted from 1."""

    number: int
    count: int

    @classmethod
    def read(cls, words: str) -> "Shard":
        """Read `2/8`.

        Raises:
            UserError: something else, or no part of so many.
        """
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", words)
        found = cls(*map(int, match.groups())) if match else cls(0, 0)
        if not 1 <= found.number <= found.count:
            raise UserError(f"shard={words!r}: give a part and how many there are, from 1/8 to 8/8")
        return found

    def prefix(self, whole: str | Path) -> Path:
        """Where this part of a store lies, beside the place of the whole."""
        place = Path(whole)
        return place.with_name(f"{place.name}-{self.number:05}-of-{self.count:05}")

    def bounds(self, pieces: int) -> tuple[int, int]:
        """The first of a number of pieces that are in this part, and the first behind it.

        Raises:
            DataError: none are.
        """
        first, stop = ((self.number + at) * pieces // self.count for at in (-1, 0))
        if first == stop:
            raise DataError(
                f"shard {self.number}/{self.count} has nothing to do: the input can be cut at its "
                f"documents into {pieces} pieces only; take {pieces} shards at most"
            )
        return first, stop

    def meta(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What a store says of the part that it is, with a digest of what all parts share."""
        text = json.dumps(settings, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return {"number": self.number, "count": self.count, "of": digest}


def whole_of(name: str) -> str | None:
    """The name of the store of which one of this name is a shard; None if it is none."""
    match = _NAME.fullmatch(name)
    return match[1] if match else None


def find_parts(words: Sequence[str]) -> list[TokenStore]:
    """Open stores by their prefixes; a prefix whose shards lie there stands for all of them.

    Raises:
        DataError: no store, one named twice, shards that are missing, or some that are not of one
            run.
    """
    stores: list[TokenStore] = []
    for word in words:
        place = Path(word)
        shards = _shards(place)
        stores += [TokenStore.open(prefix) for prefix in shards or [place]]
    given = [store.meta.get(SHARD) for store in stores]
    if not any(given):
        twice = shared_store(stores)
        if twice is not None:
            raise DataError(
                f"{twice[0].prefix} and {twice[1].prefix} hold the same documents, which would "
                "stand in the whole twice: name one of them (a blend gives one store more weight)"
            )
        return stores
    return _in_order(stores, given)


def _shards(place: Path) -> list[Path]:
    if not place.parent.is_dir():
        return []
    return [prefix for prefix in find_stores(place.parent) if whole_of(prefix.name) == place.name]


def _in_order(
    stores: Sequence[TokenStore], given: Sequence[dict[str, Any] | None]
) -> list[TokenStore]:
    by_number: dict[int, TokenStore] = {}
    first = next(one for one in given if one)
    for store, one in zip(stores, given, strict=True):
        if one is None:
            raise DataError(
                f"{store.prefix} is no shard, and others are: put the shards together first"
            )
        if (one["of"], one["count"]) != (first["of"], first["count"]):
            raise DataError(
                f"{store.prefix} and {stores[0].prefix} are shards of different runs (other input, "
                "flags, tokenizer or number of shards): make all of them with one command"
            )
        if one["number"] in by_number:
            raise DataError(
                f"{by_number[one['number']].prefix} and {store.prefix} are both shard "
                f"{one['number']}: name one of them"
            )
        by_number[one["number"]] = store
    missing = [n for n in range(1, first["count"] + 1) if n not in by_number]
    if missing:
        named = ", ".join(f"{n}/{first['count']}" for n in missing[:8])
        raise DataError(
            f"{len(missing)} of {first['count']} shards are missing: make them with --shard {named}"
        )
    return [by_number[number] for number in sorted(by_number)]


def merged_meta(stores: Sequence[TokenStore]) -> dict[str, Any]:
    """What the meta of all stores together says.

    Raises:
        DataError: two of them are of different tokenizers, tasks or kinds of documents.
    """
    first = stores[0]
    for store in stores:
        if store.meta.get("task", "pretrain") != "pretrain":
            raise DataError(
                f"{store.prefix} holds {store.meta['task']} of examples: only stores of text are "
                "put together; give all files of examples to one data.prepare"
            )
        for name in _SHARED:
            ours, theirs = first.meta.get(name), store.meta.get(name)
            if ours != theirs:
                raise DataError(
                    f"{name} is {theirs} in {store.prefix} and {ours} in {first.prefix}: such "
                    "stores make no whole; prepare one of them again, or train on a blend of them"
                )
    return {name: value for name, value in first.meta.items() if name not in _COUNTED}


def merge(stores: Sequence[TokenStore], target: Path, layout: StoreFormat) -> TokenStore:
    """Write the documents of all stores, in turn, as one store, and read it back.

    Raises:
        DataError: stores that make no whole, a disk that is full, or a result that differs from
            its parts, which is then deleted.
    """
    meta = merged_meta(stores)
    dtype = max((store.dtype for store in stores), key=lambda one: np.iinfo(one).max)
    sizes = [store.vocab_size for store in stores]
    vocabulary = None if None in sizes else max(size for size in sizes if size is not None)
    kept = dtype if dtype in CODES else np.dtype("<i4")
    with TokenStoreWriter(target, kept, layout=layout, vocab_size=vocabulary, meta=meta) as writer:
        for store in stores:
            for first, stop in _blocks(store):
                ids = store.tokens[store.starts[first] : store.starts[stop]]
                writer.add_documents(ids, store.sizes[first:stop])
    result = TokenStore.open(target)
    if not _holds(result, stores):
        remove_store(target, layout)
        raise DataError(
            f"{target} did not read back as its parts, and is deleted: the disk or the memory of "
            "this machine is at fault, or a part was changed meanwhile"
        )
    return result


def _blocks(store: TokenStore) -> Iterator[tuple[int, int]]:
    """Documents [first, stop) of about `BLOCK` tokens each, at least one."""
    first = 0
    while first < store.num_documents:
        end = store.starts[first] + BLOCK
        stop = max(int(np.searchsorted(store.starts, end, side="right")) - 1, first + 1)
        yield first, min(stop, store.num_documents)
        first = min(stop, store.num_documents)


def _holds(result: TokenStore, stores: Sequence[TokenStore]) -> bool:
    """Whether a store is its parts: the same documents, and the same ids in each."""
    if not np.array_equal(result.sizes, np.concatenate([store.sizes for store in stores])):
        return False
    at = 0
    for store in stores:
        for first, stop in _blocks(store):
            begin, end = int(store.starts[first]), int(store.starts[stop])
            if not np.array_equal(result.tokens[at + begin : at + end], store.tokens[begin:end]):
                return False
        at += store.num_tokens
    return at == result.num_tokens


def bad_lines(stores: Sequence[TokenStore]) -> str:
    """The lines that were left out of the stores, in turn."""
    files = [StorePaths(store.prefix).bad_lines for store in stores]
    return "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
