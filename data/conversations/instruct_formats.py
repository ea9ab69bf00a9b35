"""What a record of each instruction format says, as a conversation."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from common import errors
from common.errors import DataError, Place
from data.conversations.record_files import Named, Record, absent, text_of
from data.conversations.record_keys import (
    MARKS,
    REFUSED,
    Tool,
    Turn,
    calls_in,
    extras,
    last_learnt,
    tools_of,
)
from data.corpus.readers import checked

FORMATS = ("alpaca", "sharegpt", "messages", "src_tgt", "squad")

ROLES = ("system", "user", "assistant", "tool")
# Names of roles in published sharegpt files.
SENDERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
_SQUAD_2 = ("is_impossible", "plausible_answers")
SYSTEM = ("system", "system_prompt")
# (prompt, answer) keys of one-turn records; the first pair is PaddleNLP's.
PAIRS = (("src", "tgt"), ("prompt", "completion"), ("prompt", "response"))


@dataclass(frozen=True)
class Example:
    """A conversation to learn from or to be scored on.

    Attributes:
        messages: {"role", "content"} in order; the last one is the assistant's. Beside them a
            turn may have what `record_keys.PASSED` lists, and "weight": 0 if it is not learnt.
        answers: what counts as right, the first of them the one in `messages`.
        name: where it is from, for messages: "file:line".
        tools: what the assistant may call, for the chat template.
    """

    messages: tuple[Turn, ...]
    answers: tuple[str, ...]
    name: str
    tools: tuple[Tool, ...] = ()

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """The messages before the last answer that is learnt."""
        return self.messages[: last_learnt(self.messages)]


def record_format(record: Record) -> str:
    """The format of a record by its keys.

    Raises:
        DataError: no format has these keys.
    """
    keys = set(record)
    if "chosen" in keys and "rejected" in keys:
        raise DataError(
            "a preference pair (keys 'chosen' and 'rejected'), not an example to imitate: that is "
            "data for preference tuning"
        )
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        turns = record["conversations"]
        first = turns[0] if isinstance(turns, list) and turns else {}
        return "messages" if isinstance(first, dict) and "role" in first else "sharegpt"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if any({source, target} <= keys for source, target in PAIRS):
        return "src_tgt"
    if {"context", "question"} <= keys or isinstance(record.get("data"), list):
        return "squad"
    names = ", ".join(map(repr, list(record)[:8])) or "none"
    hint = "; text without questions is for data.prepare and run_pretrain.py" * (keys == {"text"})
    raise DataError(
        f"no known format has the keys {names}: alpaca has instruction, input, output; sharegpt "
        "conversations of from, value; messages a list of role, content; src_tgt src, tgt; squad "
        f"data, or context, question, answers{hint}"
    )


def known_keys(record: Record, kind: str) -> set[str]:
    """The keys of a record that mean something in its format."""
    keys: dict[str, tuple[str, ...]] = {
        "alpaca": ("instruction", "input", "output", "history"),
        "sharegpt": ("conversations",),
        "messages": ("messages" if "messages" in record else "conversations",),
        "src_tgt": (*_pair_keys(record), "context"),
        "squad": ("context", "question", "answer", "id", "title", *_SQUAD_2),
    }
    return {*keys[kind], *SYSTEM, "answers"}


def alpaca_prompt(instruction: str, text: str) -> str:
    """The user's turn: the instruction, and the input on the lines after it."""
    return f"{instruction}\n{text}" if text.strip() else instruction


def from_record(
    record: Record, kind: str, name: str, prompt: Callable[[str, str], str] = alpaca_prompt
) -> Example:
    """The example that a record is; `prompt` makes alpaca's question of instruction and input.

    Raises:
        DataError: something missing, empty or of the wrong type; the message has no name in it.
    """
    readers: dict[str, Callable[[Record], list[Turn]]] = {
        "alpaca": partial(_alpaca, prompt=prompt),
        "sharegpt": _sharegpt,
        "messages": _messages,
        "src_tgt": _src_tgt,
    }
    if kind == "squad":
        turns, accepted = _squad(record)
    else:
        turns = readers[kind](record)
        given = record.get("answers") not in (None, "")
        accepted = tuple(_strings(record, "answers")) if given else ()
    return make_example(with_system(record, turns), name, accepted, tools_of(record))


