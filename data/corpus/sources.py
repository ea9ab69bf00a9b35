"""Which token stores a run reads, and with which weights: from words to opened stores."""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from common.errors import DataError
from data.corpus.shards import whole_of
from data.corpus.token_store import TokenStore, find_stores, shared_store

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_LARGEST = 1e18
_MOST = 1000  # stores; each is a file that stays open


@dataclass(frozen=True)
class Sources:
    """Token stores, and what of a run each of them gives.

    Attributes:
        stores: opened.
        weights: of each, in lowest terms.
        by_size: nobody gave weights: each token counts alike.
    """

    stores: tuple[TokenStore, ...]
    weights: tuple[int, ...]
    by_size: bool = False

    @property
    def num_documents(self) -> int:
        """Documents in all stores."""
        return sum(store.num_documents for store in self.stores)

    @property
    def num_tokens(self) -> int:
        """Tokens in all stores."""
        return sum(store.num_tokens for store in self.stores)

    @property
    def shares(self) -> list[float]:
        """Which part of all samples each store gives."""
        return [weight / sum(self.weights) for weight in self.weights]

    def fingerprint(self) -> str:
        """sha256 (hex): a store's own, or that of several with their weights, in their order."""
        found = [store.fingerprint() for store in self.stores]
        if len(found) == 1:
            return found[0]
        return hashlib.sha256(repr((found, self.weights)).encode()).hexdigest()

    def describe(self) -> str:
        """Name the stores with their shares, the first few of many."""
        named = [
            f"{share:.2%} {store.prefix}"
            for share, store in zip(self.shares[:8], self.stores, strict=False)
        ]
        more = len(self.stores) - len(named)
        return ", ".join(named) + (f" and {more} more" if more else "")


def open_sources(words: Sequence[str], flag: str) -> Sources:
    """Open what a flag names: `PATH ...` or `WEIGHT PATH WEIGHT PATH ...`.

    A path is a store's prefix or a directory, which stands for all stores in it and shares its
    weight among them by their tokens. Without weights, all count by their tokens. Weights may be
    token counts: only their ratios matter, and they are taken exactly as they are written.

    Args:
        words: the flag's, or those of a YAML list; a word may hold a weight and a path, or all of
            them with blanks between, as PaddleNLP has it.
        flag: its name, for errors.

    Raises:
        DataError: no store, a damaged one, one named twice, or weights that are none.
    """
    entries = read_entries(words, flag)
    stores: list[TokenStore] = []
    weights: list[Fraction] = []
    for weight, path in entries:
        found = [TokenStore.open(prefix) for prefix in _prefixes(path, flag)]
        tokens = [store.num_tokens for store in found]
        whole = sum(tokens)
        stores += found
        weights += [Fraction(size) if weight is None else weight * size / whole for size in tokens]
    _check_stores(stores, flag)
    scale = math.lcm(*[weight.denominator for weight in weights])
    numbers = [int(weight * scale) for weight in weights]
    common = math.gcd(*numbers)
    by_size = len(stores) > 1 and entries[0][0] is None
    return Sources(tuple(stores), tuple(number // common for number in numbers), by_size)


def read_entries(words: Sequence[str], flag: str) -> list[tuple[Fraction | None, str]]:
    """Weights and paths as they are written; no weights, or one for each path.

    Raises:
        DataError: weights for some only, a weight without a path, or one that is no weight.
    """
    parts = [part for word in words for part in _parts(word)]
    if len(parts) == 1 or not any(map(_NUMBER.fullmatch, parts)):
        return [(None, part) for part in parts]
    entries: list[tuple[Fraction | None, str]] = []
    for at in range(0, len(parts), 2):
        weight, path = parts[at], parts[at + 1 : at + 2]
        if not _NUMBER.fullmatch(weight):
            raise DataError(
                f"{flag}: {weight} has no weight, and others have: give each store one, as in "
                f"`{flag}: 0.3 A 0.7 B`, or none (a store whose name is a number is ./NUMBER)"
            )
        if not path or _NUMBER.fullmatch(path[0]):
            raise DataError(
                f"{flag}: after the weight {weight} has to come a store, and there is "
                f"{path[0] if path else 'nothing'}; a store whose name is a number is ./NUMBER"
            )
        entries.append((_weight(weight, path[0], flag), path[0]))
    return entries


def _parts(word: str) -> list[str]:
    """A word, cut where it holds weights and paths."""
    pieces = word.split()
    if len(pieces) < 2 or not _NUMBER.fullmatch(pieces[0]):
        return [word]
    parts: list[str] = []
    for piece in pieces:
        if _NUMBER.fullmatch(piece) or not parts or _NUMBER.fullmatch(parts[-1]):
            parts.append(piece)
        else:
            parts[-1] += f" {piece}"  # a path with a blank in it
    return parts


def _weight(word: str, path: str, flag: str) -> Fraction:
    value = float(word)
    if value == 0:
        raise DataError(f"{flag}: the weight {word} takes nothing of {path}: leave both out")
    if not 1 / _LARGEST <= value <= _LARGEST:
        raise DataError(
            f"{flag}: the weight of {path} is {word}; it has to be between {1 / _LARGEST:g} and "
            f"{_LARGEST:g}"
        )
    return Fraction(word)


def _prefixes(path: str, flag: str) -> list[Path]:
    place = Path(path)
    if not place.is_dir():
        return [place]
    found = find_stores(place)
    if not found:
        raise DataError(
            f"{flag}={path} has no token store in it (.bin/.idx, _ids.npy/_idx.npz or .ds): name "
            f"one as {place / 'NAME'}, or make one with `python -m data.prepare`"
        )
    names = {prefix.name for prefix in found}
    for prefix in found:
        whole = whole_of(prefix.name)
        if whole in names:
            raise DataError(
                f"{flag}={path} has the store {whole} and its shard {prefix.name}, which would "
                f"give the same samples twice: name {place}/{whole}, or move the shards away"
            )
    return found


def _check_stores(stores: Sequence[TokenStore], flag: str) -> None:
    cure = "which would give the same samples twice: name it once, with the sum of its weights"
    seen: set[Path] = set()
    for store in stores:
        place = store.prefix.resolve()
        if place in seen:
            raise DataError(f"{flag} names {store.prefix} twice, {cure}")
        seen.add(place)
    pair = shared_store(stores)
    if pair is not None:
        raise DataError(f"{flag}: {pair[1].prefix} is a copy of {pair[0].prefix}, {cure}")
    if len(stores) > _MOST:
        raise DataError(
            f"{flag} names {len(stores)} stores, the most is {_MOST}: make larger ones, with "
            "`python -m data.merge`"
        )
