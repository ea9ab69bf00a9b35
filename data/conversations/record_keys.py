"""What keys of records and turns mean beside the text.

Marks of what is learnt, tools, calls and reasoning are honoured. Keys that would change what is
learnt, and cannot be honoured, are refused. Any other means nothing here and is counted.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common.errors import DataError
from data.corpus.readers import checked

# What JSON gives: a turn with its text, and a tool's description.
Turn = dict[str, Any]
Tool = dict[str, Any]

logger = logging.getLogger(__name__)

# Of a turn, whether it is learnt: OpenAI and Mistral; axolotl (twice); home-llm; ms-swift (twice).
MARKS = ("weight", "train", "training", "train_on_turn", "loss", "loss_scale")
# Thoughts before the answer: DeepSeek, Qwen and vLLM; OpenRouter; gpt-oss.
REASONING = ("reasoning_content", "reasoning", "thinking")
# Handed on to the chat template; of the last two few templates have use.
PASSED = (*REASONING, "tool_calls", "tool_call_id", "name")
TURN_KEYS = {"role", "content", "from", "value", *MARKS, *PASSED}
# Where a record holds turns.
_HOLDERS = ("messages", "conversations", "prompt", "chosen", "rejected")

_TEXT_ONLY = "only text can be used"
_PARTS = "a turn is learnt as a whole or not at all: mark turns with weight 0 or 1"
_PAIR = "that is data for preference tuning, with chosen and rejected"
_TURNS = "write it into the conversation, or drop the key where it is no part of it"
# Meaning known, honouring impossible: what to say of it.
REFUSED = {
    **dict.fromkeys(
        ("image", "images", "video", "videos", "audio", "audios", "objects"), _TEXT_ONLY
    ),
    **dict.fromkeys(("loss_mask", "completion_mask", "assistant_masks", "label_mask"), _PARTS),
    # torchtune's turns have "masked", NeMo's records "mask".
    **dict.fromkeys(("masked", "mask"), _PARTS),
    **dict.fromkeys(("train_detail", "training_detail", "loss_weight", "sample_weight"), _PARTS),
    "functions": "write them as tools",
    "function_call": "write it as tool_calls",
    "refusal": "write it as the turn's content",
    "documents": "write them into the prompt",
    "context": _TURNS,
    "history": _TURNS,
    "chat_template_kwargs": "templates are rendered without variables of a record",
    "rejected_response": _PAIR,
    "rejected_messages": _PAIR,
}
# What NeMo says of records of which the assistant's turns are learnt.
_AS_USUAL = ("mask", "User")
# Of pairs: keys that elsewhere hold the prompt.
_OTHER_PROMPT = dict.fromkeys(("instruction", "question"), "a pair's question is its prompt")
# Of a whole record, where anything but yes says that it is not to be imitated as it stands. A
# number is a class as a label, and a figure as a loss.
_WHOLE = {
    **dict.fromkeys(("weight", "train", "training", "train_on_turn", "loss_scale"), (float, bool)),
    **dict.fromkeys(("label", "kto_tag", "loss"), (bool,)),
}
# What tables write for yes and no.
_WORDS = {"true": True, "false": False}


def is_learnt(turn: Mapping[str, Any]) -> bool:
    """Whether it is the assistant's, and not marked otherwise (`mark_of`)."""
    return turn["role"] == "assistant" and turn.get("weight") != 0


def last_learnt(turns: Sequence[Mapping[str, Any]]) -> int:
    """Index of the last turn that is learnt, or -1."""
    return max((index for index, turn in enumerate(turns) if is_learnt(turn)), default=-1)


def extras(item: Mapping[str, Any], role: str, number: int) -> Turn:
    """What a turn holds beside role and text, as templates expect it; "weight": 0 is the mark.

    Raises:
        DataError: a mark, calls or thoughts that cannot be honoured.
    """
    found: Turn = {}
    for key in PASSED:
        value = item.get(key)
        if value is None or value == []:
            continue
        if key == "tool_calls":
            value = _calls(value, number)
        elif not isinstance(value, str):
            raise DataError(f"turn {number}: {key!r} must be a string, not {type(value).__name__}")
        if key in (*REASONING, "tool_calls") and role != "assistant":
            raise DataError(f"turn {number} is the {role}'s and has {key!r}: only answers have")
        if value:
            found[key] = value
    check_strings(found)
    return found if mark_of(item, role, number) else {**found, "weight": 0}