def make_example(
    messages: Iterable[Turn],
    name: str,
    answers: tuple[str, ...] = (),
    tools: tuple[Tool, ...] = (),
) -> Example:
    """An example from messages, after checking that there is something to learn.

    Raises:
        DataError: no turn of the assistant, an empty one, or one with nothing before it.
    """
    turns = tuple(messages)
    check_turns(turns)
    if turns[-1]["role"] != "assistant":
        raise DataError(
            f"the last turn is the {turns[-1]['role']}'s, so it has no answer: leave that turn out"
        )
    for number, turn in enumerate(turns, 1):
        if turn["role"] == "assistant" and is_empty(turn):
            raise DataError(f"the answer is empty (turn {number} of {len(turns)})")
    last = last_learnt(turns)
    if last < 0:
        raise DataError(
            f"all of the assistant's turns are marked as not learnt ({'/'.join(MARKS)})"
        )
    return Example(turns, answers or (learnt_text(turns),), name, tools)


def learnt_text(turns: Sequence[Turn]) -> str:
    """The text of the last answer that is learnt."""
    return turns[last_learnt(turns)]["content"] or ""


def is_empty(turn: Turn) -> bool:
    """Whether an answer says nothing and calls nothing."""
    return not (turn["content"] or "").strip() and "tool_calls" not in turn


def check_turns(turns: tuple[Turn, ...]) -> None:
    """`DataError` unless there is an assistant's turn, with a question before the first one, and
    the system's message comes first.
    """
    if not turns:
        raise DataError("the conversation is empty")
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise DataError(f"no turn is the assistant's (roles: {', '.join(roles)})")
    if not any(role in ("user", "tool") for role in roles[: roles.index("assistant")]):
        raise DataError("it begins with the assistant's turn: there is nothing to answer")
    if "system" in roles[1:]:
        raise DataError(f"turn {roles.index('system', 1) + 1} is the system's, which must be first")
    for number, turn in enumerate(turns, 1):
        if turn["role"] == "user" and not turn["content"].strip():
            raise DataError(f"the prompt is empty (turn {number} of {len(turns)})")


def with_system(record: Record, turns: Sequence[Turn]) -> list[Turn]:
    """Turns with the record's system message before them, which may also be the first of them.

    Raises:
        DataError: two that differ.
    """
    context = record.get("context")
    places: list[tuple[str, Record]] = [(key, record) for key in SYSTEM]
    if isinstance(context, dict):
        places.append(("system", context))
    found = [text_of(place, key, required=False) for key, place in places]
    first = [turn["content"] for turn in turns[:1] if turn["role"] == "system"]
    said = [text for text in (*found, *first) if text.strip()]
    if len({text.strip() for text in said}) > 1:
        raise DataError(
            f"it has two system messages, {said[0]!r:.40} and {said[1]!r:.40}: keep one of "
            f"{', '.join(map(repr, SYSTEM))} and a first turn of the system's"
        )
    if not said:
        return list(turns)
    return [{"role": "system", "content": said[0]}, *turns[len(first) :]]


def _alpaca(record: Record, prompt: Callable[[str, str], str]) -> list[Turn]:
    """Turns of {instruction, input, output}, with LLaMA-Factory's history if there."""
    turns: list[Turn] = []
    history = record.get("history")
    if history not in (None, "") and not isinstance(history, list | tuple):
        raise DataError(f"'history' must be a list, not {type(history).__name__}")
    for pair in history or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError("'history' must be a list of [question, answer] pairs")
        turns += _pair(*map(_string, pair, ("history", "history")))
    instruction = text_of(record, "instruction")
    if not instruction.strip():
        raise DataError("'instruction' is empty")
    text = text_of(record, "input", required=False)
    return turns + _pair(prompt(instruction, text), text_of(record, "output"))


