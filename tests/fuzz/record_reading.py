"""A second reader of records, written from docs/instruct_data.md alone: what is learnt of each.

It renders and reads in the plainest way, one record at a time, and knows nothing of the suite. What
it cannot make sense of is `Refused`: the suite must refuse that too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Turn = dict[str, Any]
Record = Mapping[str, Any]


class Refused(Exception):  # noqa: N818  (it says what has to happen)
    """No reader should make an example of this."""


@dataclass(frozen=True)
class Reading:
    """What a record says: the whole text up to the last learnt answer, and the learnt parts."""

    whole: str
    learnt: tuple[str, ...]


SENDERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation"), "tool"),
    "system": "system",
}
MARKS = ("weight", "train", "training", "train_on_turn", "loss", "loss_scale")
# Would change what is learnt wherever they stand, and there is no way to honour them.
NOWHERE = (
    *("image", "images", "video", "videos", "audio", "audios", "objects", "documents"),
    *("loss_mask", "completion_mask", "train_detail", "training_detail", "masked", "mask"),
    *("functions", "function_call", "refusal", "chat_template_kwargs"),
    *("rejected_response", "rejected_messages"),
)
EMPTY = (None, "", [], {})
PAIRS = (("src", "tgt"), ("prompt", "completion"), ("prompt", "response"))


def text(value: Any) -> str:
    """A string that UTF-8 can hold."""
    if not isinstance(value, str) or "\0" in value:
        raise Refused
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused from None
    return value


def optional(record: Record, key: str) -> str:
    return "" if record.get(key) is None else text(record[key])


def kind_of(record: Record) -> str:
    """The format of the first record of a file."""
    if "chosen" in record and "rejected" in record:
        raise Refused
    if "messages" in record:
        return "messages"
    if "conversations" in record:
        turns = record["conversations"]
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
            return "messages"
        return "sharegpt"
    if "instruction" in record and "output" in record:
        return "alpaca"
    if any(one in record and other in record for one, other in PAIRS):
        return "src_tgt"
    if "context" in record and "question" in record:
        return "squad"
    raise Refused


def read(record: Record, kind: str) -> Reading:
    """What is learnt of a record.

    Raises:
        Refused: it cannot be said, or would need what the suite does not have.
    """
    refuse_what_cannot_be(record, kind)
    if kind in ("sharegpt", "messages"):
        turns = talk(
            record, "messages" if kind == "messages" and kind in record else "conversations"
        )
    else:
        turns = {"alpaca": alpaca, "src_tgt": source_target, "squad": squad}[kind](record)
    return said(with_system(record, turns), tools(record))


def refuse_what_cannot_be(record: Record, kind: str) -> None:
    own = {"alpaca": ("history",), "src_tgt": ("context",), "squad": ("context",)}.get(kind, ())
    for key in (*NOWHERE, *{"history", "context"}.difference(own)):
        if record.get(key) not in EMPTY and not harmless(key, record[key]):
            raise Refused
    if kind == "pair":
        if any(record.get(key) not in EMPTY for key in ("instruction", "question")):
            raise Refused
        return
    for key in (*MARKS, "label", "kto_tag"):
        value = record.get(key)
        flag = isinstance(value, bool) or str(value).lower() in ("true", "false")
        if key in ("label", "kto_tag", "loss") and not flag:
            continue  # a class, a figure
        if value not in EMPTY and not on(value):
            raise Refused


def number(value: str) -> float | None:
    """What a table's cell says as a mark; None where it is neither a number nor yes or no."""
    try:
        return float({"true": 1, "false": 0}.get(value.lower(), value))
    except ValueError:
        return None


def harmless(key: str, value: Any) -> bool:
    """A mask that masks what is never learnt, or nothing."""
    return value is False or (key == "mask" and value == "User")


def on(value: Any) -> bool:
    """Whether a mark says yes; a word that is no mark does not say no."""
    if isinstance(value, str):
        return number(value) in (1, None)
    return isinstance(value, int | float) and value == 1


