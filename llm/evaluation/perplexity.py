"""Perplexity over a sliding window, per token, word and byte."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import UserError
from llm.evaluation.scorer import Row, Scorer


@dataclass(frozen=True)
class Document:
    """Ids of one text, and its size before any change to it (0 where that is unknown)."""

    ids: np.ndarray
    words: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Perplexity:
    """Total log-likelihood and what it is divided by."""

    logprob: float  # natural logarithm
    tokens: int  # scored: the first of each document has nothing to be predicted from
    words: int
    bytes: int

    @property
    def token_perplexity(self) -> float:
        """``exp`` of the mean negative log-likelihood per scored token."""
        return _exp(-self.logprob / self.tokens)

    def figures(self) -> dict[str, float]:
        """Return what is known, by name; word and byte figures as lm-evaluation-harness has."""
        known = {"token_perplexity": self.token_perplexity}
        if self.words and self.bytes:
            known["word_perplexity"] = _exp(-self.logprob / self.words)
            known["byte_perplexity"] = _exp(-self.logprob / self.bytes)
            known["bits_per_byte"] = -self.logprob / self.bytes / math.log(2)
        counts = {"tokens": self.tokens, "words": self.words, "bytes": self.bytes}
        return known | {name: count for name, count in counts.items() if count}


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf  # beyond that, float64 overflows


def sliding_rows(ids: np.ndarray, max_length: int, stride: int) -> list[Row]:
    """Cut a text into windows in which every token but the first is predicted exactly once.

    Window ``k`` starts at token ``k * stride``, takes up to ``max_length`` tokens in and predicts
    those that no earlier window did, so all but the first window give each token at least
    ``max_length - stride`` tokens of context. ``stride = max_length`` is disjoint windows. It is
    the loop of Hugging Face's "Perplexity of fixed-length models" for a ``max_length`` of one
    more: there, the last token of a window counts but is never an input.
    """
    rows = []
    done = 0  # the last token that has been predicted
    for start in range(0, len(ids) - 1, stride):
        end = min(start + max_length, len(ids) - 1)
        rows.append(Row(ids[start:end], ids[done + 1 : end + 1]))
        done = end
        if end == len(ids) - 1:
            break
    return rows


def perplexity(
    scorer: Scorer,
    documents: Sequence[Document],
    *,
    stride: int | None = None,
    max_length: int | None = None,
) -> Perplexity:
    """Score documents, each by itself.

    Args:
        scorer: of the model.
        documents: ids with the sizes of their texts.
        stride: tokens between the starts of windows; ``max_length`` when not given.
        max_length: tokens that go in per window; the scorer's when not given.

    Raises:
        UserError: a stride beyond the window, a window beyond the context, no document with two
            tokens, or ids beyond the vocabulary.
    """
    length = max_length or scorer.max_length
    step = stride or length
    if length > scorer.max_length:
        raise UserError(
            f"max_length={length} exceeds the model's context of {scorer.max_length} tokens"
        )
    if not 1 <= step <= length:
        raise UserError(
            f"stride={step} has to be between 1 and max_length={length}: tokens between windows "
            "would never be scored"
        )
    rows = [
        row
        for document in documents
        for row in sliding_rows(np.asarray(document.ids, dtype=np.int64), length, step)
    ]
    if not rows:
        longest = max((len(document.ids) for document in documents), default=0)
        raise UserError(f"{longest} tokens are too few for a perplexity; two are the least")
    scores = scorer.score_rows(rows, "perplexity")
    return Perplexity(
        logprob=math.fsum(score.logprob for score in scores),
        tokens=sum(len(row.targets) for row in rows),
        words=sum(document.words for document in documents),
        bytes=sum(document.bytes for document in documents),
    )