def _pair(question: str, answer: str) -> list[Turn]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{key!r} must hold strings, not {type(value).__name__}")
    return checked(value)


def _list(record: Record, key: str) -> list[Any]:
    value = record.get(key)
    if value is None:
        raise absent(record, key)
    if not isinstance(value, list):
        raise DataError(f"{key!r} must be a list, not {type(value).__name__}")
    return value


def _sharegpt(record: Record) -> list[Turn]:
    return sharegpt_turns(_list(record, "conversations"))


def sharegpt_turns(items: list[Any]) -> list[Turn]:
    """Messages of a list of {"from", "value"}."""
    turns = []
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict) or not {"from", "value"} <= set(item):
            raise DataError(f"turn {number} must be an object with 'from' and 'value'")
        sender = item["from"]
        if not isinstance(sender, str) or sender not in SENDERS:
            raise DataError(
                f"turn {number} is from {sender!r}{nearest(sender, SENDERS)}; known are "
                f"{', '.join(SENDERS)}"
            )
        role, text = SENDERS[sender], _string(item["value"], "value")
        _check_spelling(item, ("from", "value"), ("role", "content"), number)
        turn: Turn = {"role": role, "content": text, **extras(item, role, number)}
        if sender == "function_call" and (calls := calls_in(text, number)):
            if "tool_calls" in turn:
                raise DataError(f"turn {number} spells calls as its value and in 'tool_calls'")
            turn |= {"content": None, "tool_calls": calls}
        turns.append(turn)
    return turns


def _messages(record: Record) -> list[Turn]:
    key = "messages" if "messages" in record else "conversations"
    return message_turns(_list(record, key))


def message_turns(items: list[Any]) -> list[Turn]:
    """Messages of a list of {"role", "content"}; content may be a list of parts of text, and null
    beside calls.
    """
    turns = []
    for number, item in enumerate(items, 1):
        calls = isinstance(item, dict) and bool(item.get("tool_calls"))
        if not isinstance(item, dict) or "role" not in item or not (calls or "content" in item):
            raise DataError(f"turn {number} must be an object with 'role' and 'content'")
        role = item["role"]
        if role not in ROLES:
            raise DataError(
                f"turn {number} has the role {role!r}{nearest(role, ROLES)}; known are "
                f"{', '.join(ROLES)}"
            )
        _check_spelling(item, ("role", "content"), ("from", "value"), number)
        text = item.get("content")
        # Templates tell calls alone by content that is null.
        content = None if calls and text is None else _content(text, number)
        turns.append({"role": role, "content": content, **extras(item, role, number)})
    return turns


def _check_spelling(item: Turn, read: tuple[str, str], other: tuple[str, str], number: int) -> None:
    """`DataError` where a turn says something else in the other spelling."""
    said = [item[key] for key in (read[0], other[0]) if item.get(key) is not None]
    roles = [SENDERS.get(role, role) if isinstance(role, str) else role for role in said]
    texts = [item[key] for key in (read[1], other[1]) if item.get(key) is not None]
    if roles[1:] != roles[:1] * (len(roles) - 1) or texts[1:] != texts[:1] * (len(texts) - 1):
        raise DataError(
            f"turn {number} has {'/'.join(read)} and {'/'.join(other)}, which differ: keep one"
        )


def _content(content: Any, number: int) -> str:
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise DataError(f"turn {number} has a part of type {kind!r}; only text can be used")
        content = "".join(_string(part.get("text"), "text") for part in content)
    return _string(content, "content")


def _pair_keys(record: Record) -> tuple[str, str]:
    """The keys of question and answer; a table may have columns for others, which are empty.

    Raises:
        DataError: two pairs that differ.
    """
    there = [pair for pair in PAIRS if set(pair) <= set(record)]
    full = [pair for pair in there if all(record[key] not in (None, "") for key in pair)]
    if any([record[key] for key in pair] != [record[key] for key in full[0]] for pair in full):
        raise DataError(
            f"it has {' and '.join('/'.join(pair) for pair in full)}, which differ: keep one"
        )
    return (full or there or [PAIRS[0]])[0]


