"""What a record of each instruction format says, as a conversation."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from common import errors
from common.errors import DataError, Place
from data.conversations.record_files import Named, Record, text_of
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
# (prompt, answer) keys of one-turn records; the first pair is PaddleNLP's.
PAIRS = (("src", "tgt"), ("prompt", "completion"), ("prompt", "response"))


@dataclass(frozen=True)
class Example:
    """A conversation to learn from or to be scored on.

    Attributes:
        messages: {"role", "content"} in order; the last one is the assistant's.
        answers: what counts as right, the first of them the one in `messages`.
        name: where it is from, for messages: "file:line".
    """

    messages: tuple[dict[str, str], ...]
    answers: tuple[str, ...]
    name: str


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


def from_record(record: Record, kind: str, name: str) -> Example:
    """The example that a record is.

    Raises:
        DataError: something missing, empty or of the wrong type; the message has no name in it.
    """
    readers: dict[str, Callable[[Record], list[dict[str, str]]]] = {
        "alpaca": alpaca_messages,
        "sharegpt": _sharegpt,
        "messages": _messages,
        "src_tgt": _src_tgt,
    }
    if kind == "squad":
        return squad_example(record, name)
    answers = record.get("answers")
    accepted = _strings(record, "answers") if isinstance(answers, list) else []
    return make_example(readers[kind](record), name, tuple(accepted))


def make_example(
    messages: Iterable[dict[str, str]], name: str, answers: tuple[str, ...] = ()
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
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise DataError(f"the answer is empty (turn {number} of {len(turns)})")
    return Example(turns, answers or (turns[-1]["content"],), name)


def check_turns(turns: tuple[dict[str, str], ...]) -> None:
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


def _with_system(record: Record, turns: list[dict[str, str]]) -> list[dict[str, str]]:
    system = text_of(record, "system", required=False)
    if not system.strip():
        return turns
    if turns and turns[0]["role"] == "system":
        raise DataError("it has a system message twice: in 'system' and as its first turn")
    return [{"role": "system", "content": system}, *turns]


def alpaca_prompt(instruction: str, text: str) -> str:
    """The user's turn: the instruction, and the input on the lines after it."""
    return f"{instruction}\n{text}" if text.strip() else instruction


def alpaca_messages(
    record: Record, prompt: Callable[[str, str], str] = alpaca_prompt
) -> list[dict[str, str]]:
    """Turns of {instruction, input, output}, with LLaMA-Factory's system and history if there.

    `prompt` makes the user's last turn of instruction and input.
    """
    turns: list[dict[str, str]] = []
    for pair in record.get("history") or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError("'history' must be a list of [question, answer] pairs")
        turns += _pair(*map(_string, pair, ("history", "history")))
    instruction = text_of(record, "instruction")
    if not instruction.strip():
        raise DataError("'instruction' is empty")
    text = text_of(record, "input", required=False)
    turns += _pair(prompt(instruction, text), text_of(record, "output"))
    return _with_system(record, turns)


def _pair(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{key!r} must hold strings, not {type(value).__name__}")
    return checked(value)


def _list(record: Record, key: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list):
        raise DataError(f"{key!r} must be a list, not {type(value).__name__}")
    return value


def _sharegpt(record: Record) -> list[dict[str, str]]:
    return _with_system(record, sharegpt_turns(_list(record, "conversations")))


def sharegpt_turns(items: list[Any]) -> list[dict[str, str]]:
    """Messages of a list of {"from", "value"}."""
    turns = []
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict) or not {"from", "value"} <= set(item):
            raise DataError(f"turn {number} must be an object with 'from' and 'value'")
        sender = item["from"]
        if sender not in SENDERS:
            raise DataError(
                f"turn {number} is from {sender!r}{nearest(sender, SENDERS)}; known are "
                f"{', '.join(SENDERS)}"
            )
        turns.append({"role": SENDERS[sender], "content": _string(item["value"], "value")})
    return turns


def _messages(record: Record) -> list[dict[str, str]]:
    key = "messages" if "messages" in record else "conversations"
    return _with_system(record, message_turns(_list(record, key)))


def message_turns(items: list[Any]) -> list[dict[str, str]]:
    """Messages of a list of {"role", "content"}; content may be a list of parts of text."""
    turns = []
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict) or not {"role", "content"} <= set(item):
            raise DataError(f"turn {number} must be an object with 'role' and 'content'")
        role = item["role"]
        if role not in ROLES:
            raise DataError(
                f"turn {number} has the role {role!r}{nearest(role, ROLES)}; known are "
                f"{', '.join(ROLES)}"
            )
        turns.append({"role": role, "content": _content(item["content"], number)})
    return turns


def _content(content: Any, number: int) -> str:
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise DataError(f"turn {number} has a part of type {kind!r}; only text can be used")
        content = "".join(_string(part.get("text"), "text") for part in content)
    return _string(content, "content")


def _src_tgt(record: Record) -> list[dict[str, str]]:
    keys = next((pair for pair in PAIRS if set(pair) <= set(record)), PAIRS[0])
    sources, targets = (_strings(record, key) for key in keys)
    if len(sources) != len(targets):
        raise DataError(
            f"{keys[0]!r} has {len(sources)} turns and {keys[1]!r} has {len(targets)}: each "
            "question needs its answer"
        )
    turns: list[dict[str, str]] = []
    for source, target in zip(sources, targets, strict=True):
        turns += _pair(source, target)
    context = record.get("context")
    return _with_system(context if isinstance(context, dict) else record, turns)


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


def squad_example(row: Record, name: str) -> Example:
    """The example of a row {context, question, answers}.

    The first answer is the one to learn; all of them, each once, count as right.

    Raises:
        DataError: something missing, or a question without an answer (SQuAD 2.0 has such).
    """
    context, question = text_of(row, "context"), text_of(row, "question")
    answers = row.get("answers", row.get("answer"))
    if isinstance(answers, dict):
        # Hugging Face's rows hold one object of lists.
        answers = answers.get("text")
    if isinstance(answers, str):
        answers = [answers]
    if answers is not None and not isinstance(answers, list):
        raise DataError(f"'answers' must be a list, not {type(answers).__name__}")
    texts = [item.get("text") if isinstance(item, dict) else item for item in answers or []]
    found = tuple(dict.fromkeys(_string(text, "answers").strip() for text in texts))
    if row.get("is_impossible") or not found:
        raise DataError(
            "a question without an answer: only SQuAD v1.1 can be used, where every question has "
            "one; leave such questions out"
        )
    if not context.strip() or not question.strip():
        raise DataError("the context or the question is empty")
    return make_example(_pair(squad_prompt(context, question), found[0]), name, found)


def nearest(name: Any, known: Iterable[str]) -> str:
    """ ", did you mean ...?" or nothing."""
    close = errors.near_name(str(name), known)
    return f", did you mean {close}?" if close else ""