def mark_of(item: Mapping[str, Any], role: str, number: int) -> bool:
    """False where a turn is marked as not to be learnt, in any of the spellings of `MARKS`."""
    marks = {key: item[key] for key in MARKS if item.get(key) is not None}
    for key, value in marks.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise DataError(f"turn {number} has {key}={value!r}: {_PARTS}")
    if len({bool(value) for value in marks.values()}) > 1:
        raise DataError(f"turn {number} has marks that contradict each other: {marks}")
    if role != "assistant" and any(marks.values()):
        raise DataError(
            f"turn {number} is the {role}'s and marked to be learnt ({', '.join(marks)}): only "
            "the assistant's turns are learnt; drop the mark"
        )
    return all(marks.values())


def _calls(value: Any, number: int) -> list[Turn]:
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise DataError(f"turn {number}: 'tool_calls' must be a list of objects")
    return [_call(call, number) for call in value]


def _call(call: Turn, number: int) -> Turn:
    """A call of a function with its arguments as an object, as templates expect them and vLLM
    gives them.
    """
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"turn {number}: a call needs a function with a 'name', got {call!r:.80}")
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"turn {number}: the arguments of {function['name']}")
    if not isinstance(arguments, dict):
        raise DataError(f"turn {number}: the arguments of {function['name']} must be an object")
    if "function" in call:
        return {**call, "function": {**function, "arguments": arguments}}
    others = {key: value for key, value in call.items() if key not in ("name", "arguments")}
    whole = {"name": function["name"], "arguments": arguments}
    return {"type": "function", **others, "function": whole}


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{what} are no JSON: {error}") from None


def calls_in(text: str, number: int) -> list[Turn]:
    """The calls that the text of a sharegpt turn "function_call" spells; [] for other text."""
    try:
        value = json.loads(text)
    except ValueError:
        return []
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return []
    return [_call(call, number) for call in calls]


def tools_of(record: Mapping[str, Any]) -> tuple[Tool, ...]:
    """The tools that a record describes, as a list or as JSON in a string.

    Raises:
        DataError: no such list, or a tool without a name.
    """
    value = record.get("tools")
    if isinstance(value, str) and value.strip():
        value = _parsed(value, "'tools'")
    if not value:
        return ()
    tools = value if isinstance(value, list) else [value]
    for tool in tools:
        if not isinstance(tool, dict) or not isinstance(tool_name(tool), str):
            raise DataError(f"'tools' must be a list of objects with a name, got {tool!r:.80}")
    check_strings(tools)
    return tuple(tools)


def tool_name(tool: Tool) -> Any:
    """The name of a tool, or of the function that is one."""
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, dict) else None


def strings(value: Any) -> Iterator[str]:
    """All strings in a value of JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def check_strings(value: Any) -> None:
    """`DataError` where a string in it is no text."""
    for text in strings(value):
        checked(text)


def note_keys(record: Mapping[str, Any], known: set[str], ignored: Counter[str]) -> None:
    """Count the keys of a record and of its turns that mean nothing here.

    Raises:
        DataError: a key that would change what is learnt and cannot be honoured.
    """
    refused = {**REFUSED, **_OTHER_PROMPT} if "chosen" in known else REFUSED
    _note(record, {*known, "tools"}, ignored, "", refused)
    for key, kinds in _WHOLE.items():
        if key not in known and _mark_of_record(record.get(key), kinds) not in (None, 1):
            raise DataError(
                f"{key}={record[key]!r} says that this record is not to be learnt as it stands: "
                "leave it out, or drop the key"
            )
    for holder in _HOLDERS:
        turns = record.get(holder)
        for turn in turns if isinstance(turns, list) else [turns]:
            if holder in known and isinstance(turn, dict):
                _note(turn, TURN_KEYS, ignored, "of turns: ", REFUSED)


def _mark_of_record(value: Any, kinds: tuple[type, ...]) -> float | None:
    """What a mark says, also as a table spells it; None for what is no mark of these kinds."""
    if isinstance(value, str):
        value = _word(value)
    if isinstance(value, list | dict) and value:
        value = 0.0  # marks of parts
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, int | float) and float in kinds:
        return 1.0 if value == 1 else 0.0
    return None


def _word(text: str) -> bool | float | None:
    try:
        return _WORDS[text.lower()] if text.lower() in _WORDS else float(text)
    except ValueError:
        return None


def _note(
    item: Mapping[str, Any],
    known: set[str],
    ignored: Counter[str],
    where: str,
    refused: Mapping[str, str],
) -> None:
    for key, value in item.items():
        if key in known:
            continue
        harmless = value is None or value is False or value in ("", [], {})
        if key in refused and not harmless and (key, value) != _AS_USUAL:
            raise DataError(f"{key!r} cannot be honoured: {refused[key]}")
        ignored[f"{where}{key}"] += 1


def report_ignored(ignored: Counter[str]) -> None:
    """One line in the log about the keys that were counted."""
    if ignored:
        keys = ", ".join(f"{key} ({count})" for key, count in ignored.most_common())
        logger.warning("keys that mean nothing here, and how often they were met: %s", keys)
