"""Conversations as token ids with a mask of what is to be learnt.

A conversation is cut where serving would cut it: the ids before an answer are those of
`apply_chat_template(messages before it, add_generation_prompt=True)`, and the answer with what
the template puts after it is encoded on its own, since that is what the model will generate.
Control tokens come from the template alone, never from the messages.
"""

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.ending import starting_workers, work_for_parent
from common.errors import DataError
from data.conversations.record_keys import (
    REASONING,
    Tool,
    is_learnt,
    last_learnt,
    strings,
    tool_name,
)
from data.crashes import find_crash
from data.tokenization.added_tokens import Region, RegionIds, Start
from data.tokenization.batch import available_cores, check_workers
from data.tokenization.chat import Message, check_messages, render, seal
from data.tokenization.fence import check_text
from data.tokenization.packed import PackedEncoder, PlainEncoder
from data.tokenizer import Tokenizer


class Named(NamedTuple):
    """A conversation with its name for messages."""

    name: str
    messages: Sequence[Message]
    tools: Sequence[Tool] = ()


# Conversations and characters encoded together: enough to be fast, and a signal, which waits for
# the groups that processes have been given, waits a second or so.
GROUP = 128
GROUP_CHARACTERS = 300_000
# Characters a process should get at least: below this, starting it costs more than it saves.
WORTH_A_PROCESS = 3_000_000
_PLACE = ": use a template that renders all of it, or leave it out"


