"""Instruction data as training samples: what to read, and what of it is to be learnt.

train = InstructDataset.from_examples(read_examples(["train.json"]), tokenizer)
rows = PackedDataset(train, max_length=2048)
batch = collate([rows[0], rows[1]], pad_id=tokenizer.pad_id or 0)
"""

import hashlib
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from common.errors import DataError, check_integer
from data.conversations.chat_encoding import (
    ConversationEncoder,
    Encoded,
    Named,
    encode_all,
    up_to_last_learnt,
)
from data.conversations.instruct import Example
from data.conversations.packing import IGNORED, PackedDataset, Sample, collate
from data.order import Passes
from data.tokenization.chat import Message
from data.tokenizer import Tokenizer

__all__ = [
    "IGNORED",
    "InstructDataset",
    "Limits",
    "PackedDataset",
    "Passes",
    "Sample",
    "collate",
]

logger = logging.getLogger(__name__)

OnLong = Literal["error", "truncate", "skip"]


@dataclass(frozen=True)
class Limits:
    """How long an example may be, in tokens; None for no limit.

    Attributes:
        src_length: everything before the last answer: what serving would be given.
        tgt_length: the last answer with the token that ends it.
        max_length: both together; the answer gets what the prompt leaves.
        on_long: what happens to a longer one. "error": nothing is used; "skip": it is left out,
            counted and logged; "truncate": turns are left out of a conversation from the oldest
            on (a system message stays), then the prompt loses its beginning except BOS; the
            answer loses its end, and with it the token that ends it.
    """

    src_length: int | None = None
    tgt_length: int | None = None
    on_long: OnLong = "error"
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("src_length", 1), ("tgt_length", 1), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None:
                check_integer(name, value, least=least)
        if self.on_long not in ("error", "truncate", "skip"):
            raise DataError(f"on_long must be error, truncate or skip, got {self.on_long!r}")

    def flag(self, part: str) -> str:
        """The name of the limit of a "prompt" or an "answer"."""
        name = "src_length" if part == "prompt" else "tgt_length"
        return "max_length" if getattr(self, name) is None else name

    def excess(self, encoded: Encoded) -> tuple[int, int]:
        """Tokens by which the prompt and the last answer are too long (0 where they are not)."""
        answer = len(encoded.ids) - encoded.prompt
        source = encoded.prompt if self.src_length is None else self.src_length
        target = answer if self.tgt_length is None else self.tgt_length
        if self.max_length is not None:
            source = min(source, self.max_length - 1)
            target = min(target, self.max_length - min(encoded.prompt, source))
        return max(encoded.prompt - source, 0), max(answer - target, 0)


