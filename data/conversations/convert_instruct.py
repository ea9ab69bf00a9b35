"""Rewrite instruction data of any known format as conversations.

python -m data.conversations.convert_instruct --input alpaca.json --output out.jsonl --to messages
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import jsonl
from common.errors import DataError
from common.files import check_target
from common.flags import arg, load, run_script
from data.conversations.instruct import read_file
from data.conversations.instruct_formats import (
    FORMATS,
    Example,
    alpaca_messages,
    alpaca_prompt,
    from_record,
    make_example,
)
from data.conversations.record_files import CONTAINERS, Record, find_files

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
    records = [
        _record(example, to)
        for path in find_files(inputs)
        for example in read_file(path, format, convert=partial(_example, prompt=prompt))
    ]
    jsonl.write(output, records)
    return len(records)


def _example(record: Record, kind: str, name: str, prompt: str) -> Example:
    if kind == "alpaca":
        return make_example(alpaca_messages(record, PROMPTS[prompt]), name)
    if prompt != "none":
        raise DataError(f"the prompt {prompt!r} is for records in the alpaca format, not {kind}")
    return from_record(record, kind, name)


def _record(example: Example, to: str) -> dict[str, Any]:
    if to == "messages":
        record: dict[str, Any] = {"messages": list(example.messages)}
    else:
        record = {
            "conversations": [
                {"from": SENDERS[turn["role"]], "value": turn["content"]}
                for turn in example.messages
            ]
        }
    if len(example.answers) > 1:
        record["answers"] = list(example.answers)
    return record


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