def with_system(record: Record, turns: list[Turn]) -> list[Turn]:
    found = [
        text(record[key]) for key in ("system", "system_prompt") if record.get(key) is not None
    ]
    context = record.get("context")
    if isinstance(context, dict) and context.get("system") is not None:
        found.append(text(context["system"]))
    found = [one for one in found if one.strip()]
    if not found:
        return turns
    first = turns[0] if turns and turns[0]["role"] == "system" else None
    known = {one.strip() for one in found} | ({first["content"].strip()} if first else set())
    if len(known) > 1:
        raise Refused
    return turns if first else [{"role": "system", "content": found[0]}, *turns]


def alpaca(record: Record) -> list[Turn]:
    turns: list[Turn] = []
    for pair in record.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Refused
        turns += exchange(text(pair[0]), text(pair[1]))
    question, more = text(record.get("instruction")), optional(record, "input")
    question += f"\n{more}" if more.strip() else ""
    return turns + exchange(question, text(record.get("output")))


def exchange(question: str, answer: str) -> list[Turn]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def source_target(record: Record) -> list[Turn]:
    full = [pair for pair in PAIRS if all(record.get(key) not in (None, "") for key in pair)]
    if not full or any(
        record[one] != record[full[0][at]] for pair in full for at, one in enumerate(pair)
    ):
        raise Refused
    one, other = full[0]
    context = record.get("context")
    if context not in EMPTY and not (isinstance(context, dict) and set(context) <= {"system"}):
        raise Refused
    given = [record.get(key) for key in (one, other)]
    sides = [value if isinstance(value, list) else [value] for value in given]
    if len(sides[0]) != len(sides[1]):
        raise Refused
    turns: list[Turn] = []
    for question, answer in zip(*sides, strict=True):
        turns += exchange(text(question), text(answer))
    return turns


def squad(record: Record) -> list[Turn]:
    answers = record.get("answers")
    if answers in EMPTY:
        answers = record.get("answer")
    elif record.get("answer") not in EMPTY:
        raise Refused
    if isinstance(answers, dict):
        answers = answers.get("text")
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list) or not answers or record.get("is_impossible"):
        raise Refused
    first = answers[0]["text"] if isinstance(answers[0], dict) else answers[0]
    context, question = (text(record.get(key)).strip() for key in ("context", "question"))
    asked = f"Text: {context}\n\nQuestion: {question}\n\nAnswer:"
    return exchange(asked, text(first).strip())


def talk(record: Record, key: str) -> list[Turn]:
    items = record.get(key)
    if not isinstance(items, list):
        raise Refused
    return [turn(item) for item in items]


def turn(item: Any) -> Turn:
    """One turn, in either spelling; "learnt" says whether its mark allows that."""
    if not isinstance(item, dict):
        raise Refused
    for key in NOWHERE:
        if item.get(key) not in EMPTY and not harmless(key, item[key]):
            raise Refused
    sender = the_one(item, "from", "role")
    value = the_one(item, "value", "content")
    role = SENDERS[sender]
    calls = item.get("tool_calls") or None
    if isinstance(value, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in value):
            raise Refused
        value = "".join(text(part.get("text")) for part in value)
    if sender == "function_call" and (spelled := spelled_calls(text(value))):
        if calls:
            raise Refused
        value, calls = None, spelled
    content = None if value is None and calls else text(value)
    found: Turn = {"role": role, "content": content, "learnt": mark(item, role)}
    found |= beside(item, calls)
    if role != "assistant" and found.keys() & {"calls", "thoughts", "lost"}:
        raise Refused
    return found


def the_one(item: Record, key: str, other: str) -> Any:
    """What stands under either key, or the same under both."""
    there = [item[one] for one in (key, other) if item.get(one) is not None]
    meant = [SENDERS.get(one, one) if isinstance(one, str) else one for one in there]
    if meant[1:] != meant[: len(meant) - 1]:
        raise Refused
    return there[0] if there else None


def mark(item: Record, role: str) -> bool:
    """Whether a turn may be learnt."""
    marks = [item[key] for key in MARKS if item.get(key) is not None]
    if any(not isinstance(one, int | float) or one not in (0, 1) for one in marks):
        raise Refused
    if len({bool(one) for one in marks}) > 1 or (role != "assistant" and any(marks)):
        raise Refused
    return all(marks)


