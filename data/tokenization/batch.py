"""Encoding many texts on every core."""

import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.ending import starting_workers, work_for_parent
from common.errors import DataError
from data.tokenization.base import Tokenizer
from data.tokenization.fence import check_text
from data.tokenization.packed import PackedEncoder, PlainEncoder, packed_rows

Packed = tuple[NDArray[Any], NDArray[np.int64]]

# Characters a process should get at least: below this, starting it costs more than it saves.
WORTH_A_PROCESS = 2_000_000
# Characters that a process is given at a time: a signal waits for what is in work. Processes are
# not killed, since Python's pool waits for ever for the rest of what one has begun to send.
PIECE = 500_000


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_workers(workers: int | None) -> int:
    """The number of processes to use; `DataError` unless it is positive."""
    if workers is None:
        return available_cores()
    if workers < 1:
        raise DataError(f"workers must be at least 1, got {workers}")
    return workers


def may_fork() -> bool:
    """Whether a forked child is safe: other threads' locks would stay locked in it."""
    return "fork" in multiprocessing.get_all_start_methods() and threading.active_count() == 1


def encode_batch(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    add_bos: bool = False,
    add_eos: bool = False,
    workers: int | None = None,
) -> list[list[int]]:
    """`tokenizer.encode` of each text, on `workers` cores (default: all).

    Control tokens are never read from the texts.

    Raises:
        DataError: see `Tokenizer.encode`; fewer than one worker.
    """
    for text in texts:
        check_text(text)
    before, after = tokenizer.affixes(add_bos=add_bos, add_eos=add_eos)
    rows = _encode_plain(tokenizer, texts, workers)
    return [[*before, *row, *after] for row in rows]


def _encode_plain(
    tokenizer: Tokenizer, texts: Sequence[str], workers: int | None
) -> list[list[int]]:
    """Ids of each text; control tokens are not looked for.

    Little text goes to the library's own threads. For much of it one core with gigatoken is
    faster than several without: forked processes share the work, or, where forking is not
    safe, one core does it all.
    """
    cores = check_workers(workers)
    characters = sum(map(len, texts))
    encoder = tokenizer.packed_encoder(np.int32, characters)
    if isinstance(encoder, PlainEncoder):
        return tokenizer.encode_plain_batch(texts, cores)
    count = min(cores, 1 + characters // WORTH_A_PROCESS)
    if count == 1 or not may_fork():
        return packed_rows(*encoder.encode(texts))
    shares = _shares(texts, max(count, characters // PIECE))
    _Forked.encoder, _Forked.texts = encoder, texts
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(count, context, partial(work_for_parent, os.getpid()))
    try:
        with starting_workers():
            found = pool.map(_Forked.encode, shares)
        packed = list(found)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        _Forked.encoder, _Forked.texts = None, ()
    return [row for share in packed for row in packed_rows(*share)]


class _Forked:
    """What forked children inherit: nothing has to be sent to them."""

    encoder: PackedEncoder | None = None
    texts: Sequence[str] = ()

    @classmethod
    def encode(cls, share: tuple[int, int]) -> Packed:
        assert cls.encoder is not None
        return cls.encoder.encode(cls.texts[share[0] : share[1]])


def _shares(texts: Sequence[str], count: int) -> list[tuple[int, int]]:
    """`count` ranges of texts of about equal numbers of characters."""
    ends = np.cumsum([len(text) for text in texts])
    marks = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count, side="left") + 1
    bounds = [0, *marks.tolist(), len(texts)]
    return [(start, stop) for start, stop in pairwise(bounds) if start < stop]
