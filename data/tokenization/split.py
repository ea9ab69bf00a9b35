"""Tokenizers whose library knows no added tokens: texts are cut at them before they go there."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from data.tokenization.added_tokens import Cut, Cutter, Region, RegionIds, Start
from data.tokenization.base import Tokenizer
from data.tokenization.model_files import ALWAYS, NEVER
from data.tokenization.packed import (
    Ints,
    PackedEncoder,
    PlainEncoder,
    packed_rows,
)


class SplitTokenizer(Tokenizer):
    """Text between added tokens goes to a library, each part as a text of its own.

    A space is put before each of them, before the first of a text, or never, as `prefix` says.
    """

    # Characters of text from which making an encoder in bulk takes less time than it saves.
    worth_making: ClassVar[int]

    def __init__(self, **made: Any) -> None:
        super().__init__(**made)
        self._cutter = Cutter(self.added)
        self._bulk: dict[np.dtype[Any], PackedEncoder] = {}

    @abstractmethod
    def encode_raw(
        self, texts: Sequence[str], bare: Sequence[bool], threads: int
    ) -> list[list[int]]:
        """Ids of texts that hold no added token; no space is put before those that are `bare`."""

    def raw_encoder(self, dtype: np.dtype[Any]) -> PackedEncoder:
        """An encoder in bulk of texts that hold no added token."""
        return PlainEncoder(self.encode_raw, dtype)

    def packed_encoder(self, dtype: DTypeLike, characters: int | None = None) -> PackedEncoder:
        if characters is not None and characters < self.worth_making:
            return super().packed_encoder(dtype)
        inner = self._bulk.get(np.dtype(dtype))
        if inner is None:
            inner = self._bulk[np.dtype(dtype)] = self.raw_encoder(np.dtype(dtype))
        if all(token.special for token in self.added.values()):
            return inner
        return _SplitEncoder(self, inner)

    def encode_regions(
        self,
        regions: Sequence[Region],
        *,
        threads: int = 1,
        encoder: PackedEncoder | None = None,
    ) -> list[RegionIds]:
        plans = [self._cutter.cut(region.parts) for region in regions]
        starts = [region.start for region in regions]
        return self._encode_plans(plans, starts, threads, encoder)

    def _encode_marked(self, text: str) -> list[int]:
        return self._encode_plans([self._cutter.cut([text], special=True)], ["begin"])[0].ids

    def _encode_plans(
        self,
        plans: Sequence[Sequence[Cut]],
        starts: Sequence[Start],
        threads: int = 1,
        encoder: PackedEncoder | None = None,
    ) -> list[RegionIds]:
        texts: list[str] = []
        bare: list[bool] = []
        for plan, start in zip(plans, starts, strict=True):
            for index, cut in enumerate(plan):
                if cut.token_id is None:
                    texts.append(cut.text)
                    bare.append(self._is_bare("token" if index else start))
        if isinstance(encoder, _SplitEncoder):
            encoder = encoder.inner
        if encoder is None:
            rows = self.encode_raw(texts, bare, threads) if texts else []
        else:
            rows = packed_rows(*encoder.encode(texts, bare))
        return _joined(plans, iter(rows))

    def _is_bare(self, start: Start) -> bool:
        if start == "begin":
            return self.prefix == NEVER
        return start == "bare" or self.prefix != ALWAYS


def _joined(plans: Sequence[Sequence[Cut]], rows: Iterator[list[int]]) -> list[RegionIds]:
    """Plans with the ids of their texts, which come from `rows`."""
    regions = []
    for plan in plans:
        ids: list[int] = []
        marks: list[int] = []
        for cut in plan:
            if cut.given:
                marks.append(len(ids))
            ids += next(rows) if cut.token_id is None else [cut.token_id]
        regions.append(RegionIds(ids, marks))
    return regions


class _SplitEncoder(PackedEncoder):
    """Cuts texts at added tokens and gives what lies between to another encoder."""

    def __init__(self, tokenizer: SplitTokenizer, inner: PackedEncoder) -> None:
        self.dtype = inner.dtype
        self.inner = inner
        self._tokenizer = tokenizer

    def encode(
        self, texts: Sequence[str], bare: Sequence[bool] | None = None
    ) -> tuple[NDArray[Any], Ints]:
        starts: list[Start] = ["bare" if one else "begin" for one in bare or [False] * len(texts)]
        regions = [Region((text,), start) for text, start in zip(texts, starts, strict=True)]
        rows = [row.ids for row in self._tokenizer.encode_regions(regions, encoder=self.inner)]
        sizes = np.fromiter(map(len, rows), np.int64, count=len(rows))
        ids = np.fromiter(chain.from_iterable(rows), self.dtype, count=int(sizes.sum()))
        return ids, sizes
