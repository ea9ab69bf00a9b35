"""Rewrite instruction data of any known format as conversations.

python -m data.conversations.convert_instruct --input alpaca.json --output out.jsonl --to messages
"""

from common.ending import run_script  # isort: split

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import jsonl
from common.errors import DataError
from common.files import check_target, writing
from common.flags import arg, load
from data.conversations.instruct import read_file
from data.conversations.instruct_formats import (
    FORMATS,
    Example,
    alpaca_prompt,
    from_record,
    learnt_text,
)
from data.conversations.record_files import CONTAINERS, Record, find_files
from data.conversations.record_keys import PASSED, Turn, report_ignored

# Stanford Alpaca's two prompts.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
TARGETS = ("messages", "sharegpt")
SENDERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}


def stanford_prompt(instruction: str, text: str) -> str:
    """The whole prompt that Stanford's Alpaca was trained with, as the user's turn."""
    form = _ALPACA_INPUT if text.strip() else _ALPACA
    return form.format(instruction=instruction, input=text)


PROMPTS = {"none": alpaca_prompt, "alpaca": stanford_prompt}
KNOWN = ("auto", *FORMATS, *CONTAINERS)


@dataclass
class ConvertArguments:
    """What to rewrite, and as what."""

    input: list[str] = arg([], "files or directories", required=True)
    output: str = arg("", "the file of JSON lines to write", required=True)
    to: str = arg("messages", "layout of the conversations", choices=TARGETS)
    format: str = arg("auto", "of the input (auto: by content)", choices=KNOWN)
    prompt: str = arg(
        "none",
        "for alpaca: none = instruction and input, framed by the chat template; alpaca = "
        "Stanford's whole prompt, for the template plain",
        choices=tuple(PROMPTS),
    )


def convert(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    to: str = "messages",
    format: str = "auto",
    prompt: str = "none",
) -> int:
    """Write every example as a conversation, one JSON object a line; returns their number.

    Args:
        inputs: files or directories, as `read_examples` takes them.
        output: the JSON lines; written under a temporary name until complete.
        to: "messages" or "sharegpt".
        format: of the input.
        prompt: for alpaca's records: "none" joins instruction and input by a line break and leaves
            the frame to the chat template; "alpaca" writes Stanford's prompt into the user's
            turn, for the template plain.

    Raises:
        DataError: a record that cannot be used, by file and line; an output that cannot be written.
    """
    for what, value, known in (("to", to, TARGETS), ("prompt", prompt, PROMPTS)):
        if value not in known:
            raise DataError(f"{what} must be {' or '.join(known)}, got {value!r}")
    if format not in KNOWN:
        raise DataError(f"unknown format {format!r}: choose auto, {', '.join(FORMATS)}")
    check_target(output, "output")
    files = find_files(inputs)
    _check_apart(files, Path(output))
    ignored: Counter[str] = Counter()
    read = partial(read_file, convert=partial(_example, prompt=prompt), ignored=ignored)
    records = [_record(example, to) for path in files for example in read(path, format)]
    jsonl.write(output, records)
    report_ignored(ignored)
    return len(records)


def _check_apart(inputs: Sequence[Path], output: Path) -> None:
    """Refuse to replace what is read: only conversations and answers are written."""
    if not output.exists():
        return
    for path in inputs:
        with writing(output):
            same = path.samefile(output)
        if same:
            raise DataError(f"output {output} is the input {path}: choose another file")


def _example(record: Record, kind: str, name: str, prompt: str) -> Example:
    if prompt != "none" and kind != "alpaca":
        raise DataError(f"the prompt {prompt!r} is for records in the alpaca format, not {kind}")
    return from_record(record, kind, name, PROMPTS[prompt])


def _record(example: Example, to: str) -> dict[str, Any]:
    if to == "messages":
        record: dict[str, Any] = {"messages": list(example.messages)}
    else:
        record = {
            "conversations": [_sharegpt_turn(turn, example.name) for turn in example.messages]
        }
    if example.tools:
        # The hub's sharegpt files have a string there.
        tools = list(example.tools)
        record["tools"] = tools if to == "messages" else json.dumps(tools, ensure_ascii=False)
    if example.answers != (learnt_text(example.messages),):
        record["answers"] = list(example.answers)
    return record


def _sharegpt_turn(turn: Turn, name: str) -> Turn:
    lost = [key for key in PASSED if key in turn and key != "tool_calls"]
    calls = turn.get("tool_calls", [])
    if lost or (calls and turn["content"]):
        raise DataError(
            f"{name}: sharegpt has no place for {lost[0] if lost else 'text beside tool_calls'}: "
            "use --to messages"
        )
    mark = {"weight": 0} if turn.get("weight") == 0 else {}
    if not calls:
        return {"from": SENDERS[turn["role"]], "value": turn["content"], **mark}
    functions = [call.get("function", call) for call in calls]
    named = [{"name": one["name"], "arguments": one["arguments"]} for one in functions]
    text = json.dumps(named[0] if len(named) == 1 else named, ensure_ascii=False)
    return {"from": "function_call", "value": text, **mark}


def main(words: Sequence[str] | None = None) -> None:
    """Read flags, convert, and say how much there was."""
    (args,) = load(
        (ConvertArguments,),
        words,
        prog="python -m data.conversations.convert_instruct",
        description="Rewrite instruction data of any known format as conversations.",
    )
    count = convert(args.input, args.output, to=args.to, format=args.format, prompt=args.prompt)
    print(f"{count} conversations in {args.output}")


if __name__ == "__main__":
    run_script(main)
