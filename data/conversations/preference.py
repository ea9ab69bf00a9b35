"""Preference pairs: a prompt with the better and the worse answer.

The layout is TRL's {prompt, chosen, rejected}: strings, or lists of messages. Without a prompt,
chosen and rejected are whole conversations and what they have in common is the prompt. PaddleNLP's
{src, tgt, response, sort} is read too: `src` has a question more than `tgt` has answers, and of the
two `response`s the one with the larger `sort` is the better.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from data.conversations.chat_encoding import ConversationEncoder, Encoded
from data.conversations.instruct import Example, OnBad, bad_list, converted, report_bad
from data.conversations.instruct_dataset import InstructDataset, Limits, encode_examples
from data.conversations.instruct_formats import (
    SYSTEM,
    is_empty,
    message_turns,
    sharegpt_turns,
    with_system,
)
from data.conversations.packing import Sample, collate
from data.conversations.record_files import Record, find_files, text_of
from data.conversations.record_keys import (
    MARKS,
    Tool,
    Turn,
    note_keys,
    report_ignored,
    tools_of,
)
from data.tokenizer import Tokenizer

__all__ = ["Pair", "PreferenceDataset", "collate_preference", "read_pairs"]

Turns = tuple[Turn, ...]
SORTED = {"src", "tgt", "response", "sort"}
KEYS = {"prompt", "conversations", "chosen", "rejected", *SORTED, *SYSTEM}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """Two conversations that differ in their last answer.

    Attributes:
        chosen, rejected: the messages of each, the prompt's included.
        name: where it is from, for messages: "file:line".
        tools: what the assistant may call, for the chat template.
    """

    chosen: Turns
    rejected: Turns
    name: str
    tools: tuple[Tool, ...] = ()


def read_pairs(paths: Sequence[str | Path], *, on_bad: OnBad = "error") -> list[Pair]:
    """Every pair of the files (JSON lines, JSON array, CSV, Parquet), in order.

    `on_bad` "skip" leaves records out that are no pair, and logs how many and which.

    Raises:
        DataError: a file that cannot be read, or a record that is no pair, by file and line.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    bad = bad_list(on_bad)
    ignored: Counter[str] = Counter()

    def pair(record: Record, name: str) -> Pair:
        _check_keys(record)
        note_keys(record, KEYS, ignored)
        return _pair(record, name)

    pairs = [item for path in find_files(paths) for item in converted(path, pair, bad=bad)]
    if not pairs:
        left_out = f"; {len(bad)} bad records, the first: {bad[0]}" if bad else ""
        raise DataError(f"no preference pair in {', '.join(map(str, paths))}{left_out}")
    report_ignored(ignored)
    report_bad(bad)
    return pairs


def _check_keys(record: Record) -> None:
    """Refuse a record that is of other data, before a key that only pairs have not is named."""
    missing = [key for key in ("chosen", "rejected") if record.get(key) is None]
    if missing and not _is_sorted(record):
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise DataError(
            f"no {missing[0]!r} (its keys: {keys}): a preference pair, which dpo learns from, has "
            "prompt, chosen, rejected"
        )


def _pair(record: Record, name: str) -> Pair:
    if _is_sorted(record):
        record = _unsorted(record)
    prompt = _prompt(record)
    chosen, rejected = (
        tuple(with_system(record, _answer(record, key, prompt))) for key in ("chosen", "rejected")
    )
    if chosen == rejected:
        raise DataError("chosen and rejected are the same: there is nothing to prefer")
    for what, turns in (("chosen", chosen), ("rejected", rejected)):
        _check(what, turns)
    if chosen[:-1] != rejected[:-1]:
        raise DataError(
            "chosen and rejected differ before their last answer: a pair is two answers to one "
            "prompt"
        )
    return Pair(chosen, rejected, name, tools_of(record))


def _is_sorted(record: Record) -> bool:
    """Whether a record is meant as PaddleNLP's; elsewhere "response" is one answer."""
    return "sort" in record or isinstance(record.get("response"), list)


