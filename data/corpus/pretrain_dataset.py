"""A token store as fixed-length training samples, split, shuffled and resumable.

The order is Megatron's (gpt_dataset.py), so that the same store, split and seed give the samples
that Megatron and PaddleNLP give: the documents of all epochs are shuffled, laid end to end and
cut into samples of `seq_length + 1` tokens that overlap by one, and the samples are shuffled
again; if less than 80% of the last epoch is needed, that epoch is kept apart and comes last.
"""

import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError, check_integer
from common.files import replacing, writing
from data.corpus.token_store import TokenStore
from data.order import ResumableSampler

__all__ = [
    "PretrainDataset",
    "ResumableSampler",
    "build_pretrain_datasets",
    "parse_split",
    "split_documents",
]

logger = logging.getLogger(__name__)

PARTS = ("train", "valid", "test")
SEPARATE_BELOW = 0.80
INDEX_VERSION = 1
INT32_MAX = int(np.iinfo(np.int32).max)

Bounds = tuple[int, int, int, int]


def parse_split(split: str) -> tuple[float, float, float]:
    """The shares in "949,50,1" (or with slashes), each divided by their sum.

    Raises:
        DataError: not one to three numbers, a negative one, or all of them zero.
    """
    fields = str(split).replace("/", ",").split(",")
    try:
        shares = [float(field) for field in fields]
    except ValueError:
        shares = []
    total = sum(shares)
    if not 1 <= len(shares) <= 3 or not math.isfinite(total):
        raise DataError(
            "split must be one to three numbers such as 949,50,1 (train, valid, test), got "
            f"{split!r}"
        )
    if min(shares) < 0 or total <= 0:
        raise DataError(
            f"split must have no negative share and at least one above zero, got {split!r}"
        )
    train, valid, test = [share / total for share in shares] + [0.0] * (3 - len(shares))
    return train, valid, test


def split_documents(split: str, num_documents: int) -> Bounds:
    """The documents at which train, valid and test begin, and the end, as Megatron rounds them.

    Documents keep their order: train takes the first ones.
    """
    ends = [0]
    for share in parse_split(split):
        ends.append(ends[-1] + round(share * num_documents))
    # What rounding gave too much or too little is taken from the first part.
    excess = ends[-1] - num_documents
    train, valid, test = (max(end - excess, 0) for end in ends[1:])
    return 0, train, valid, test