@dataclass(frozen=True)
class Encoded:
    """A conversation up to its last label.

    Attributes:
        ids: token ids, int32 [n].
        labels: which of them are to be learnt, bool [n].
        prompt: ids before the last answer.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.bool_]
    prompt: int


@dataclass(frozen=True)
class _Span:
    """Part of a rendering: the prompt, or an answer with what follows up to the next one.

    Attributes:
        region: its texts and control tokens.
        end: which of the region's control tokens ends the answer; -1 in the prompt.
        learnt: whether the answer is.
    """

    region: Region
    end: int = -1
    learnt: bool = False


class ConversationEncoder:
    """Encodes conversations with a tokenizer and its chat template.

    Args:
        tokenizer: with a chat template.
        last_only: whether only the last answer is to be learnt, instead of all.

    Raises:
        DataError: no template, or one that cannot tell what the assistant says.
    """

    def __init__(self, tokenizer: Tokenizer, *, last_only: bool = False) -> None:
        self.tokenizer = tokenizer
        self.last_only = last_only
        self._pattern = tokenizer.special_pattern
        tokenizer.require_template()
        self._bulk: PackedEncoder | None = None
        self._characters = 0
        probe = [
            {"role": "user", "content": "Question"},
            {"role": "assistant", "content": "Answer"},
        ]
        try:
            self._spans(probe)
        except DataError as error:
            raise DataError(f"the chat template cannot be trained with: {error}") from None

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Encoded:
        """One conversation, the last message of which is the assistant's.

        It ends with the last answer that is learnt, which those marked "weight": 0 are not.

        Raises:
            DataError: the template refuses it, leaves part of it out, does not end answers, or
                writes the same messages differently when others follow.
        """
        return self.encode_many([Named("", messages, tools)])[0]

    def encode_named(self, conversation: Named) -> list[Encoded | DataError]:
        """`try_many` of one alone, on one core."""
        return self.try_many([conversation], workers=1)

    def encode_many(
        self, conversations: Sequence[Named], *, workers: int | None = None
    ) -> list[Encoded]:
        """All of them; the texts are encoded together, on `workers` cores or all.

        Raises:
            DataError: as `encode`, with the conversation's name before the message.
        """
        encoded = []
        for row in self.try_many(conversations, workers=workers):
            if isinstance(row, DataError):
                raise row
            encoded.append(row)
        return encoded

    def try_many(
        self, conversations: Sequence[Named], *, workers: int | None = None
    ) -> list[Encoded | DataError]:
        """`encode_many`, with what it would raise in the places of the conversations."""
        plans: list[list[_Span] | DataError] = []
        for name, messages, tools in conversations:
            try:
                plans.append(self._spans(messages, tools))
            except DataError as error:
                plans.append(DataError(f"{name}: {error}" if name else str(error)))
        good = [plan for plan in plans if not isinstance(plan, DataError)]
        regions = [span.region for plan in good for span in plan]
        try:
            rows = iter(self._encode_regions(regions, workers))
        except DataError as error:
            if len(conversations) > 1:
                alone = [self.try_many([one], workers=workers) for one in conversations]
                return [row for (row,) in alone]
            name = conversations[0].name
            return [DataError(f"{name}: {error}" if name else str(error))]
        return [plan if isinstance(plan, DataError) else _assemble(plan, rows) for plan in plans]

    def _encode_regions(self, regions: Sequence[Region], workers: int | None) -> list[RegionIds]:
        # An encoder in bulk pays over many groups, so it is made once and kept.
        texts = (part for one in regions for part in one.parts if isinstance(part, str))
        self._characters += sum(map(len, texts))
        if self._bulk is None:
            found = self.tokenizer.packed_encoder(np.int32, self._characters)
            self._bulk = None if isinstance(found, PlainEncoder) else found
        threads = check_workers(workers)
        return self.tokenizer.encode_regions(regions, threads=threads, encoder=self._bulk)

    # Rendering

    def _answers(
        self, messages: Sequence[Any], tools: Sequence[Tool]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendering up to the last answer, and where in it each answer lies."""
        text = ""
        answers: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], tools, prompt=True)
            after = self._render(messages[: index + 1], tools, prompt=False)
            for shorter, longer in ((text, before), (before, after)):
                if not longer.startswith(shorter):
                    raise DataError(_not_a_prefix(shorter, longer, index))
            if _text(message) not in after[len(before) :]:
                raise DataError(f"the template leaves out the assistant's text (turn {index + 1})")
            self._check_extras(messages[: index + 1], tools, after, len(before))
            text = after
            answers.append((len(before), len(after)))
        if not answers:
            raise DataError("no turn is the assistant's, so there is nothing to learn")
        for index, message in enumerate(messages[:-1]):
            # Llama 3.1's template writes what tools say as JSON strings.
            if not _stands(_text(message), text):
                raise DataError(
                    f"the template leaves out what the {message['role']} says (turn {index + 1})"
                )
        return text, answers

    def _check_extras(
        self, messages: Sequence[Any], tools: Sequence[Tool], text: str, begin: int
    ) -> None:
        """`DataError` where the rendering of what a last answer has beside its text lacks it."""
        message, turn = messages[-1], len(messages)
        for key in ("tool_calls", *REASONING):
            if key not in message:
                continue
            without = {name: value for name, value in message.items() if name != key}
            without["content"] = without["content"] or ""
            bare = self._render([*messages[:-1], without], tools, prompt=False)
            missing = [part for part in _said(message[key]) if not _stands(part, text[begin:])]
            if missing or bare == text:
                raise DataError(f"{_lost(missing, bare == text)} {key!r} (turn {turn}){_PLACE}")
        if message["content"] is None:
            empty = self._render([*messages[:-1], {**message, "content": ""}], tools, prompt=False)
            if text.count("None") > empty.count("None"):
                raise DataError(
                    f"the chat template writes 'None' for content that is null (turn {turn}): give "
                    'it "content": ""'
                )

    def _check_tools(self, messages: Sequence[Any], tools: Sequence[Tool], text: str) -> None:
        names = [str(tool_name(tool)) for tool in tools]
        missing = [name for name in names if name not in text]
        alike = self._render(messages, (), prompt=False) == text
        if missing or alike:
            raise DataError(f"{_lost(missing, alike)} the record's tools{_PLACE}")

    def _end_of_answer(self, parts: Sequence[str | int], length: int) -> int:
        """Which control token of an answer's parts, of which `length` are its own, ends it."""
        controls = [part for part in parts[:length] if isinstance(part, int)]
        ends = [n for n, token_id in enumerate(controls) if token_id in self.tokenizer.eos_ids]
        if ends:
            return ends[-1]
        text = "".join(self._spelled(part) for part in parts[:length])
        fix = "use a template that ends answers with eos_token"
        if controls:
            fix = (
                f"add {controls[-1]}, the id of {self._spelled(controls[-1])}, to eos_token_id in "
                f"the model's generation_config.json, or {fix}"
            )
        raise DataError(
            f"the template ends an answer with {text[-20:]!r}, in which no control token ends "
            f"a generation ({self.tokenizer.name} has {self._eos_texts()}): a model trained so "
            f"would never stop; {fix}"
        )

    def _spelled(self, part: str | int) -> str:
        return part if isinstance(part, str) else self.tokenizer.special_text[part]

    def _eos_texts(self) -> str:
        ids = self.tokenizer.eos_ids
        return ", ".join(self.tokenizer.special_text.get(i, str(i)) for i in ids) or "none"

    def _spans(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[_Span]:
        """The rendering cut where answers begin, with what is to be learnt marked."""
        check_messages(messages)
        messages = up_to_last_learnt(messages)
        marks = [is_learnt(message) for message in messages if message["role"] == "assistant"]
        rendered = [{k: v for k, v in turn.items() if k != "weight"} for turn in messages]
        (sealed, sealed_tools), mark = seal([rendered, list(tools)], self._pattern)
        text, answers = self._answers(sealed, sealed_tools)
        if sealed_tools:
            self._check_tools(sealed, sealed_tools, text)
        cuts = [*(start for start, _ in answers), len(text)]
        spans = [_Span(Region(self._parts(text[: cuts[0]], mark)))]
        for number, (start, stop) in enumerate(answers):
            own = self._parts(text[start:stop], mark)
            # What the template puts after it may go on in the same text.
            parts = self._parts(text[start : cuts[number + 1]], mark)
            last = number == len(answers) - 1
            spans.append(
                _Span(
                    Region(parts, self._start(spans[-1].region.parts, parts)),
                    end=self._end_of_answer(own, len(own)),
                    learnt=last if self.last_only else marks[number],
                )
            )
        return spans

    def _start(self, before: Sequence[str | int], parts: Sequence[str | int]) -> Start:
        """How an answer begins: after a control token, or going on from text."""
        if not before:
            return "begin"
        if isinstance(before[-1], str) and isinstance(parts[0], str):
            return self.tokenizer.start_after(parts[0], before[-1])
        return "token"

    def _parts(self, text: str, mark: str) -> tuple[str | int, ...]:
        check_text(text)
        return tuple(self.tokenizer.control_parts(text, mark))

    def _render(self, messages: Sequence[Any], tools: Sequence[Tool], *, prompt: bool) -> str:
        given = {"tools": list(tools)} if tools else {}
        variables = self.tokenizer.chat_variables(add_generation_prompt=prompt, **given)
        return render(self.tokenizer.require_template(tools=bool(tools)), messages, variables)


def _assemble(plan: Sequence[_Span], rows: Iterator[RegionIds]) -> Encoded:
    """Put a conversation together, taking the ids of its spans from `rows`."""
    ids: list[int] = []
    labels: list[bool] = []
    prompt = 0
    for span in plan:
        own, marks = next(rows)
        if span.end >= 0:
            prompt = len(ids)
        stop = marks[span.end] + 1 if span.end >= 0 else 0
        ids += own
        labels += [span.learnt] * stop + [False] * (len(own) - stop)
    # Nothing is learnt from what follows the last answer's end.
    end = len(labels) - labels[::-1].index(True)
    return Encoded(np.array(ids[:end], np.int32), np.array(labels[:end], bool), prompt)


def up_to_last_learnt(messages: Sequence[Message]) -> Sequence[Message]:
    """Without what follows the last answer that is learnt; all of it where there is none."""
    return messages[: last_learnt(messages) + 1] or messages


def _text(message: Message) -> str:
    return (message["content"] or "").strip()


def _said(value: Any) -> Iterator[str]:
    """Texts of calls or thoughts that have to stand in a rendering."""
    if isinstance(value, str):
        yield value.strip()
        return
    for call in value:
        function = call.get("function", call)
        yield function["name"]
        yield from strings(function["arguments"])


def _lost(missing: Sequence[str], alike: bool) -> str:
    what = "has no place for" if alike else f"leaves out {missing[0]!r:.60} of"
    return f"the chat template {what}"


def _stands(part: str, text: str) -> bool:
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


def _not_a_prefix(shorter: str, longer: str, index: int) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b),
        min(len(shorter), len(longer)),
    )
    return (
        f"the template writes the turns before turn {index + 1} differently when it follows: "
        f"{shorter[at : at + 30]!r} becomes {longer[at : at + 30]!r} at character {at}. What is "
        "trained would then not be what is served; use a template that only appends"
    )