def _unsorted(record: Record) -> Record:
    """A record of PaddleNLP's as {prompt, chosen, rejected}."""
    if twice := sorted({"prompt", "conversations", "chosen", "rejected"} & record.keys()):
        raise DataError(f"it has answers twice: under 'response' and under {twice[0]!r}")
    questions, answers = (_texts(record, key) for key in ("src", "tgt"))
    if len(questions) != len(answers) + 1:
        raise DataError(
            f"'src' has {len(questions)} texts and 'tgt' {len(answers)}: of a preference pair "
            "'src' has one more, to which the two responses are answers"
        )
    responses, sort = _texts(record, "response"), record.get("sort")
    if len(responses) != 2 or not isinstance(sort, list) or len(sort) != 2:
        raise DataError("'response' and 'sort' have to be lists of two")
    if any(isinstance(one, bool) or not isinstance(one, int | float) for one in sort):
        raise DataError(f"'sort' has to be two numbers, not {sort!r:.40}")
    if sort[0] == sort[1]:
        raise DataError(f"'sort' is {sort[0]} for both: nothing says which response is better")
    better = int(sort[1] > sort[0])
    turns: list[Turn] = []
    for number, question in enumerate(questions):
        turns.append({"role": "user", "content": question})
        if number < len(answers):
            turns.append({"role": "assistant", "content": answers[number]})
    rest = {key: value for key, value in record.items() if key not in SORTED}
    pair = {"prompt": turns, "chosen": responses[better], "rejected": responses[1 - better]}
    return {**rest, **pair}


