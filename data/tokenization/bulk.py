"""Encoding in bulk with gigatoken: many texts to one array of ids.

gigatoken splits text with vector instructions where others match a regular expression, and keeps
the ids of every word that it has met. It is given its vocabulary as a tokenizer.json that is made
here, with exactly the merges that tiktoken and sentencepiece make; what it makes of their files by
itself is refused (Llama 3's has tokens that no two others make) or differs (texts of control and
byte pieces). The tokenizer's own library has the last word: both encode the same texts before
gigatoken is used, and what is known to differ goes to the library.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from data.tokenization.fence import fenced
from data.tokenization.packed import BatchEncode, Ints, PackedEncoder, PlainEncoder, narrow

_log = logging.getLogger(__name__)

# Bytes by which a process may grow before gigatoken is made again: it forgets no word by itself.
KEPT = 512 << 20
# Tokens of the vocabulary that are tried before gigatoken is used.
TRIED = 4096
SPACE = "\u2581"  # sentencepiece writes a space so
Ids = NDArray[np.uint32]
Apart = Callable[[Sequence[str]], Sequence[bool]]


class _Library(Protocol):
    def encode(self, text: bytes, /) -> Ids: ...


class BulkEncoder(PackedEncoder):
    """gigatoken on one thread, which may go on in forked processes.

    Args:
        name: of the tokenizer, for messages.
        models: tokenizer.json for texts that stand alone; a second one, if that differs, for
            those that go on from others.
        own: ids of texts by the tokenizer's own library.
        apart: which texts go to that library.
        dtype: of the ids.

    Raises:
        DataError: gigatoken cannot read a model.
    """

    def __init__(
        self,
        name: str,
        models: Sequence[bytes],
        own: BatchEncode,
        apart: Apart,
        dtype: np.dtype[Any],
    ) -> None:
        self.dtype = dtype
        self._name = name
        self._models = models
        self._own = own
        self._apart = apart
        with fenced(name, []):
            self._made = [_load(model) for model in models]
        self._process, self._base = os.getpid(), _resident()

    def encode(
        self, texts: Sequence[str], bare: Sequence[bool] | None = None
    ) -> tuple[NDArray[Any], Ints]:
        self._forget()
        bare = bare or [False] * len(texts)
        with fenced(self._name, texts):
            rows = list(map(self._row, texts, bare, self._apart(texts)))
        sizes = np.fromiter(map(len, rows), np.int64, count=len(rows))
        ids = np.concatenate(rows) if rows else np.zeros(0, np.uint32)
        return narrow(ids, self.dtype), sizes

    def _row(self, text: str, inside: bool, apart: bool) -> Ids:
        if apart:
            return np.array(self._own([text], [inside], 1)[0], np.uint32)
        return self._made[inside and len(self._made) > 1].encode(text.encode())

    def _forget(self) -> None:
        """Make gigatoken again where it holds too much."""
        if self._process != os.getpid():
            self._process, self._base = os.getpid(), _resident()
        elif _resident() - self._base > KEPT:
            self._made = []  # before there are others
            self._made = [_load(model) for model in self._models]
            self._base = _resident()

    def agrees(self, texts: Sequence[str]) -> bool:
        """Whether texts have the library's ids, alone and where they go on from others."""
        for inside in (False, True)[: len(self._models)]:
            bare = [inside] * len(texts)
            rows = self._own(texts, bare, 1)
            ids, sizes = self.encode(texts, bare)
            if sizes.tolist() != list(map(len, rows)):
                return False
            if ids.tolist() != list(chain.from_iterable(rows)):
                return False
        return True


def bulk_encoder(
    name: str,
    models: Callable[[], Sequence[bytes]],
    own: BatchEncode,
    apart: Apart,
    tokens: Callable[[], Sequence[str]],
    dtype: np.dtype[Any],
) -> PackedEncoder:
    """A `BulkEncoder` if gigatoken is there and gives the library's ids, else the library alone.

    Args:
        name, models, own, apart, dtype: see `BulkEncoder`.
        tokens: texts of the vocabulary, some of which are tried.
    """
    try:
        import gigatoken.gigatoken_rs  # noqa: F401
        import psutil  # noqa: F401
    except ImportError as error:
        _log.warning(
            "%s: encoding without it gives the same ids, several times slower (pip install "
            "-r requirements.txt -c constraints.txt)",
            error,
        )
        return PlainEncoder(own, dtype)
    try:
        encoder = BulkEncoder(name, models(), own, apart, dtype)
        agrees = encoder.agrees(trial_texts(tokens()))
    except DataError:
        agrees = False
    if not agrees:
        _log.warning(
            "%s: this release of gigatoken gives other ids than the tokenizer's own library, which "
            "is taken alone, several times slower: install the release in constraints.txt",
            name,
        )
    return encoder if agrees else PlainEncoder(own, dtype)


def trial_texts(tokens: Sequence[str]) -> list[str]:
    """Texts at which encoders go wrong: tokens side by side, runs, characters of all planes."""
    some = tokens[:: max(1, len(tokens) // TRIED)]
    texts = [glue.join(some[at : at + 64]) for at in range(0, len(some), 64) for glue in ("", " ")]
    for unit in (" ", "\n", "\t", "\r\n", " \n", "=", "a", "ab", "0"):
        texts += [edge.format(unit * count) for count in range(70) for edge in ("{}", "x{}y")]
    planes = [*range(0, 0xD800, 61), *range(0xE000, 0x20000, 61), *range(0x20000, 0x110000, 4099)]
    around = "a{0} {0}1{0}'s\n{0}"
    for at in range(0, len(planes), 64):
        texts.append("".join(around.format(chr(one)) for one in planes[at : at + 64]))
    return texts


def piece_models(pieces: Sequence[tuple[str, float]], ids: Mapping[str, int]) -> list[bytes]:
    """tokenizer.json of a sentencepiece BPE model, with a space before each text and without.

    sentencepiece joins the neighbours whose piece has the highest score, the leftmost among equals:
    a piece has a merge for every place at which it parts into two pieces. Equal scores are those of
    runs of spaces, where the leftmost neighbours have the longest left side.

    Args:
        pieces: the normal pieces and their scores.
        ids: ids of all pieces.
    """
    scores = dict(pieces)
    merges = [
        (-score, -at, piece[:at], piece[at:])
        for piece, score in pieces
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
    merges.sort(key=itemgetter(0, 1))
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": ids,
        "merges": [f"{left} {right}" for _, _, left, right in merges],
    }
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    first = {"type": "Prepend", "prepend": SPACE}
    return [
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [],
                "normalizer": {"type": "Sequence", "normalizers": steps},
                "pre_tokenizer": None,
                "post_processor": None,
                "decoder": None,
                "model": model,
            },
            ensure_ascii=False,
        ).encode()
        for steps in ([first, space], [space])
    ]


def _load(model: bytes) -> _Library:
    from gigatoken.gigatoken_rs import load_hf_json

    library: _Library = load_hf_json(model)
    return library


def _resident() -> int:
    from psutil import Process

    resident: int = Process().memory_info().rss
    return resident