@dataclass(frozen=True)
class IndexKey:
    """Everything that the order of samples depends on."""

    store: str
    first_document: int
    last_document: int
    seq_length: int
    num_samples: int
    seed: int
    version: int = INDEX_VERSION

    def name(self) -> str:
        """A file name that is different for different keys."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class SampleIndex:
    """Where each sample lies.

    Attributes:
        documents: the documents of all epochs in the order they are laid, int32 [N].
        samples: position in `documents` and offset in that document at which sample i begins,
            int32 [samples + 1, 2].
        order: the i-th sample to give, uint32 or int64 [samples].
    """

    documents: NDArray[np.int32]
    samples: NDArray[np.int32]
    order: NDArray[Any]


class PretrainDataset:
    """Samples of one part of a store: `dataset[i]` for 0 <= i < len(dataset).

    `{"input_ids": int64 [S], "labels": int64 [S]}`, S = seq_length; `labels[t]` is the token
    after `input_ids[t]`. Samples cross document borders, as is usual in pretraining.
    """

    def __init__(
        self, store: TokenStore, name: str, seq_length: int, epochs: int, index: SampleIndex
    ) -> None:
        self.store = store
        self.name = name
        self.seq_length = seq_length
        self.epochs = epochs
        self.index = index

    def __len__(self) -> int:
        return len(self.index.order)

    def __getitem__(self, item: int) -> dict[str, NDArray[np.int64]]:
        if not -len(self) <= item < len(self):
            raise IndexError(f"sample {item} of {len(self)}")
        tokens = self._tokens(int(self.index.order[item]))
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}

    def _tokens(self, sample: int) -> NDArray[np.int64]:
        """The `seq_length + 1` tokens of a sample before shuffling."""
        (first, begin), (last, end) = self.index.samples[sample : sample + 2].tolist()
        documents = self.index.documents[first : last + 1].tolist()
        starts = self.store.starts
        pieces = []
        for position, document in enumerate(documents, first):
            start, stop = int(starts[document]), int(starts[document + 1])
            if position == last:
                stop = start + end + 1
            if position == first:
                start += begin
            pieces.append(self.store.tokens[start:stop])
        tokens: NDArray[np.int64] = np.concatenate(pieces).astype(np.int64)
        return tokens


def build_pretrain_datasets(
    prefix: str | Path,
    *,
    seq_length: int,
    split: str = "949,50,1",
    num_samples: Sequence[int | None],
    seed: int = 42,
    cache_dir: str | Path | None = None,
    vocab_size: int | None = None,
) -> tuple[PretrainDataset | None, PretrainDataset | None, PretrainDataset | None]:
    """Train, validation and test samples of the store at `prefix`.

    Args:
        prefix: a token store in either layout.
        seq_length: tokens in a sample, at least 2.
        split: shares of the documents, see `split_documents`.
        num_samples: for each part, how many samples are needed: as many epochs are laid as
            that takes, and the dataset has at least that many. None: exactly one epoch.
            0: the part is not wanted, and None is returned for it.
        seed: of the order; parts share it, as in Megatron.
        cache_dir: where indexes are kept; default `index-cache` beside the store (kept in
            memory alone, with a warning, where that cannot be written).
        vocab_size: if given, ids must be below it.

    Raises:
        DataError: bad store, split, length or number, or a part that is wanted is too short.
    """
    check_integer("seq_length", seq_length, least=2, most=INT32_MAX - 1)
    check_integer("seed", seed, least=0, most=2**32 - 1)
    if len(num_samples) != len(PARTS):
        raise DataError(f"num_samples needs a number for each of {', '.join(PARTS)}")
    for name, count in zip(PARTS, num_samples, strict=True):
        if count is not None:
            check_integer(f"num_samples of {name}", count, least=0)
    store = TokenStore.open(prefix)
    if store.meta.get("task", "pretrain") != "pretrain":
        raise DataError(
            f"{prefix} holds {store.meta['task']} of examples for finetuning, not text: "
            "prepare text with `python -m data.prepare`"
        )
    bounds = split_documents(split, store.num_documents)
    if vocab_size is not None:
        store.check_vocab(vocab_size)
    cache = _Cache(store, cache_dir)
    fingerprint = store.fingerprint()
    # Every part is checked before the first index is built.
    plans = [
        None
        if count == 0
        else _plan(store, name, (bounds[part], bounds[part + 1]), seq_length, count, split)
        for part, (name, count) in enumerate(zip(PARTS, num_samples, strict=True))
    ]
    built: list[PretrainDataset | None] = []
    for part, (name, plan) in enumerate(zip(PARTS, plans, strict=True)):
        if plan is None:
            built.append(None)
            continue
        key = IndexKey(
            fingerprint, bounds[part], bounds[part + 1], seq_length, plan.num_samples, seed
        )
        index = cache.load(key) or cache.save(key, _build(store, key, plan))
        built.append(PretrainDataset(store, name, seq_length, plan.epochs, index))
    return built[0], built[1], built[2]


@dataclass(frozen=True)
class _Plan:
    num_samples: int
    epochs: int
    tokens_per_epoch: int


def _plan(
    store: TokenStore,
    name: str,
    bounds: tuple[int, int],
    seq_length: int,
    count: int | None,
    split: str,
) -> _Plan:
    """How many epochs a part needs; `DataError` if it cannot give a single sample."""
    first, last = bounds
    if first >= last:
        raise DataError(
            f"the {name} part of {store.prefix} is empty: split {split} of "
            f"{store.num_documents} documents leaves it none. Give it a larger share, use more "
            "(or shorter) documents, or ask for no samples of it"
        )
    tokens = int(store.starts[last] - store.starts[first])
    if tokens < seq_length + 1:
        raise DataError(
            f"the {name} part of {store.prefix} has {tokens} tokens in {last - first} documents, "
            f"but one sample takes {seq_length + 1} (sequence length + 1): lower the sequence "
            f"length, or give {name} a larger share than split {split} does"
        )
    samples_per_epoch = (tokens - 1) // seq_length
    if count is None:
        count = samples_per_epoch
    # A sample takes seq_length tokens of its own and one that it shares with the next.
    epochs = max(1, -(-(count * seq_length + 1) // tokens))
    limits = {
        "documents times epochs": epochs * (last - first),
        "samples": (epochs * tokens - 1) // seq_length,
        "epochs": epochs,
    }
    for what, value in limits.items():
        if value >= INT32_MAX:
            raise DataError(
                f"{count} {name} samples would take {value} {what}; the limit is {INT32_MAX}: "
                "ask for fewer samples"
            )
    return _Plan(count, epochs, tokens)


def _build(store: TokenStore, key: IndexKey, plan: _Plan) -> SampleIndex:
    """Lay out and shuffle; the order of the random draws is Megatron's."""
    rng = np.random.RandomState(key.seed)
    separate = _samples_before_last_epoch(key, plan)
    documents = np.arange(key.first_document, key.last_document, dtype=np.int32)
    if separate is None:
        laid = np.tile(documents, plan.epochs)
        rng.shuffle(laid)
    else:
        before, final = np.tile(documents, plan.epochs - 1), documents.copy()
        rng.shuffle(before)
        rng.shuffle(final)
        laid = np.concatenate([before, final])
    samples = _sample_starts(store, laid, key.seq_length, plan)
    total = len(samples) - 1
    dtype = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    head = np.arange(0, total if separate is None else separate, dtype=dtype)
    tail = np.arange(len(head), total, dtype=dtype)
    rng.shuffle(head)
    if tail.size:
        rng.shuffle(tail)
    return SampleIndex(laid, samples, np.concatenate([head, tail]))