class InstructDataset:
    """Examples as samples; `dataset[i]` is {"input_ids", "labels"}, both int64 [S].

    Labels are shifted already (`labels[t]` is the token after `input_ids[t]`) and -100 wherever
    the token is not the assistant's. An example of n tokens gives S = n - 1.

    Attributes:
        lengths: S of each sample, int64 [N].
        label_counts: labels of each sample that are not -100, int64 [N].
        examples: the conversations, one a sample.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        mask: NDArray[Any],
        starts: NDArray[np.int64],
        *,
        examples: Sequence[Example],
        tokenizer: Tokenizer,
    ) -> None:
        if len(starts) < 2:
            raise DataError("there is no example to train on")
        self._tokens = tokens
        self._mask = mask
        self._starts = starts
        self.examples = examples
        self.tokenizer = tokenizer
        self.lengths: NDArray[np.int64] = np.diff(starts) - 1
        self.label_counts: NDArray[np.int64] = np.add.reduceat(mask, starts[:-1], dtype=np.int64)

    @classmethod
    def from_examples(
        cls,
        examples: Sequence[Example],
        tokenizer: Tokenizer,
        *,
        limits: Limits | None = None,
        bad: list[str] | None = None,
    ) -> "InstructDataset":
        """Encode examples with the tokenizer and its chat template.

        Where `bad` is a list, it takes the examples that the template refuses.

        Raises:
            DataError: a template that cannot be trained with, an example that it refuses (by
                name), or examples too long, with how many and the longest.
        """
        encoder = ConversationEncoder(tokenizer)
        kept, encoded = encode_examples(encoder, examples, limits or Limits(), bad)
        return cls.from_encoded(encoded, kept, tokenizer)

    @classmethod
    def from_encoded(
        cls, encoded: Sequence[Encoded], examples: Sequence[Example], tokenizer: Tokenizer
    ) -> "InstructDataset":
        """A dataset of examples that are encoded already."""
        tokens, mask, starts = flatten(encoded)
        return cls(tokens, mask, starts, examples=examples, tokenizer=tokenizer)

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """All ids of an example, [n], and which of them are to be learnt, bool [n]."""
        check_integer("index", index, least=0, most=len(self) - 1)
        start, stop = self._starts[index], self._starts[index + 1]
        return self._tokens[start:stop], self._mask[start:stop]

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        ids, mask = self.document(int(index) % len(self))
        ids = ids.astype(np.int64)
        return {"input_ids": ids[:-1], "labels": np.where(mask[1:], ids[1:], IGNORED)}

    def prompt_ids(self, index: int) -> list[int]:
        """The ids before the last answer: what serving would be given for this example."""
        ids, mask = self.document(index)
        learnt = np.flatnonzero(mask)
        # The last run of labels is the last answer.
        gaps = np.flatnonzero(np.diff(learnt) > 1)
        first = learnt[gaps[-1] + 1] if len(gaps) else learnt[0]
        prompt: list[int] = ids[:first].tolist()
        return prompt

    def answers(self, index: int) -> tuple[str, ...]:
        """What counts as right, for scoring."""
        return self.examples[index].answers

    def fingerprint(self) -> str:
        """sha256 (hex) of the tokens, of what is learnt, of the tokenizer and of its template.

        Two datasets with the same fingerprint give the same samples.
        """
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        digest.update((self.tokenizer.chat_template or "").encode())
        digest.update(self._starts.astype("<i8").tobytes())
        digest.update(np.ascontiguousarray(self._tokens, "<i4").tobytes())
        digest.update(np.packbits(np.asarray(self._mask, bool)).tobytes())
        return digest.hexdigest()


def encode_examples(
    encoder: ConversationEncoder,
    examples: Sequence[Example],
    limits: Limits,
    bad: list[str] | None = None,
) -> tuple[list[Example], list[Encoded]]:
    """The examples that are used, and their ids, within the limits; `bad` as `from_examples`."""
    kept: list[Example] = []
    encoded: list[Encoded] = []
    long = _Long(limits, len(examples))
    conversations = [Named(item.name, item.messages, item.tools) for item in examples]
    rows = itertools.chain.from_iterable(encode_all(encoder, conversations))
    bar = tqdm(rows, "tokenizing", len(examples), unit="ex", disable=None, leave=False)
    for example, row in zip(examples, bar, strict=True):
        if isinstance(row, DataError):
            if bad is None:
                raise row
            bad.append(str(row))
            continue
        fitted: Encoded | None = row
        if any(limits.excess(row)):
            long.add(example, row)
            fitted = shortened(encoder, example, row, limits)
        if fitted is not None:
            kept.append(example)
            encoded.append(fitted)
    long.report()
    if bad and not kept:
        raise DataError(f"no usable example of {len(examples)}; {len(bad)} bad, e.g. {bad[0]}")
    if not kept:
        raise DataError(f"no example is left of {len(examples)}: all are too long")
    return kept, encoded


class _Long:
    """Counts the examples that are too long."""

    def __init__(self, limits: Limits, total: int) -> None:
        self.limits = limits
        self.total = total
        self.count = 0
        # Count, longest and its name, of prompts and of answers.
        self.worst: dict[str, tuple[int, int, str]] = {}

    def add(self, example: Example, encoded: Encoded) -> None:
        self.count += 1
        sizes = (encoded.prompt, len(encoded.ids) - encoded.prompt)
        names = ("prompt", "answer")
        for what, size, excess in zip(names, sizes, self.limits.excess(encoded), strict=True):
            if excess:
                count, largest, name = self.worst.get(what, (0, 0, ""))
                largest, name = max((largest, name), (size, example.name), key=lambda at: at[0])
                self.worst[what] = (count + 1, largest, name)

    def report(self) -> None:
        """`DataError` or a line in the log, as `on_long` says; nothing where none is long."""
        if not self.count:
            return
        flags = {what: self.limits.flag(what) for what in self.worst}
        details = "; ".join(
            f"{count} have {'an' if what == 'answer' else 'a'} {what} above "
            f"{flags[what]}={getattr(self.limits, flags[what])}, the longest of {largest} tokens "
            f"({name})"
            for what, (count, largest, name) in self.worst.items()
        )
        found = f"{self.count} of {self.total} examples are too long: {details}"
        if self.limits.on_long == "error":
            raise DataError(
                f"{found}. Raise {' and '.join(dict.fromkeys(flags.values()))}, or say "
                "on_long=truncate (cut them) or on_long=skip (leave them out)"
            )
        done = "cut" if self.limits.on_long == "truncate" else "left out"
        logger.warning("%s. They were %s", found, done)


def shortened(
    encoder: ConversationEncoder, example: Example, encoded: Encoded, limits: Limits
) -> Encoded | None:
    """`encoded` cut to the limits; None where long ones are skipped (or are an error later)."""
    if limits.on_long != "truncate":
        return None
    messages = list(up_to_last_learnt(example.messages))
    while limits.excess(encoded)[0] and (fewer := _without_oldest_turn(messages)):
        messages = fewer
        encoded = encoder.encode(messages, example.tools)
    too_much, too_long = limits.excess(encoded)
    if too_much:
        bos = int(encoded.ids[0] == encoder.tokenizer.bos_id)
        kept = np.r_[:bos, bos + too_much : len(encoded.ids)]
        encoded = Encoded(encoded.ids[kept], encoded.labels[kept], encoded.prompt - too_much)
    if too_long:
        stop = len(encoded.ids) - too_long
        encoded = replace(encoded, ids=encoded.ids[:stop], labels=encoded.labels[:stop])
    return encoded


def _without_oldest_turn(messages: list[Message]) -> list[Message]:
    """Messages without the oldest question and what answers it; [] where only one is left."""
    begin = int(messages[0]["role"] == "system")
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    later = [i for i in questions if i > begin]
    return [*messages[:begin], *messages[later[0] :]] if later else []


def flatten(encoded: Sequence[Encoded]) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]:
    """Tokens int32 [T], mask bool [T] and starts int64 [N + 1] of examples laid end to end."""
    sizes = np.fromiter((len(item.ids) for item in encoded), np.int64, count=len(encoded))
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    tokens = np.concatenate([item.ids for item in encoded])
    mask = np.concatenate([item.labels for item in encoded])
    # Nothing predicts the first token.
    mask[starts[:-1]] = False
    return tokens, mask, starts