def _texts(record: Record, key: str) -> list[str]:
    value = record.get(key, [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{key!r} has to be a text or a list of texts, not {value!r:.40}")
    return texts


def _prompt(record: Record) -> Turns:
    keys = [key for key in ("prompt", "conversations") if record.get(key) not in (None, [])]
    if len(keys) > 1:
        raise DataError("it has a prompt twice: under 'prompt' and under 'conversations'")
    if not keys:
        return ()
    turns = _turns(record[keys[0]], keys[0])
    if turns is None:
        text = text_of(record, keys[0])
        if not text.strip():
            raise DataError("the prompt is empty")
        turns = ({"role": "user", "content": text},)
    return turns


def _answer(record: Record, key: str, prompt: Turns) -> Turns:
    """The whole conversation that ends with this answer."""
    turns = _turns(record[key], key)
    if turns is None:
        if not prompt:
            raise DataError(f"there is no 'prompt', and {key!r} is a string, which has none in it")
        turns = ({"role": "assistant", "content": text_of(record, key)},)
    return _joined(prompt, turns, key)


def _joined(prompt: Turns, turns: Turns, key: str) -> Turns:
    """The prompt with what follows it in `turns`, which may repeat all of it or its end.

    Some files repeat it without its system message, or with other white space at its ends.
    """
    if prompt and turns[:1] and turns[0]["role"] == "system":
        if prompt[0]["role"] != "system":
            prompt = (turns[0], *prompt)
        elif not _same(prompt[0], turns[0]):
            raise DataError(f"{key} has another system message than the prompt")
        turns = turns[1:]
    for count in range(min(len(prompt), len(turns) - 1), 0, -1):
        if all(map(_same, prompt[-count:], turns[:count])):
            return (*prompt, *turns[count:])
    if prompt and turns and turns[0]["role"] == "user" == prompt[-1]["role"]:
        raise DataError(f"{key} begins with a user's turn that is not the prompt's last one")
    return (*prompt, *turns)


def _same(left: Turn, right: Turn) -> bool:
    def bare(turn: Turn) -> Turn:
        return {**turn, "content": (turn["content"] or "").strip()}

    return bare(left) == bare(right)


def _turns(value: Any, key: str) -> Turns | None:
    """Messages of a list of them or of a single one; None for anything else."""
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list):
        return None
    try:
        if items and isinstance(items[0], dict) and "from" in items[0]:
            return tuple(sharegpt_turns(items))
        return tuple(message_turns(items))
    except DataError as error:
        raise DataError(f"{key}: {error}") from None


def _check(what: str, turns: Turns) -> None:
    if not turns or turns[-1]["role"] != "assistant":
        last = turns[-1]["role"] if turns else "none"
        raise DataError(f"{what} has to end with the assistant's turn, not {last}")
    if len(turns) < 2:
        raise DataError(f"{what} is an answer without a prompt")
    if is_empty(turns[-1]):
        raise DataError(f"{what} is an empty answer")
    if turns[-1].get("weight") == 0:
        raise DataError(
            f"the answer of {what} is marked as not learnt ({'/'.join(MARKS)}): a pair compares "
            "both of its answers, so leave it out or drop the mark"
        )


class PreferenceDataset:
    """Pairs as samples; `dataset[i]` holds "chosen_ids", "chosen_labels", "rejected_ids" and
    "rejected_labels", int64 [S] each, as `InstructDataset` makes ids and labels.

    Labels are shifted and are -100 except for the last answer and the token that ends it.

    Attributes:
        pairs: one a sample.
        lengths: S of the longer of the two, int64 [N].
        label_counts: labels of both together, int64 [N].
        token_counts: tokens of both together, int64 [N].
        chosen, rejected: the two sides as datasets of their own.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokenizer: Tokenizer,
        *,
        limits: Limits | None = None,
        on_bad: OnBad = "error",
    ) -> None:
        """Encode pairs with the tokenizer and its chat template; lengths as `Limits` says.

        Pairs whose sides are the same ids are left out, and logged, where they were cut to that
        (`on_long` "truncate") or `on_bad` is "skip"; so are pairs then that the template refuses.

        Raises:
            DataError: a template that cannot be trained with, a pair that it refuses (by name),
                pairs too long, two sides that are the same ids, or no pair left.
        """
        encoder = ConversationEncoder(tokenizer, last_only=True)
        bad = bad_list(on_bad)
        sides = [
            dict(zip(*_encode_side(encoder, pairs, side, limits or Limits(), bad), strict=True))
            for side in ("chosen", "rejected")
        ]
        report_bad(bad)
        # A pair of which one side was skipped is skipped.
        kept = [at for at in sides[0] if at in sides[1]]
        if not kept:
            raise DataError(f"no pair is left of {len(pairs)}: all are too long")
        cut = limits is not None and limits.on_long == "truncate"
        kept = _different(pairs, sides, kept, refuse=not cut and bad is None)
        self.pairs = [pairs[at] for at in kept]
        self.tokenizer = tokenizer
        self.chosen, self.rejected = (
            InstructDataset.from_encoded(
                [side[at] for at in kept], [_example(pairs[at], name) for at in kept], tokenizer
            )
            for side, name in zip(sides, ("chosen", "rejected"), strict=True)
        )
        self.lengths: NDArray[np.int64] = np.maximum(self.chosen.lengths, self.rejected.lengths)
        self.label_counts: NDArray[np.int64] = self.chosen.label_counts + self.rejected.label_counts
        self.token_counts: NDArray[np.int64] = self.chosen.lengths + self.rejected.lengths

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        chosen, rejected = self.chosen[index], self.rejected[index]
        return {
            "chosen_ids": chosen["input_ids"],
            "chosen_labels": chosen["labels"],
            "rejected_ids": rejected["input_ids"],
            "rejected_labels": rejected["labels"],
        }

    def prompt_ids(self, index: int) -> list[int]:
        """The ids before the answers: what serving would be given."""
        return self.chosen.prompt_ids(index)

    def fingerprint(self) -> str:
        """Identifies tokens, labels, tokenizer and template of both sides."""
        return f"{self.chosen.fingerprint()}-{self.rejected.fingerprint()}"


def _example(pair: Pair, side: str) -> Example:
    turns: Turns = getattr(pair, side)
    return Example(turns, (turns[-1]["content"] or "",), f"{pair.name} ({side})", pair.tools)


def _different(
    pairs: Sequence[Pair], sides: Sequence[dict[int, Encoded]], kept: list[int], *, refuse: bool
) -> list[int]:
    """Those of `kept` whose answers differ as ids: the gradient of others is noise, which AdamW
    scales up.
    """
    chosen, rejected = sides
    same = [at for at in kept if np.array_equal(chosen[at].ids, rejected[at].ids)]
    if not same:
        return kept
    found = (
        f"{len(same)} of {len(kept)} pairs are the same ids on both sides, as the chat template "
        f"and the limits leave them ({pairs[same[0]].name})"
    )
    if refuse or len(same) == len(kept):
        raise DataError(f"{found}: leave them out, or raise tgt_length where it cuts them")
    logger.warning("%s. They were left out", found)
    equal = set(same)
    return [at for at in kept if at not in equal]


def _encode_side(
    encoder: ConversationEncoder,
    pairs: Sequence[Pair],
    side: str,
    limits: Limits,
    bad: list[str] | None,
) -> tuple[list[int], list[Encoded]]:
    """Indices of the pairs whose `side` is used, and its ids."""
    examples = [_example(pair, side) for pair in pairs]
    at = {id(example): index for index, example in enumerate(examples)}
    kept, encoded = encode_examples(encoder, examples, limits, bad)
    return [at[id(example)] for example in kept], encoded


def collate_preference(
    samples: Sequence[Sample], *, pad_id: int = 0, multiple_of: int = 8
) -> dict[str, NDArray[np.int64]]:
    """A batch of B pairs as {"input_ids" [2B, S], "labels" [2B, S]}: the B chosen answers first,
    then the B rejected ones in the same order; padded as `collate` does.
    """
    rows = [
        {"input_ids": sample[f"{side}_ids"], "labels": sample[f"{side}_labels"]}
        for side in ("chosen", "rejected")
        for sample in samples
    ]
    return collate(rows, pad_id=pad_id, multiple_of=multiple_of)