def _samples_before_last_epoch(key: IndexKey, plan: _Plan) -> int | None:
    """Samples before the last epoch where that is kept apart, else None."""
    if plan.epochs == 1:
        return None
    before = ((plan.epochs - 1) * plan.tokens_per_epoch - 1) // key.seq_length
    per_epoch = (plan.tokens_per_epoch - 1) // key.seq_length
    needed_of_last = plan.num_samples - before
    return before if needed_of_last < int(SEPARATE_BELOW * per_epoch) else None


def _sample_starts(
    store: TokenStore, laid: NDArray[np.int32], seq_length: int, plan: _Plan
) -> NDArray[np.int32]:
    # An ordinary import at the top would make reading a store need a compiled module.
    try:
        from tool_helpers import helpers
    except ImportError as error:
        raise DataError(
            "the sample index needs tool_helpers: "
            "pip install -r requirements.txt -c constraints.txt"
        ) from error
    # The native code has no bounds check: it reads past the end, and may crash the process, if
    # the documents laid hold fewer tokens than it is told.
    held = int(store.sizes[laid].sum(dtype=np.int64))
    assert held == plan.epochs * plan.tokens_per_epoch, (held, plan)
    assert laid.dtype == np.int32
    assert store.sizes.dtype == np.int32
    with _quiet_stdout():
        samples: NDArray[np.int32] = helpers.build_sample_idx(
            store.sizes, laid, seq_length, plan.epochs, plan.tokens_per_epoch
        )
    return samples


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Nothing on file descriptor 1: the native code prints its arguments there."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


class _Cache:
    """Sample indexes on disk, found again by their key."""

    def __init__(self, store: TokenStore, directory: str | Path | None) -> None:
        self._chosen = directory is not None
        self._directory = Path(directory) if directory else store.prefix.parent / "index-cache"

    def _paths(self, key: IndexKey) -> dict[str, Path]:
        names = ("documents", "samples", "order")
        return {name: self._directory / f"{key.name()}.{name}.npy" for name in names}

    def load(self, key: IndexKey) -> SampleIndex | None:
        """The index for `key`, or None where there is none that is whole."""
        paths = self._paths(key)
        if not all(path.is_file() for path in paths.values()):
            return None
        try:
            arrays = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
        except (ValueError, OSError, EOFError) as error:
            logger.warning("sample index in %s is damaged, building it again: %s", paths, error)
            return None
        index = SampleIndex(**arrays)
        whole = (
            index.documents.dtype == np.int32
            and index.samples.dtype == np.int32
            and index.samples.shape == (len(index.order) + 1, 2)
            and len(index.order) >= key.num_samples
            and int(index.samples[-1, 0]) < len(index.documents)
        )
        return index if whole else None

    def save(self, key: IndexKey, index: SampleIndex) -> SampleIndex:
        """Keep `index` for the next run; other processes may be doing the same."""
        try:
            with writing(self._directory, hint="or choose another directory for the index"):
                for name, path in self._paths(key).items():
                    with replacing(path) as temporary, temporary.open("wb") as file:
                        np.save(file, getattr(index, name))
        except DataError as error:
            if self._chosen:
                raise
            logger.warning("the sample index is kept in memory only: %s", error)
            return index
        return self.load(key) or index