def beside(item: Record, calls: list[Any] | None) -> Turn:
    """What a turn says beside its content."""
    found: Turn = {}
    for key in ("reasoning", "thinking"):
        if item.get(key) not in EMPTY:
            found["lost"] = text(item[key])  # the template of the fuzz has no place for these
    if item.get("reasoning_content") not in EMPTY:
        found["thoughts"] = text(item["reasoning_content"])
    if calls:
        found["calls"] = [call(one) for one in calls]
    return found


def spelled_calls(value: str) -> list[Any]:
    try:
        found = json.loads(value)
    except ValueError:
        return []
    found = found if isinstance(found, list) else [found]
    named = all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in found)
    return found if named else []


def call(value: Any) -> tuple[str, Any]:
    if not isinstance(value, dict):
        raise Refused
    function = value.get("function", value)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments:
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise Refused from None
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, dict):
        raise Refused
    text(json.dumps([function["name"], arguments], ensure_ascii=False))
    return function["name"], arguments


def tools(record: Record) -> list[Any]:
    value = record.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise Refused from None
    if not value:
        return []
    return value if isinstance(value, list) else [value]


def said(turns: list[Turn], described: list[Any], *, last_only: bool = False) -> Reading:
    """The conversation as the template of the fuzz writes it, and what of that is learnt."""
    good = [
        number
        for number, one in enumerate(turns)
        if one["role"] == "assistant" and one.get("learnt", True)
    ]
    if not good:
        raise Refused
    if described:
        text(json.dumps(described, ensure_ascii=False))
    whole = f"tools: {json.dumps(described, ensure_ascii=False)}\n" if described else ""
    learnt = []
    for number, one in enumerate(turns[: good[-1] + 1]):
        if "lost" in one:
            raise Refused
        body = written(one)
        whole += f"{one['role']}: {body}" + ("" if one["role"] == "assistant" else "\n")
        if number in good:
            learnt.append(body)
    return Reading(whole, tuple(learnt[-1:] if last_only else learnt))


def written(one: Turn) -> str:
    body = f"({one['thoughts']}) " if one.get("thoughts") else ""
    body += (one["content"] or "").strip()
    for name, arguments in one.get("calls", ()):
        body += f" call {name} {json.dumps(arguments, ensure_ascii=False)}"
    return body


def read_pair(record: Record) -> tuple[Reading, Reading]:
    """The chosen and the rejected side of a pair.

    Raises:
        Refused: it is none.
    """
    refuse_what_cannot_be(record, "pair")
    given = [record[key] for key in ("prompt", "conversations") if record.get(key) not in EMPTY]
    if len(given) > 1:
        raise Refused
    prompt = side(given[0], "user") if given else []
    prompt = with_system(record, prompt)
    sides = [joined(prompt, side(record.get(key), "assistant")) for key in ("chosen", "rejected")]
    if plain(sides[0][:-1]) != plain(sides[1][:-1]) or any(
        one[-1]["role"] != "assistant" or not one[-1].get("learnt", True) for one in sides
    ):
        raise Refused
    described = tools(record)
    chosen, rejected = (said(one, described, last_only=True) for one in sides)
    if chosen.learnt == rejected.learnt:
        raise Refused
    return chosen, rejected


def side(value: Any, role: str) -> list[Turn]:
    if isinstance(value, str):
        return [{"role": role, "content": text(value)}]
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list) or not items:
        raise Refused
    return [turn(item) for item in items]


def plain(turns: list[Turn]) -> list[tuple[str, str]]:
    return [(one["role"], written(one).strip()) for one in turns]


def joined(prompt: list[Turn], turns: list[Turn]) -> list[Turn]:
    """The prompt once, whether or not the answer's side repeats it or its end."""
    if prompt and turns[0]["role"] == "system":
        if prompt[0]["role"] != "system":
            prompt = [turns[0], *prompt]
        elif plain(prompt[:1]) != plain(turns[:1]):
            raise Refused
        turns = turns[1:]
    for count in range(len(prompt), 0, -1):
        if count < len(turns) and plain(prompt[-count:]) == plain(turns[:count]):
            return [*prompt, *turns[count:]]
    return [*prompt, *turns]