def _src_tgt(record: Record) -> list[Turn]:
    keys = _pair_keys(record)
    sources, targets = (_strings(record, key) for key in keys)
    if len(sources) != len(targets):
        raise DataError(
            f"{keys[0]!r} has {len(sources)} turns and {keys[1]!r} has {len(targets)}: each "
            "question needs its answer"
        )
    turns: list[Turn] = []
    for source, target in zip(sources, targets, strict=True):
        turns += _pair(source, target)
    context = record.get("context")
    other = set(context) - {"system"} if isinstance(context, dict) else context not in (None, "")
    if other:
        raise DataError(f"'context' may hold a 'system' only: {REFUSED['context']}")
    return turns


def _strings(record: Record, key: str) -> list[str]:
    value = record.get(key)
    if isinstance(value, list):
        if not value:
            raise DataError(f"{key!r} is an empty list")
        return [_string(item, key) for item in value]
    return [text_of(record, key)]


def squad_prompt(context: str, question: str) -> str:
    """The user's turn of a question about a text; the answer is a few words of the text."""
    return f"Text: {context.strip()}\n\nQuestion: {question.strip()}\n\nAnswer:"


def squad_rows(record: Record, place: Place) -> Iterator[Named]:
    """The questions of SQuAD's nested file as flat rows {context, question, answers}.

    Raises:
        DataError: not that layout.
    """
    for article, item in enumerate(_list(record, "data"), 1):
        at = f"{place.inner}, data[{article}]"
        for number, paragraph in enumerate(_inner(item, "paragraphs", f"{place}{at}"), 1):
            where = replace(place, inner=f"{at}.paragraphs[{number}]")
            for qa in _inner(paragraph, "qas", str(where)):
                at_id = replace(place, inner=f"{place.inner} question {qa.get('id')}")
                row = {**qa, "context": paragraph.get("context")}
                yield at_id if "id" in qa else where, row


def _inner(item: Any, key: str, where: str) -> list[dict[str, Any]]:
    inner = item.get(key) if isinstance(item, dict) else None
    if not isinstance(inner, list) or not all(isinstance(part, dict) for part in inner):
        raise DataError(f"{where} needs a list of objects under {key!r}: is this SQuAD v1.1?")
    return inner


def _squad(row: Record) -> tuple[list[Turn], tuple[str, ...]]:
    """Turns and accepted answers of a row {context, question, answers}.

    The first answer is the one to learn; all of them, each once, count as right.

    Raises:
        DataError: something missing, or a question without an answer (SQuAD 2.0 has such).
    """
    context, question = text_of(row, "context"), text_of(row, "question")
    given = [row[key] for key in ("answers", "answer") if row.get(key) not in (None, "", [])]
    if len(given) > 1:
        raise DataError("it has 'answers' and 'answer': keep one of them")
    answers = given[0] if given else None
    if isinstance(answers, dict):
        # Hugging Face's rows hold one object of lists.
        answers = answers.get("text")
    if isinstance(answers, str):
        answers = [answers]
    if answers is not None and not isinstance(answers, list):
        raise DataError(f"'answers' must be a list, not {type(answers).__name__}")
    texts = [item.get("text") if isinstance(item, dict) else item for item in answers or []]
    found = tuple(dict.fromkeys(_string(text, "answers").strip() for text in texts))
    impossible = str(row.get("is_impossible")).lower() in ("true", "1")
    if impossible or not found:
        raise DataError(
            "a question without an answer: only SQuAD v1.1 can be used, where every question has "
            "one; leave such questions out"
        )
    if not context.strip() or not question.strip():
        raise DataError("the context or the question is empty")
    return _pair(squad_prompt(context, question), found[0]), found


def nearest(name: Any, known: Iterable[str]) -> str:
    """ ", did you mean ...?" or nothing."""
    close = errors.near_name(str(name), known)
    return f", did you mean {close}?" if close else ""