def encode_all(
    encoder: ConversationEncoder, conversations: Sequence[Named]
) -> Iterator[list[Encoded | DataError]]:
    """All conversations in order, group by group; much text is shared among processes.

    In the place of one that cannot be used is the error that says why. The processes are new ones
    and not copies of this one, in which other threads may run.

    Raises:
        DataError: a process was killed.
    """
    sizes = [sum(len(turn["content"] or "") for turn in talk.messages) for talk in conversations]
    groups = [conversations[start:stop] for start, stop in _groups(sizes)]
    workers = min(available_cores(), sum(sizes) // WORTH_A_PROCESS, len(groups))
    if workers < 2:
        yield from map(encoder.try_many, groups)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, context, initializer=_Worker.start, initargs=(os.getpid(), encoder)
    )
    done = 0
    try:
        with starting_workers():
            found = pool.map(_Worker.work, groups)
        for rows in found:
            yield rows
            done += len(rows)
    except BrokenProcessPool as error:
        rest = conversations[done:]
        crash = find_crash(encoder.encode_named, rest, "spawn")
        if crash is not None:
            raise DataError(
                f"{rest[crash.number].name}: the tokenizer ended its process ({crash.how}) at "
                "this conversation: leave it out, or change it"
            ) from error
        raise DataError(
            "a process that tokenizes was killed, most likely for want of memory: free some, or "
            "prepare the data beforehand with `python -m data.prepare --task instruct`"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _groups(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of conversations, whose characters are `sizes`, that are encoded together."""
    start = characters = 0
    for number, size in enumerate(sizes, start=1):
        characters += size
        if number - start == GROUP or characters >= GROUP_CHARACTERS or number == len(sizes):
            yield start, number
            start, characters = number, 0


class _Worker:
    """What a process that encodes holds."""

    encoder: ConversationEncoder | None = None

    @classmethod
    def start(cls, parent: int, encoder: ConversationEncoder) -> None:
        work_for_parent(parent)
        cls.encoder = encoder

    @classmethod
    def work(cls, group: Sequence[Named]) -> list[Encoded | DataError]:
        assert cls.encoder is not None
        return cls.encoder.try_many(group, workers=1)
